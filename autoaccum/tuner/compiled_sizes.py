"""Larger micro-batches of a compiled job: its search runs in eager mode, and what compiling saves is known from the confirming run.

Each size that is tried here is compiled, which may take minutes, so only a few are, and only those that need fewer steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from autoaccum.plan import arithmetic
from autoaccum.probe import Reading, search

_MOST_TRIALS = 4


def larger(
    confirm: Callable[[tuple[int, ...]], Reading | None],
    confirmed: Reading,
    candidates: Sequence[int],
    target: int,
    *,
    readings: Sequence[Reading],
    gradient_bytes: int,
    budget_bytes: int,
) -> Reading:
    """The reading of the largest of `candidates` whose whole window fits, compiled; `confirmed` if none above it does.

    confirm: runs the whole window of these micro-batches, compiled; None if its compiler refused. readings: of the search, in eager mode. gradient_bytes: as in `search.largest`.
    """
    line = search.Line(gradient_bytes)
    for reading in readings:
        if not reading.full:
            line.add(reading, budget_bytes)
    eager = line.slope_and_fixed()
    refused, misses = target + 1, 0
    for _ in range(_MOST_TRIALS):
        peak = confirmed.activation_bytes or confirmed.peak_bytes
        if eager is None or peak is None or misses == 2 or confirmed.accumulation_steps == 1:
            break
        slope = max(peak - eager[1], 0.0) / confirmed.micro_batch
        allowed = [
            size
            for size in candidates
            if confirmed.micro_batch < size < refused
            and math.ceil(target / size) < confirmed.accumulation_steps
            and eager[1] + slope * size - (gradient_bytes if size == target else 0) <= budget_bytes
        ]
        if not allowed:
            break
        larger_one = confirm(arithmetic.micro_batches(target, math.ceil(target / allowed[-1])))
        if larger_one is None:
            break
        if larger_one.fits:
            confirmed = larger_one
        else:
            refused, misses = allowed[-1], misses + 1
    return confirmed
