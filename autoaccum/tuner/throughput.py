"""The fastest of the exact plans that fit. A pure function of what timing them shows, as `search` is of what fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from autoaccum.probe import Reading

WINDOWS = 4  # that one timing runs: the first warms up, and the others' median counts
_ALIKE = 1.02  # times that differ by less are the same
_SLOWER = 1.15  # two in a row that are this much slower than the best end the search
_MOST = 8  # sizes


def fastest(timed: Callable[[int], Reading], smaller: Sequence[int], first: Reading) -> Reading:
    """The reading of the fastest whole window; of those that are about as fast, the one with the lowest peak.

    timed: runs and times the whole window at a micro-batch. smaller: the micro-batches below the first's that may be tried, ascending.
    first: of the largest that fits, timed already.
    """
    readings, slower = [first], 0
    size = first.micro_batch
    while slower < 2 and len(readings) < _MOST and (below := [each for each in smaller if each <= 0.9 * size]):
        # About a fifth smaller, and if there is one near, a multiple of eight, which tensor cores like.
        near = [each for each in below if each > 0.7 * size] or below[-1:]
        size = min(near, key=lambda each: (each % 8 != 0, abs(each - 0.8 * size)))
        reading = timed(size)
        if reading.fits:  # what did not fit while it was timed is no answer
            readings.append(reading)
            slower = slower + 1 if _seconds(reading) > _SLOWER * min(map(_seconds, readings)) else 0
    best = min(map(_seconds, readings))
    return min((each for each in readings if _seconds(each) <= _ALIKE * best), key=lambda each: each.peak_bytes or 0)


def _seconds(reading: Reading) -> float:
    return reading.window_seconds or float("inf")
