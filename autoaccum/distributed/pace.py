"""`Pace`: how long each rank computes in windows that are voted on, and the shares that follow from it."""

from __future__ import annotations

import logging
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from autoaccum.distributed.fleet import Fleet
from autoaccum.distributed.ranks import Ranks
from autoaccum.distributed.speed_curves import AffineCurve
from autoaccum.distributed.timings import Timing, alike
from autoaccum.errors import NothingFits, PlanError

log = logging.getLogger("autoaccum")
_WAITING = 0.1  # of a window that the quickest rank may wait for the slowest before shares are made anew
_WORTH = 0.95  # of the slowest rank's time; what gains less is not worth other shares
_LAST = 3  # voted windows whose median counts


class Pace:
    """The times of this rank's voted windows. All ranks call `agree` together, after each voted window.

    gpu: the name of this rank's device. pairs: as in `Fleet`.
    every: make shares anew after so many windows; None if a rank waits too long.
    """

    def __init__(self, ranks: Ranks, fleet: Fleet, gpu: str, *, learned: bool, pairs: bool, every: int | None) -> None:
        self._ranks, self.fleet, self._gpu, self._pairs, self._every = ranks, fleet, gpu, pairs, every
        self._timings: deque[Timing] = deque(maxlen=32)
        self.learned = learned  # False while ranks still look for their largest micro-batches, so that curves are not known yet
        self._windows = self._late = self._replanned_at = 0

    def note(self, steps: int, samples: int, seconds: float) -> None:
        """Takes the time that this rank computed in a voted window: its micro-steps, its samples, and the seconds until its gradients were there."""
        self._windows += 1
        if self._windows > 1 and samples:  # the first one loads libraries
            self._timings.append((steps, samples, seconds))

    def agree(self, *, settled: bool, most: int, windows: int) -> Fleet | None:
        """The ranks with new shares, if all ranks make them now; None if shares stay.

        settled: this rank knows its largest micro-batch, `most`. windows: how many have run.
        """
        own = statistics.median([seconds for _, _, seconds in list(self._timings)[-_LAST:]]) if self._timings else 0.0
        table = self._ranks.table([settled, bool(self._timings) or not self.fleet.shares[self._ranks.rank], own], "comparing its pace")
        if not all(row[0] and row[1] for row in table):
            return None
        if not self.learned:
            return self._solved(most, alike(self._ranks.gathered((self._gpu, most, list(self._timings)), "sharing windows out")))
        times = [row[2] for row, share in zip(table, self.fleet.shares) if share]
        self._late = self._late + 1 if min(times) < (1 - _WAITING) * max(times) else 0
        due = self._late >= _LAST if self._every is None else windows - self._replanned_at >= self._every
        if not due:
            return None
        self._late, self._replanned_at = 0, windows
        return self._solved(most, [_at_pace(curve, row[2], share) for curve, row, share in zip(self.fleet.curves, table, self.fleet.shares)], max(times))

    def _solved(self, most: int, curves: Sequence[AffineCurve], slowest: float | None = None) -> Fleet | None:
        largest = self._ranks.gathered(most, "sharing windows out")
        curves = [replace(curve, most=size) for curve, size in zip(curves, largest)]
        try:
            fleet = Fleet.planned(curves, self.fleet.target, pairs=self._pairs)
        except (NothingFits, PlanError):
            return None
        self._timings.clear()
        if slowest is not None and fleet.seconds() > _WORTH * slowest:
            return None
        if fleet.shares != self.fleet.shares and self.learned and self._ranks.rank == 0:
            log.warning("windows are shared out as %s over the ranks now, %.3g s each", " + ".join(map(str, fleet.shares)), fleet.seconds())
        self.fleet = fleet
        return fleet


def _at_pace(curve: AffineCurve, seconds: float, share: int) -> AffineCurve:
    """The curve of a rank that takes `seconds` for its share now."""
    usual = curve.seconds(share) - curve.window_seconds
    if not share or usual <= 0 or seconds <= 0:
        return curve
    times = seconds / usual
    return replace(curve, step_seconds=curve.step_seconds * times, sample_seconds=curve.sample_seconds * times)
