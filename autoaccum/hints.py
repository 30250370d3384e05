"""What would be easier: equal splits, and targets that have one."""

from __future__ import annotations

import math
from collections.abc import Iterator

from autoaccum import plan, search
from autoaccum.devices.cpu import STEADY_MALLOC
from autoaccum.explaining import notation


def hints(
    found: search.Found,
    sizes: tuple[int, ...],
    *,
    equal: bool,
    most_allowed: int | None,
    smallest: int,
    for_command: bool,
    steady: bool,
    equal_is: str = "--equal",
) -> Iterator[str]:
    """Sentences for the report of a plan.

    found: what the search found. sizes: the plan's micro-batches. equal: whether only equal ones were asked
    for. most_allowed: the largest that was allowed. smallest: the smallest that the job's layers allow.
    equal_is: how the caller says that. for_command: a foreign script, whose micro-batches are equal always; steady: it ran with a steady malloc.
    """
    target, most = sum(sizes), found.largest_fit
    if for_command and steady and len(sizes) > 1:
        settings = " ".join(f"{name}={value}" for name, value in STEADY_MALLOC.items())
        yield f"measured with {settings} in the environment, which makes freed memory go back at once: set them for training too"
    if equal:
        # How much fits between the answer and the next divisor is known only where something predicts it.
        above = (found.smallest_refused or target + 1) - 1
        most = min(max(most, found.predicted_largest or above), most_allowed or target)
        fewest = math.ceil(target / most)
        if len(sizes) > fewest and (better := easier_targets(target, most, smallest)):
            uneven = "" if for_command else f" without {equal_is} {target} is {notation(plan.micro_batches(target, fewest))}, and"
            yield f"{why_unequal(target)}: equal micro-batches cost {len(sizes)} steps; as far as it fits,{uneven} easier targets are {better}"
    elif sizes[0] != sizes[-1]:
        split = equal_split(target, most, smallest)
        if split is not None:
            better = easier_targets(target, most, smallest) if split[1] > 2 * len(sizes) else ""
            yield f"frameworks need equal micro-batches: {equal_is} gives {split[0]} x {split[1]}" + (f"; easier targets are {better}" if better else "")


def equal_split(target: int, largest: int, smallest: int = 1) -> tuple[int, int] | None:
    """`(micro_batch, steps)` of equal micro-batches of at most `largest`, by fewest steps; None if there is none."""
    allowed = search.sizes(target, smallest=smallest, most=largest, equal=True)
    return (allowed[-1], target // allowed[-1]) if allowed else None


def easier_targets(target: int, largest: int, smallest: int = 1) -> str:
    """The nearest targets, below and above, that split equally in about as few steps as `largest` allows.

    In words: `"126 = 42 x 3 and 128 = 32 x 4"`; empty if there are none within a tenth.
    """
    fewest = math.ceil(target / largest)
    found: list[str] = []
    for direction in (-1, 1):
        for away in range(1, max(target // 10, 1) + 1):
            near = target + direction * away
            split = equal_split(near, largest, smallest) if near >= 1 else None
            if split is not None and split[1] <= fewest + max(1, fewest // 4):
                found.append(f"{near} = {split[0]} x {split[1]}")
                break
    return " and ".join(found)


def why_unequal(target: int) -> str:
    """`"127 is prime"`, or that its divisors are few."""
    prime = target > 1 and all(target % divisor for divisor in range(2, math.isqrt(target) + 1))
    return f"{target} is prime" if prime else f"{target} has few divisors"
