"""Pictures. matplotlib is imported here alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from autoaccum.errors import MissingExtra, UsageError
from autoaccum.explaining import notation
from autoaccum.plan import Plan
from autoaccum.reading import Estimate
from autoaccum.simulate.tape import KINDS
from autoaccum.simulate.timeline import Timeline
from autoaccum.units import GIB, MIB

# Told apart in grey, too, and by eyes that see red and green alike (after Okabe and Ito, jfly.uni-koeln.de/color).
_COLOURS = {"parameters": "#0072B2", "gradients": "#E69F00", "optimizer": "#009E73", "activations": "#CC79A7", "workspace": "#999999"}


def timeline(found: Timeline, estimate: Estimate, path: Path) -> None:
    """Memory over one window, stacked by kind, with what the allocator reserved and what the card has.

    path: its suffix says the format, .png, .svg or .pdf. Raises `MissingExtra` without matplotlib.
    """
    plt = pyplot()
    unit, word = (GIB, "GiB") if max(found.reserved) >= GIB else (MIB, "MiB")
    with plt.rc_context(_INK):
        figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    steps = range(len(found))
    layers = [[each / unit for each in found.held[kind]] for kind in KINDS]
    axes.stackplot(steps, *layers, labels=KINDS, colors=[_COLOURS[kind] for kind in KINDS], step="post", linewidth=0)
    axes.step(steps, [each / unit for each in found.reserved], where="post", color=_GREY, linewidth=1.2, label="reserved")
    top = max(found.reserved) / unit
    if estimate.budget_bytes / unit < 2.5 * top:
        axes.axhline(estimate.budget_bytes / unit, color="#D55E00", linestyle="--", linewidth=1.2, label="budget")
        top = max(top, estimate.budget_bytes / unit)
    axes.set_ylim(0, top * 1.15)
    axes.set_xlim(0, len(found))
    sizes = estimate.micro_batches
    last = float("-inf")
    for event, phase, piece in found.marks:
        if phase in ("clip", "end"):
            continue
        axes.axvline(event, color="#888888", linewidth=0.5, linestyle=":")
        if event - last > len(found) * 0.08 or phase == "step":
            number = len(sizes) if piece == 2 else piece + 1  # the third that is simulated stands for the last
            axes.text(event, top * 1.13, " step" if phase == "step" else f" {phase} {number}", fontsize=8, va="top", color=_GREY)
            last = event
    part = "" if len(sizes) <= 3 else "\nits first two micro-batches, the last, and the step"
    axes.set_title(f"{estimate.name}, simulated: a window of {sum(sizes)} = {notation(sizes)}{part}", fontsize=10, loc="left")
    axes.set_xlabel("allocations and frees, in order")
    axes.set_ylabel(f"memory, {word}")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False, labelcolor=_GREY)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=150, transparent=True)
    plt.close(figure)


def search(plan: Plan, path: Path) -> None:
    """What was tried: peak against micro-batch with the budget, and beside it time per sample where at least three sizes were timed.

    path: its suffix says the format, .png, .svg or .pdf. Raises `UsageError` for another one, `MissingExtra` without matplotlib.
    """
    check(path)
    plt = pyplot()
    unit, word = (GIB, "GiB") if plan.budget_bytes >= GIB else (MIB, "MiB")
    tried = {(each.micro_batch, each.outcome == "fits"): each for each in plan.trials}
    timed = {each.micro_batch: each for each in plan.trials if each.samples_per_second and (each.full or plan.objective != "throughput")}
    panels = 2 if len(timed) >= 3 else 1
    with plt.rc_context(_INK):
        figure, found = plt.subplots(1, panels, figsize=(5.2 * panels + 1.0, 3.8), layout="constrained", squeeze=False)
        axes = found[0][0]
        fits = sorted((each for each in tried.values() if each.outcome == "fits" and each.peak_bytes), key=lambda each: each.micro_batch)
        over = [each for each in tried.values() if each.outcome != "fits"]
        farthest = max((each.micro_batch for each in tried.values()), default=plan.micro_batch) * 1.08
        if len(fits) > 1:
            small, large = fits[0], fits[-1]
            slope = ((large.peak_bytes or 0) - (small.peak_bytes or 0)) / (large.micro_batch - small.micro_batch)
            line = [((small.peak_bytes or 0) + slope * (size - small.micro_batch)) / unit for size in (0, farthest)]
            axes.plot([0, farthest], line, color=_SEEN, linewidth=1, linestyle=":", label="line through what fitted")
        axes.scatter([each.micro_batch for each in fits], [(each.peak_bytes or 0) / unit for each in fits], color=_SEEN, s=28, label="fits", zorder=3)
        axes.scatter(
            [each.micro_batch for each in over],
            # What ran out saw but a part of its peak.
            [max(each.peak_bytes or 0, plan.budget_bytes) / unit for each in over],
            color=_REFUSED, marker="x", s=42, label="does not fit", zorder=3,
        )  # fmt: skip
        if plan.peak_bytes is not None:
            axes.scatter([plan.micro_batch], [plan.peak_bytes / unit], facecolors="none", edgecolors=_CHOSEN, s=130, linewidths=2, label="chosen", zorder=4)
        axes.axhline(plan.budget_bytes / unit, color=_REFUSED, linestyle="--", linewidth=1.2, label="budget")
        axes.set(xlim=(0, farthest), ylim=(0, None), xlabel="micro-batch, samples", ylabel=f"peak, {word}")
        axes.legend(fontsize=8, frameon=False, loc="lower right")
        if panels == 2:
            beside, sizes = found[0][1], sorted(timed)
            beside.plot(sizes, [1000 / (timed[size].samples_per_second or 1) for size in sizes], color=_SEEN, marker="o", markersize=5, linewidth=1)
            if plan.micro_batch in timed:
                at = 1000 / (timed[plan.micro_batch].samples_per_second or 1)
                beside.scatter([plan.micro_batch], [at], facecolors="none", edgecolors=_CHOSEN, s=130, linewidths=2, zorder=4)
            beside.set(
                xlim=(0, max(sizes) * 1.08),
                ylim=(0, 1150 / min(each.samples_per_second or 1 for each in timed.values())),
                xlabel="micro-batch, samples",
                ylabel="time per sample, ms",
            )
        for each in found[0]:
            each.spines[["top", "right"]].set_visible(False)
        figure.suptitle(f"{plan.target_batch} = {notation(plan.micro_batches)} on {plan.device.name}", fontsize=10, x=0.01, ha="left")
        figure.savefig(path, dpi=150, transparent=True)
        plt.close(figure)


# Legible on white and on black alike: a grey of 4.5 to 1 against either, and no background.
_GREY = "#767676"
_INK = {
    "text.color": _GREY, "axes.labelcolor": _GREY, "axes.edgecolor": _GREY, "xtick.color": _GREY, "ytick.color": _GREY, "svg.fonttype": "none",
}  # fmt: skip
_SEEN, _REFUSED, _CHOSEN = "#2f8fd0", "#D55E00", "#009E73"


def check(path: Path) -> None:
    """Raises `UsageError` for a file that no picture can be written to."""
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise UsageError(f"a picture is a .png, .svg or .pdf, not {str(path)!r}")


def pyplot() -> Any:
    """matplotlib's, drawing to files. Raises `MissingExtra` without it."""
    try:
        import matplotlib
    except ImportError:
        raise MissingExtra("pictures need matplotlib: pip install 'autoaccum[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt
