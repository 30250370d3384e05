"""The hints below a plan: sentences about settings that would be easier."""

from __future__ import annotations

import math
from collections.abc import Iterator

from autoaccum.devices import STEADY_MALLOC
from autoaccum.plan import arithmetic, easier_targets, equal_split, why_unequal, window_notation
from autoaccum.probe import search


def cost_of_equal(
    found: search.SearchResult, sizes: tuple[int, ...], *, most_allowed: int | None, smallest: int, for_command: bool, equal_is: str
) -> Iterator[str]:
    """Yields a sentence if equal micro-batches cost steps: how many, and which targets near by would not.

    most_allowed: the largest micro-batch that the user allows. The other arguments are those of `hints`.
    """
    target = sum(sizes)
    # No trial ran between the answer and the next divisor. Only a prediction says how much fits there.
    above = (found.smallest_refused or target + 1) - 1
    most = min(max(found.largest_fit, found.predicted_largest or above), most_allowed or target)
    fewest = math.ceil(target / most)
    if len(sizes) > fewest and (better := easier_targets(target, most, smallest)):
        uneven = "" if for_command else f" without {equal_is} {target} is {window_notation(arithmetic.micro_batches(target, fewest))}, and"
        yield f"{why_unequal(target)}: equal micro-batches cost {len(sizes)} steps; as far as it fits,{uneven} easier targets are {better}"


def hints(
    found: search.SearchResult,
    sizes: tuple[int, ...],
    *,
    equal: bool,
    smallest: int,
    for_command: bool,
    steady: bool,
    equal_is: str = "--equal",
) -> Iterator[str]:
    """Yields the hints of a plan.

    found: the result of the search. sizes: the plan's micro-batches. equal: True if only equal micro-batches are allowed.
    smallest: the smallest micro-batch that the job's layers allow.
    for_command: True for a foreign command, whose micro-batches are always equal. steady: True if it ran with a steady malloc.
    equal_is: how the caller writes the option for equal micro-batches.
    """
    target, most = sum(sizes), found.largest_fit
    if for_command and steady:
        settings = " ".join(f"{name}={value}" for name, value in STEADY_MALLOC.items())
        yield f"measured with {settings} in the environment, which makes freed memory go back at once: set them for training too"
    if not equal and sizes[0] != sizes[-1]:
        split = equal_split(target, most, smallest)
        if split is not None:
            better = easier_targets(target, most, smallest) if split[1] > 2 * len(sizes) else ""
            yield f"frameworks need equal micro-batches: {equal_is} gives {split[0]} x {split[1]}" + (f"; easier targets are {better}" if better else "")
