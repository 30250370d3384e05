"""The picture of a search. Only this file imports matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from autoaccum.errors import MissingExtra, UsageError
from autoaccum.plan.notation import window_notation
from autoaccum.plan.record import PlanRecord
from autoaccum.units import GIB, MIB


def draw_search(plan: PlanRecord, path: Path) -> None:
    """Draws the search: peak against micro-batch, with the budget.

    If at least three sizes were timed, a second panel shows time per sample against micro-batch.
    path: its suffix sets the format: .png, .svg or .pdf. Raises `UsageError` for another suffix, `MissingExtra` without matplotlib.
    """
    check(path)
    plt = pyplot()
    unit, word = (GIB, "GiB") if plan.budget_bytes >= GIB else (MIB, "MiB")
    tried = {(each.micro_batch, each.outcome == "fits"): each for each in plan.trials}
    timed = {each.micro_batch: each for each in plan.trials if each.samples_per_second and (each.full or plan.objective != "throughput")}
    panels = 2 if len(timed) >= 3 else 1
    with plt.rc_context(INK):
        figure, grid = plt.subplots(1, panels, figsize=(5.2 * panels + 1.0, 3.8), layout="constrained", squeeze=False)
        axes = grid[0][0]
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
            # After an out-of-memory only a part of the peak is known.
            [max(each.peak_bytes or 0, plan.budget_bytes) / unit for each in over],
            color=_REFUSED, marker="x", s=42, label="does not fit", zorder=3,
        )  # fmt: skip
        if plan.peak_bytes is not None:
            axes.scatter([plan.micro_batch], [plan.peak_bytes / unit], facecolors="none", edgecolors=_CHOSEN, s=130, linewidths=2, label="chosen", zorder=4)
        axes.axhline(plan.budget_bytes / unit, color=_REFUSED, linestyle="--", linewidth=1.2, label="budget")
        axes.set(xlim=(0, farthest), ylim=(0, None), xlabel="micro-batch, samples", ylabel=f"peak, {word}")
        axes.legend(fontsize=8, frameon=False, loc="lower right")
        if panels == 2:
            right, sizes = grid[0][1], sorted(timed)
            right.plot(sizes, [1000 / (timed[size].samples_per_second or 1) for size in sizes], color=_SEEN, marker="o", markersize=5, linewidth=1)
            if plan.micro_batch in timed:
                at = 1000 / (timed[plan.micro_batch].samples_per_second or 1)
                right.scatter([plan.micro_batch], [at], facecolors="none", edgecolors=_CHOSEN, s=130, linewidths=2, zorder=4)
            right.set(
                xlim=(0, max(sizes) * 1.08),
                ylim=(0, 1150 / min(each.samples_per_second or 1 for each in timed.values())),
                xlabel="micro-batch, samples",
                ylabel="time per sample, ms",
            )
        for each in grid[0]:
            each.spines[["top", "right"]].set_visible(False)
        figure.suptitle(f"{plan.target_batch} = {window_notation(plan.micro_batches)} on {plan.device.name}", fontsize=10, x=0.01, ha="left")
        figure.savefig(path, dpi=150, transparent=True)
        plt.close(figure)


# Readable on white and on black: a grey with a contrast of 4.5 to 1 to both, and no background.
GREY = "#767676"
INK = {
    "text.color": GREY, "axes.labelcolor": GREY, "axes.edgecolor": GREY, "xtick.color": GREY, "ytick.color": GREY, "svg.fonttype": "none",
}  # fmt: skip
_SEEN, _REFUSED, _CHOSEN = "#2f8fd0", "#D55E00", "#009E73"


def check(path: Path) -> None:
    """Raises `UsageError` if the suffix of the file is not a picture format."""
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise UsageError(f"a picture is a .png, .svg or .pdf, not {str(path)!r}")


def pyplot() -> Any:
    """matplotlib's pyplot, set to draw to files. Raises `MissingExtra` without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise MissingExtra("pictures need matplotlib: pip install 'autoaccum[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt
