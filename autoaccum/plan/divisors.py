"""Equal micro-batches: which targets split into them, and which near targets split better."""

from __future__ import annotations

import math

from autoaccum.plan import arithmetic


def equal_split(target: int, largest: int, smallest: int = 1) -> tuple[int, int] | None:
    """`(micro_batch, steps)`: the split into equal micro-batches with the fewest steps; None if there is none.

    largest, smallest: bounds of the micro-batch.
    """
    allowed = arithmetic.candidate_sizes(target, smallest=smallest, most=largest, equal=True)
    return (allowed[-1], target // allowed[-1]) if allowed else None


def easier_targets(target: int, largest: int, smallest: int = 1) -> str:
    """The nearest targets, below and above, that split equally in about as few steps as `largest` allows.

    In words: `"126 = 42 x 3 and 128 = 32 x 4"`; empty if there is none within a tenth of the target.
    """
    fewest = math.ceil(target / largest)
    splits: list[str] = []
    for direction in (-1, 1):
        for away in range(1, max(target // 10, 1) + 1):
            near = target + direction * away
            split = equal_split(near, largest, smallest) if near >= 1 else None
            if split is not None and split[1] <= fewest + max(1, fewest // 4):
                splits.append(f"{near} = {split[0]} x {split[1]}")
                break
    return " and ".join(splits)


def why_unequal(target: int) -> str:
    """The reason in words: `"127 is prime"`, or that the target has few divisors."""
    prime = target > 1 and all(target % divisor for divisor in range(2, math.isqrt(target) + 1))
    return f"{target} is prime" if prime else f"{target} has few divisors"
