"""Pictures. matplotlib is imported here alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from autoaccum.errors import MissingExtra
from autoaccum.explaining import notation
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
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    steps = range(len(found))
    layers = [[each / unit for each in found.held[kind]] for kind in KINDS]
    axes.stackplot(steps, *layers, labels=KINDS, colors=[_COLOURS[kind] for kind in KINDS], step="post", linewidth=0)
    axes.step(steps, [each / unit for each in found.reserved], where="post", color="#444444", linewidth=1.2, label="reserved")
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
            axes.text(event, top * 1.13, " step" if phase == "step" else f" {phase} {number}", fontsize=8, va="top", color="#444444")
            last = event
    part = "" if len(sizes) <= 3 else "\nits first two micro-batches, the last, and the step"
    axes.set_title(f"{estimate.name}, simulated: a window of {sum(sizes)} = {notation(sizes)}{part}", fontsize=10, loc="left")
    axes.set_xlabel("allocations and frees, in order")
    axes.set_ylabel(f"memory, {word}")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def pyplot() -> Any:
    """matplotlib's, drawing to files. Raises `MissingExtra` without it."""
    try:
        import matplotlib
    except ImportError:
        raise MissingExtra("pictures need matplotlib: pip install 'autoaccum[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt
