"""The search for the fastest plan that fits. It is a pure function of timings, as `search` is a pure function of readings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from autoaccum.probe import Reading

WINDOWS = 4  # windows in one timing: the first warms up, and the median of the others counts
_EQUAL_FACTOR = 1.02  # times that differ by a smaller factor count as equal
_SLOWER_FACTOR = 1.15  # two sizes in a row that are slower than the best by this factor end the search
_MAX_SIZES = 8  # sizes to time


def fastest(timed: Callable[[int], Reading], smaller: Sequence[int], first: Reading) -> Reading:
    """The reading of the fastest whole window. If several windows are about as fast, the one with the lowest peak.

    timed: runs the whole window at a micro-batch and returns its reading, with its time.
    smaller: the micro-batches below `first` that may be tried, ascending.
    first: the reading of the largest micro-batch that fits, already timed.
    """
    readings, slower = [first], 0
    size = first.micro_batch
    while slower < 2 and len(readings) < _MAX_SIZES and (below := [each for each in smaller if each <= 0.9 * size]):
        # The next size is about a fifth smaller. A multiple of eight is preferred, because tensor cores run it faster.
        near = [each for each in below if each > 0.7 * size] or below[-1:]
        size = min(near, key=lambda each: (each % 8 != 0, abs(each - 0.8 * size)))
        reading = timed(size)
        if reading.fits:  # a size that did not fit while it was timed cannot be the answer
            readings.append(reading)
            slower = slower + 1 if _seconds(reading) > _SLOWER_FACTOR * min(map(_seconds, readings)) else 0
    best = min(map(_seconds, readings))
    return min((each for each in readings if _seconds(each) <= _EQUAL_FACTOR * best), key=lambda each: each.peak_bytes or 0)


def _seconds(reading: Reading) -> float:
    return reading.window_seconds or float("inf")
