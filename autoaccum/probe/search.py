"""The search for the largest micro-batch that fits, which needs the fewest accumulation steps.

It depends only on a function that runs a trial, and not on GPUs. It tries only sizes that change the answer: `ceil(target / k)`.
Two small readings give a line (peak = fixed + per_sample x micro-batch). The line proposes a size and a trial decides.
The search ends when no size is left between the largest that fitted and the smallest that did not.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from autoaccum.errors import PlanError


class PeakReading(Protocol):
    """The fields of a `Reading` that the search uses."""

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
    """The result of a search.

    micro_batch, accumulation_steps: the answer; zero if nothing fits.
    largest_fit: the largest size that ran and fitted.
    smallest_refused: the smallest larger size that ran and did not fit; None if there is none.
    predicted_refusal: a larger size that was not run, because the line predicts it above the budget and nothing would stop it.
    predicted_largest: the largest size that fits according to the line; a guess, for hints only.
    """

    micro_batch: int
    accumulation_steps: int
    largest_fit: int
    smallest_refused: int | None
    predicted_refusal: int | None = None
    predicted_largest: int | None = None


class Line:
    """The peaks of forward and backward so far, and the line through them that predicts the peak of other sizes."""

    def __init__(self, gradient_bytes: int) -> None:
        self._gradient_bytes = gradient_bytes
        self._peaks: dict[int, float] = {}  # with gradients resident
        self.base: float | None = None

    def add(self, reading: PeakReading, budget: int) -> None:
        # Only forward and backward grow with the size. The peak of the optimizer step, if it is higher, would bend the line.
        peak = reading.activation_bytes or reading.peak_bytes
        if not peak or not (reading.fits or reading.activation_bytes or peak > budget):
            return  # the trial ran out of memory before its peak
        one_piece = reading.accumulation_steps == 1
        self._peaks[reading.micro_batch] = peak + (self._gradient_bytes if one_piece else 0)
        if reading.base_bytes is not None and not one_piece:
            self.base = float(reading.base_bytes)

    def slope_and_fixed(self) -> tuple[float, float] | None:
        """Slope and intercept of the line through the largest reading and the largest one of at most half its size.

        A near reading follows a curve that bends. A reading nearer than half the size would turn noise into slope.
        """
        sizes = sorted(self._peaks)
        if len(sizes) >= 2:
            high = sizes[-1]
            low = max((size for size in sizes if size <= high / 2), default=sizes[0])
            slope = (self._peaks[high] - self._peaks[low]) / (high - low)
            if slope > 0:
                return slope, self._peaks[high] - slope * high
            # Allocators round, so two small sizes may have the same peak. Then the base and the largest reading give the slope.
        if sizes and self.base is not None and self._peaks[sizes[-1]] > self.base:
            return (self._peaks[sizes[-1]] - self.base) / sizes[-1], self.base
        return None

    def peak(self, size: int, *, resident: bool) -> float | None:
        """The predicted peak in bytes; None without a line. resident: True if gradients are held during the micro-batch."""
        line = self.slope_and_fixed()
        if line is None:
            return None
        return line[1] + line[0] * size - (0 if resident else self._gradient_bytes)

    def most(self, budget: float) -> float | None:
        """The predicted largest size within the budget, with gradients resident; None without a line."""
        line = self.slope_and_fixed()
        return None if line is None else (budget - line[1]) / line[0]

    def least(self, size: int) -> float:
        """A lower bound for the peak of a larger size: from the last reading on, the smallest slope between two readings."""
        sizes = sorted(self._peaks)
        if len(sizes) < 2:
            return 0.0
        slopes = [(self._peaks[high] - self._peaks[low]) / (high - low) for low, high in itertools.pairwise(sizes)]
        return self._peaks[sizes[-1]] + max(min(slopes), 0.0) * (size - sizes[-1])

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
    """The largest of `candidates` that fits, with few trials and as few refusals as possible.

    fits: runs one trial of `(micro_batch, accumulation_steps)` and returns its reading.
    target: the effective batch in samples. candidates: sizes in ascending order, from `plan.arithmetic.candidate_sizes`.
    budget_bytes: returns the current budget; called for each prediction.
    gradient_bytes: the memory of the gradients held between micro-batches, as part of the peak. With one accumulation step
    no gradients are held. So a window in one piece is a special case: it may fit even if two halves do not.
    daring: False if a size predicted above the budget must not run, because nothing would stop it.
    start: about the first size to try.
    known: readings of earlier searches, also of sizes that are not candidates. A size that they decide is not run again.
    Raises `PlanError` without candidates.
    """
    if not candidates:
        raise PlanError(f"no micro-batch is allowed for a target batch of {target}")
    line = Line(gradient_bytes)
    one_piece = candidates[-1] == target  # the candidates contain the window in one piece
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
    misses = 0  # consecutive predictions that did not fit
    while high - low > 1:
        size = _next(candidates, low, high, line, budget_bytes(), target, misses, start)
        if not dares(size):
            predicted_refusal = candidates[size]
            high = size
            continue
        if run(size):
            # All sizes below one that fits count as fitting, also a refused one: readings need not be monotone.
            low, misses = size, 0
            high = max(high, low + 1)
        else:
            misses += 1
            if one_piece and size == len(candidates) - 1 and size - low > 1:
                # The window in one piece did not fit. This says nothing about smaller sizes, so it does not count as a miss.
                misses -= 1
            high = size
    if one_piece and high < len(candidates) - 1 and target not in tried and _settled(target, target, known) is None:
        # The window in one piece may still fit, because it holds no gradients.
        possible = line.least(target) - gradient_bytes <= budget_bytes()
        if (possible or low < 0) and dares(len(candidates) - 1) and run(len(candidates) - 1):
            low = len(candidates) - 1
    if low < 0:
        return SearchResult(0, 0, 0, min(tried, default=None), predicted_refusal)
    answer = candidates[low]
    refused = [reading.micro_batch for reading in (*tried.values(), *known) if not reading.fits and reading.micro_batch > answer]
    predicted_size = line.most(budget_bytes())
    guess = None if predicted_size is None else max(answer, min(int(predicted_size), min(refused, default=target + 1) - 1))
    return SearchResult(answer, math.ceil(target / answer), answer, min(refused, default=None), predicted_refusal, guess)


def _settled(size: int, target: int, known: Sequence[PeakReading]) -> bool | None:
    """True if earlier readings show that the size fits, False if they show that it does not, None if they do not decide.

    A size fits if the same or a larger one fitted. It does not fit if the same or a smaller one did not.
    The window in one piece holds no gradients. So its fit does not count for smaller sizes, and their refusals do not count for it.
    """
    one_piece = size == target
    if any(reading.fits and reading.micro_batch >= size and (one_piece or reading.accumulation_steps > 1) for reading in known):
        return True
    if any(not reading.fits and reading.micro_batch <= size and (not one_piece or reading.accumulation_steps == 1) for reading in known):
        return False
    return None


# The line is trusted up to this factor beyond the largest size that it goes through.
_REACH = 32


def _next(candidates: Sequence[int], low: int, high: int, line: Line, budget: float, target: int, misses: int, start: int) -> int:
    """The index of the size to try next, strictly between `low` and `high`. misses: consecutive predictions that did not fit."""

    def at_most(size: float) -> int:
        index = low + 1
        while index + 1 < high and candidates[index + 1] <= size:
            index += 1
        return index

    if high == len(candidates) and (low < 0 or not line.readings):
        return at_most(start)  # start small: it is cheap, and enough if nothing fits
    if low < 0:
        return (low + high) // 2
    guess = line.most(budget)
    if line.readings == 1 and misses == 0:
        # The second reading is as large as it can be with little risk. The guess is cautious: costs of the first reading
        # that do not grow with the size count as slope. A size too near the first would turn noise into slope.
        known_size = candidates[low]
        second_size = (8.0 if known_size == 1 else 4.0) * known_size if guess is None else max(0.75 * guess, min(guess, 16 * known_size), 2 * known_size)
        return at_most(min(second_size, _REACH * known_size))
    if guess is None:  # no line, so no guess: take the geometric mean
        return at_most(math.sqrt(candidates[low] * candidates[min(high, len(candidates) - 1)]))
    if misses >= 2:
        return (low + high) // 2
    if high == len(candidates) and candidates[-1] == target:
        one_piece_peak = line.peak(target, resident=False)
        if one_piece_peak is not None and one_piece_peak <= budget and target <= _REACH * line.farthest:
            return high - 1  # one piece, without accumulation, is the best answer
    if misses == 1:
        # The line was wrong once: go halfway between the largest fit and the guess.
        return at_most((candidates[low] + min(guess, candidates[high])) / 2) if high - low > 2 else low + 1
    return at_most(min(guess, _REACH * line.farthest))
