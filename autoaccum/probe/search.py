"""The fewest accumulation steps that fit. A pure function of a predicate; knows nothing of GPUs.

Only sizes that change the answer are tried: `ceil(target / k)`. Two small readings give a line
(peak = fixed + per_sample x micro-batch); the line proposes a size, a reading decides, and what is left
between the largest size that fitted and the smallest that did not is searched until nothing is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from autoaccum.errors import PlanError


class PeakReading(Protocol):
    """What the search reads of a trial's `Reading`."""

    @property
    def micro_batch(self) -> int: ...
    @property
    def accumulation_steps(self) -> int: ...
    @property
    def fits(self) -> bool: ...
    @property
    def peak_bytes(self) -> int | None: ...
    @property
    def activation_bytes(self) -> int | None: ...
    @property
    def base_bytes(self) -> int | None: ...


@dataclass(frozen=True)
class SearchResult:
    """What the search found.

    micro_batch, accumulation_steps: the answer; zero where nothing fits.
    largest_fit: the largest size that ran and fitted. smallest_refused: the smallest above it that did not,
    None if none was refused. predicted_refusal: a larger size that was not run because nothing would have
    stopped it and the line put it above the budget. predicted_largest: where the line puts the largest size
    that fits; a guess, for hints only.
    """

    micro_batch: int
    accumulation_steps: int
    largest_fit: int
    smallest_refused: int | None
    predicted_refusal: int | None = None
    predicted_largest: int | None = None


class _Line:
    """Peaks of forward and backward so far, and what they predict."""

    def __init__(self, gradient_bytes: int) -> None:
        self._gradient_bytes = gradient_bytes
        self._peaks: dict[int, float] = {}  # with gradients resident
        self.base: float | None = None

    def add(self, reading: PeakReading, budget: int) -> None:
        # Forward and backward grow with the size; an optimizer's step that peaks above them would bend the line.
        seen = reading.activation_bytes or reading.peak_bytes
        if not seen or not (reading.fits or reading.activation_bytes or seen > budget):
            return  # an out-of-memory saw only a part of its peak
        alone = reading.accumulation_steps == 1
        self._peaks[reading.micro_batch] = seen + (self._gradient_bytes if alone else 0)
        if reading.base_bytes is not None and not alone:
            self.base = float(reading.base_bytes)

    def slope_and_fixed(self) -> tuple[float, float] | None:
        """Of the line through the largest reading and the nearest one of at most half its size.

        The nearest follows memory that bends; a closer one would turn noise into slope.
        """
        known = sorted(self._peaks)
        if len(known) >= 2:
            high = known[-1]
            low = max((size for size in known if size <= high / 2), default=known[0])
            slope = (self._peaks[high] - self._peaks[low]) / (high - low)
            if slope > 0:
                return slope, self._peaks[high] - slope * high
            # Allocators round: two small sizes may look alike. The smallest reading bounds the slope.
        if known and self.base is not None and self._peaks[known[-1]] > self.base:
            return (self._peaks[known[-1]] - self.base) / known[-1], self.base
        return None

    def peak(self, size: int, *, resident: bool) -> float | None:
        line = self.slope_and_fixed()
        if line is None:
            return None
        return line[1] + line[0] * size - (0 if resident else self._gradient_bytes)

    def most(self, budget: float) -> float | None:
        """The largest size below the budget, with gradients resident."""
        line = self.slope_and_fixed()
        return None if line is None else (budget - line[1]) / line[0]

    def least(self, size: int) -> float:
        """The least that a larger size may peak at: the flattest piece between readings, drawn on from the last."""
        known = sorted(self._peaks)
        if len(known) < 2:
            return 0.0
        slopes = [(self._peaks[high] - self._peaks[low]) / (high - low) for low, high in itertools.pairwise(known)]
        return self._peaks[known[-1]] + max(min(slopes), 0.0) * (size - known[-1])

    @property
    def farthest(self) -> int:
        return max(self._peaks, default=0)

    @property
    def readings(self) -> int:
        return len(self._peaks)


