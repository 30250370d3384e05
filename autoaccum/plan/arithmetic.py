"""The arithmetic of a window: its micro-batches, the ranks' shares, and the sizes worth trying. Whole numbers only."""

from __future__ import annotations

import math

from autoaccum.errors import PlanError
from autoaccum.plan import arithmetic


def window_led_by(target: int, micro_batch: int) -> tuple[int, ...]:
    """A window in the fewest steps whose largest micro-batch is exactly this size."""
    steps = math.ceil(target / micro_batch)
    return arithmetic.micro_batches(target, 1) if steps == 1 else (micro_batch, *arithmetic.micro_batches(target - micro_batch, steps - 1))


def micro_batches(share: int, steps: int) -> tuple[int, ...]:
    """`share` samples in `steps` micro-batches that differ by at most one, larger first.

    Raises `PlanError` unless 1 <= steps <= share.
    """
    if not 1 <= steps <= share:
        raise PlanError(f"cannot make {steps} micro-batches of {share} samples: give between 1 and {share}")
    size, larger = divmod(share, steps)
    return (size + 1,) * larger + (size,) * (steps - larger)


def even_shares(target: int, world_size: int) -> tuple[int, ...]:
    """`target` samples over `world_size` ranks, differing by at most one, larger first; zero where ranks outnumber samples.

    Raises `PlanError` for a target or a world below one.
    """
    if target < 1 or world_size < 1:
        raise PlanError(f"a target batch of {target} over {world_size} ranks: both must be at least 1")
    size, larger = divmod(target, world_size)
    return (size + 1,) * larger + (size,) * (world_size - larger)


def candidate_sizes(target: int, *, smallest: int = 1, most: int | None = None, equal: bool = False, every: bool = False) -> list[int]:
    """Micro-batches worth trying for windows of `target` samples, ascending.

    smallest: no micro-batch of the window may be smaller. most: none may be larger. equal: only divisors.
    every: all sizes, for the exact largest one.
    """
    top = min(target, most or target)
    if equal:
        return [size for size in range(max(smallest, 1), top + 1) if target % size == 0]
    if every:
        return [size for size in range(smallest, top + 1) if target // math.ceil(target / size) >= smallest]
    found: list[int] = []
    size = top
    while size >= 1:
        steps = math.ceil(target / size)
        size = math.ceil(target / steps)  # the largest micro-batch of the window with these steps
        if target // steps >= smallest:
            found.append(size)
        # The next size down is that of the fewest steps which make it smaller.
        size -= 1
    return found[::-1]
