"""The arithmetic of a window: its micro-batches, the shares of the ranks, and the sizes to try. Integers only."""

from __future__ import annotations

import math

from autoaccum.errors import PlanError
from autoaccum.plan import arithmetic


def window_led_by(target: int, micro_batch: int) -> tuple[int, ...]:
    """The micro-batches of a window of `target` samples in the fewest steps, the largest of them exactly `micro_batch`."""
    steps = math.ceil(target / micro_batch)
    return arithmetic.micro_batches(target, 1) if steps == 1 else (micro_batch, *arithmetic.micro_batches(target - micro_batch, steps - 1))


def micro_batches(share: int, steps: int) -> tuple[int, ...]:
    """Splits `share` samples into `steps` micro-batches that differ by at most one, larger first.

    Raises `PlanError` unless 1 <= steps <= share.
    """
    if not 1 <= steps <= share:
        raise PlanError(f"cannot make {steps} micro-batches of {share} samples: give between 1 and {share}")
    size, larger = divmod(share, steps)
    return (size + 1,) * larger + (size,) * (steps - larger)


def even_shares(target: int, world_size: int) -> tuple[int, ...]:
    """Splits `target` samples over `world_size` ranks. Shares differ by at most one, larger first.

    If there are more ranks than samples, some shares are 0. Raises `PlanError` for a target or a world size below one.
    """
    if target < 1 or world_size < 1:
        raise PlanError(f"a target batch of {target} over {world_size} ranks: both must be at least 1")
    size, larger = divmod(target, world_size)
    return (size + 1,) * larger + (size,) * (world_size - larger)


def sizes_over_ranks(target: int, *, smallest: int = 1, most: int | None = None) -> list[int]:
    """Micro-batch sizes to try where a rank's share of `target` is not known yet, ascending: steps of about 6 %, and all that save a step."""
    top = min(target, most or target)
    sizes = set(candidate_sizes(target, smallest=smallest, most=top))
    size = smallest
    while size <= top:
        sizes.add(size)
        size += max(1, size // 16)
    return sorted(sizes | {top} if top >= smallest else sizes)


def candidate_sizes(target: int, *, smallest: int = 1, most: int | None = None, equal: bool = False, every: bool = False) -> list[int]:
    """Micro-batch sizes to try for windows of `target` samples, ascending.

    smallest: the lower bound for every micro-batch of the window. most: the upper bound.
    equal: True gives only divisors of the target.
    every: True gives all sizes, to find the exact largest one.
    """
    top = min(target, most or target)
    if equal:
        small = [size for size in range(1, math.isqrt(target) + 1) if target % size == 0]
        return [size for size in sorted({*small, *(target // size for size in small)}) if max(smallest, 1) <= size <= top]
    if every:
        return [size for size in range(smallest, top + 1) if target // math.ceil(target / size) >= smallest]
    sizes: list[int] = []
    size = top
    while size >= 1:
        steps = math.ceil(target / size)
        size = math.ceil(target / steps)  # the largest micro-batch of the window with these steps
        if target // steps >= smallest:
            sizes.append(size)
        # Starts the next size one lower: it gets the fewest steps that make it smaller.
        size -= 1
    return sizes[::-1]