def largest(
    fits: Callable[[int, int], PeakReading],
    target: int,
    candidates: Sequence[int],
    *,
    budget_bytes: Callable[[], int],
    gradient_bytes: int = 0,
    daring: bool = True,
    start: int = 1,
    known: Sequence[PeakReading] = (),
) -> SearchResult:
    """The largest of `candidates` that fits, by few trials and fewer refusals.

    fits: runs one trial of `(micro_batch, accumulation_steps)` and returns its reading.
    candidates: ascending, from `sizes`. budget_bytes: the budget in force, read when a prediction is made.
    gradient_bytes: what gradients held between micro-batches add to the peak; with one step there are none,
    so a window in one piece is a case of its own and may fit where two halves do not.
    start: about the size to begin with. daring: False if a size that is predicted above the budget must not be run, because nothing would stop it.
    known: readings of earlier searches, also of sizes that are no candidates: what they settle is not run again.
    Raises `PlanError` without candidates.
    """
    if not candidates:
        raise PlanError(f"no micro-batch is allowed for a target batch of {target}")
    line = _Line(gradient_bytes)
    whole = candidates[-1] == target  # the window in one piece is among them
    tried: dict[int, PeakReading] = {}
    for reading in known:
        line.add(reading, budget_bytes())
        if reading.micro_batch in candidates and (reading.accumulation_steps == 1) == (reading.micro_batch == target):
            tried[reading.micro_batch] = reading

    def run(index: int) -> bool:
        size = candidates[index]
        reading = tried[size] = fits(size, math.ceil(target / size))
        line.add(reading, budget_bytes())
        return reading.fits

    def dares(index: int) -> bool:
        if daring:
            return True
        size = candidates[index]
        predicted = line.peak(size, resident=size != target)
        return predicted is None or predicted <= budget_bytes()

    # candidates[low] fitted, candidates[high] did not
    low = max((index for index, size in enumerate(candidates) if _settled(size, target, known) is True), default=-1) if known else -1
    high = next((index for index in range(low + 1, len(candidates)) if known and _settled(candidates[index], target, known) is False), len(candidates))
    predicted_refusal: int | None = None
    missed = 0  # predictions in a row that were refused
    while high - low > 1:
        size = _next(candidates, low, high, line, budget_bytes(), target, missed, start)
        if not dares(size):
            predicted_refusal = candidates[size]
            high = size
            continue
        if run(size):
            # A size that fits settles all below it, also one that was refused: readings need not be monotone.
            low, missed = size, 0
            high = max(high, low + 1)
        else:
            missed += 1
            if whole and size == len(candidates) - 1 and size - low > 1:
                # The whole window failed in one piece. That says nothing of smaller ones until they are asked.
                missed -= 1
            high = size
    if whole and high < len(candidates) - 1 and target not in tried and _settled(target, target, known) is None:
        # Fewer steps may still fit where more did not: in one piece no gradients are resident.
        possible = line.least(target) - gradient_bytes <= budget_bytes()
        if (possible or low < 0) and dares(len(candidates) - 1) and run(len(candidates) - 1):
            low = len(candidates) - 1
    if low < 0:
        return SearchResult(0, 0, 0, min(tried, default=None), predicted_refusal)
    answer = candidates[low]
    refused = [each.micro_batch for each in (*tried.values(), *known) if not each.fits and each.micro_batch > answer]
    most = line.most(budget_bytes())
    guess = None if most is None else max(answer, min(int(most), min(refused, default=target + 1) - 1))
    return SearchResult(answer, math.ceil(target / answer), answer, min(refused, default=None), predicted_refusal, guess)


def _settled(size: int, target: int, known: Sequence[PeakReading]) -> bool | None:
    """What earlier readings say of a size: a larger one that fits settles it, also with more beside it; else a smaller one that does not.

    None if they say nothing. Holding no gradients, the window in one piece says nothing good of smaller sizes, nor they anything bad of it.
    """
    alone = size == target
    if any(each.fits and each.micro_batch >= size and (alone or each.accumulation_steps > 1) for each in known):
        return True
    if any(not each.fits and each.micro_batch <= size and (not alone or each.accumulation_steps == 1) for each in known):
        return False
    return None


# How far a line may be trusted beyond the largest size that it was drawn through.
_REACH = 32


def _next(candidates: Sequence[int], low: int, high: int, line: _Line, budget: float, target: int, missed: int, start: int) -> int:
    """Index of the size to try next, strictly between `low` and `high`."""

    def at_most(size: float) -> int:
        index = low + 1
        while index + 1 < high and candidates[index + 1] <= size:
            index += 1
        return index

    if high == len(candidates) and (low < 0 or not line.readings):
        return at_most(start)  # a small one first: cheap, and all that is needed where nothing fits
    if low < 0:
        return (low + high) // 2
    guess = line.most(budget)
    if line.readings == 1 and missed == 0:
        # A second reading, as far out as it can hardly fail: what the first one cost beyond its sample makes
        # the guess a cautious one, and a reading too near would turn noise into slope.
        first = candidates[low]
        likely = (8.0 if first == 1 else 4.0) * first if guess is None else max(0.75 * guess, min(guess, 16 * first), 2 * first)
        return at_most(min(likely, _REACH * first))
    if guess is None:  # a flat line promises nothing: the geometric middle
        return at_most(math.sqrt(candidates[low] * candidates[min(high, len(candidates) - 1)]))
    if missed >= 2:
        return (low + high) // 2
    if high == len(candidates) and candidates[-1] == target:
        alone = line.peak(target, resident=False)
        if alone is not None and alone <= budget and target <= _REACH * line.farthest:
            return high - 1  # one piece, no accumulation: nothing beats it
    if missed == 1:
        # The line was wrong by one miss: halfway between what fitted and what it promised.
        return at_most((candidates[low] + min(guess, candidates[high])) / 2) if high - low > 2 else low + 1
    return at_most(min(guess, _REACH * line.farthest))
