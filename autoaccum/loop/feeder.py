"""Micro-batches for a loop that is not ours, as large as is known to fit when their turn comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from autoaccum.data import Window
from autoaccum.loop.learner import Learner


class Fed(NamedTuple):
    """A micro-batch on the host. weight: of its mean loss in the window's. last: True if the window ends with it."""

    piece: Any
    samples: int
    weight: float
    last: bool


def fed(learner: Learner, window: Window, count: Callable[[Any], float] | None = None, *, stepped: Callable[[], bool] = lambda: True) -> Iterator[Fed]:
    """The micro-batches of a window, which the caller trains with one by one and steps after the last; their peaks are read in between.

    Nothing here can run a window again in another's loop, so no cap is set, and an out-of-memory comes through.
    count: as in `Plan.split`. What counts nothing is left out. stepped: says after the window if the optimizers stepped, which a scaler may skip.
    """
    learner.begin(beforehand=False, given=False)
    total = float(window.samples) if count is None else sum(float(count(part)) for part in window.parts)
    with learner.unguarded() as (watch, live_bytes):
        pieces = _counting(learner, window, count)
        current = next(pieces, None)
        while current is not None:
            upcoming = next(pieces, None)  # whether it is the last must be known before it runs
            index, piece, samples, counted = current
            watch.lap_bytes()
            base_bytes = live_bytes()
            yield Fed(piece, samples, counted / total, upcoming is None)
            if upcoming is not None or not learner.has_read(index):  # after the last one the optimizer has stepped, too, which may take more
                learner.read(index, watch.lap_bytes(), base_bytes)
            current = upcoming
    learner.end(window.samples, stepped=stepped())


def _counting(learner: Learner, window: Window, count: Callable[[Any], float] | None) -> Iterator[tuple[int, Any, int, float]]:
    for index, (piece, samples) in enumerate(learner.cut(window)):
        counted = float(samples) if count is None else float(count(piece))
        if counted:
            yield index, piece, samples, counted
