"""Files of a simulated window: a picture, or a snapshot for PyTorch's memory viewer."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

from autoaccum.errors import NothingFits
from autoaccum.plan import GREY, INK, check, pyplot, window_notation
from autoaccum.simulate import KINDS, Allocator, Timeline, memory_snapshot, profiles, settings_from_environment, tape_from_json, timeline
from autoaccum.units import GIB, MIB
from autoaccum.virtual import Estimate, Estimates

# Distinct in grey and for readers with red-green colour blindness (after Okabe and Ito, jfly.uni-koeln.de/color).
_COLOURS = {"parameters": "#0072B2", "gradients": "#E69F00", "optimizer": "#009E73", "activations": "#CC79A7", "workspace": "#999999"}


def ready(path: Path) -> None:
    """Raises `UsageError` or `MissingExtra` if no picture can be drawn."""
    check(path)
    pyplot()


def draw(found: Estimates, path: Path) -> None:
    """Draws the window of the one estimated card. Raises `NothingFits` if no window fits, `MissingExtra` without matplotlib."""
    (estimate,) = found.gpus
    if not estimate.fits or found.tape is None:
        raise NothingFits(f"there is no window to draw: not even one sample fits {estimate.name}", budget_bytes=estimate.budget_bytes)
    card, window = profiles.load(estimate.gpu) if estimate.gpu in profiles.names() else None, tape_from_json(found.tape)
    total = card.total_bytes if card is not None else estimate.total_bytes
    settings = replace(settings_from_environment(), memory_fraction=None)  # the estimate has shown that the window fits
    allocator = Allocator(total, settings=settings, name=estimate.name)
    if path.suffix == ".pickle":
        # The viewer's own format is a pickle of plain lists, dicts, numbers and strings; it is written here, never read.
        path.write_bytes(pickle.dumps(memory_snapshot(window, allocator)))
    else:
        draw_timeline(timeline(window, allocator), estimate, path)


def draw_timeline(found: Timeline, estimate: Estimate, path: Path) -> None:
    """Draws memory over one window, stacked by kind, with the allocator's reserved bytes and the card's budget.

    path: its suffix is the format: .png, .svg or .pdf. Raises `MissingExtra` without matplotlib.
    """
    plt = pyplot()
    unit, word = (GIB, "GiB") if max(found.reserved) >= GIB else (MIB, "MiB")
    with plt.rc_context(INK):
        figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    steps = range(len(found))
    layers = [[nbytes / unit for nbytes in found.held[kind]] for kind in KINDS]
    axes.stackplot(steps, *layers, labels=KINDS, colors=[_COLOURS[kind] for kind in KINDS], step="post", linewidth=0)
    axes.step(steps, [nbytes / unit for nbytes in found.reserved], where="post", color=GREY, linewidth=1.2, label="reserved")
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
            number = len(sizes) if piece == 2 else piece + 1  # the third simulated micro-batch stands for the last
            axes.text(event, top * 1.13, " step" if phase == "step" else f" {phase} {number}", fontsize=8, va="top", color=GREY)
            last = event
    part = "" if len(sizes) <= 3 else "\nits first two micro-batches, the last, and the step"
    axes.set_title(f"{estimate.name}, simulated: a window of {sum(sizes)} = {window_notation(sizes)}{part}", fontsize=10, loc="left")
    axes.set_xlabel("allocations and frees, in order")
    axes.set_ylabel(f"memory, {word}")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False, labelcolor=GREY)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=150, transparent=True)
    plt.close(figure)
