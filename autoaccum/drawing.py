"""A simulated window as a file: a picture, or a snapshot for PyTorch's memory viewer."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

from autoaccum import plot, profiles
from autoaccum.errors import NothingFits
from autoaccum.estimating import Estimates
from autoaccum.simulate import tape, timeline
from autoaccum.simulate.allocator import Allocator
from autoaccum.simulate.settings import from_environment


def ready(path: Path) -> None:
    """Raises `UsageError` and `MissingExtra` where no picture could be drawn in the end."""
    plot.check(path)
    plot.pyplot()


def draw(found: Estimates, path: Path) -> None:
    """The window of the one card that was estimated. Raises `NothingFits` where there is none, `MissingExtra` without matplotlib."""
    (estimate,) = found.gpus
    if not estimate.fits or found.tape is None:
        raise NothingFits(f"there is no window to draw: not even one sample fits {estimate.name}", budget_bytes=estimate.budget_bytes)
    card, window = profiles.load(estimate.gpu) if estimate.gpu in profiles.names() else None, tape.from_json(found.tape)
    total = card.total_bytes if card is not None else estimate.total_bytes
    settings = replace(from_environment(), memory_fraction=None)  # that the window fits has been seen
    allocator = Allocator(total, settings=settings, name=estimate.name)
    if path.suffix == ".pickle":
        # The viewer's own format is a pickle of plain lists, dicts, numbers and strings; it is written here, never read.
        path.write_bytes(pickle.dumps(timeline.snapshot(window, allocator)))
    else:
        plot.timeline(timeline.of(window, allocator), estimate, path)
