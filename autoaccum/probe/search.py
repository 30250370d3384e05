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
    """The peaks of forward and backward so far, and the line through them that predicts the peak of other sizes.

    cautious: peaks that have grown faster than a line are expected to go on so: the parabola through three readings is followed where it is above.
    """

    def __init__(self, gradient_bytes: int, *, cautious: bool = False) -> None:
        self._gradient_bytes, self.cautious = gradient_bytes, cautious
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
        high, gap, bend = self._bend()
        above = max(size - high, 0)
        return line[1] + line[0] * size + bend * above * (above + gap) - (0 if resident else self._gradient_bytes)

    def most(self, budget: float) -> float | None:
        """The predicted largest size within the budget, with gradients resident; None without a line."""
        line = self.slope_and_fixed()
        if line is None:
            return None
        high, gap, bend = self._bend()
        beyond = (budget - line[1]) / line[0] - high
        # bend a^2 + (slope + bend x gap) a = slope x beyond, for the samples a above the largest reading
        linear = line[0] + bend * gap
        return high + (beyond if beyond <= 0 or not bend else (math.sqrt(linear**2 + 4 * bend * line[0] * beyond) - linear) / (2 * bend))

    def _bend(self) -> tuple[int, int, float]:
        """The largest size that was read, how far below it the next reading of the line is, and half of the second derivative; 0 for a straight line.

        It is that of the parabola through the largest reading, the largest one of at most half its size, and the largest of at most half of that.
        """
        sizes = sorted(self._peaks)
        high = sizes[-1] if sizes else 0
        middle = max((size for size in sizes if size <= high / 2), default=0)
        low = max((size for size in sizes if size <= middle / 2), default=0)
        if not self.cautious or not low:
            return high, high - middle, 0.0
        upper = (self._peaks[high] - self._peaks[middle]) / (high - middle)
        lower = (self._peaks[middle] - self._peaks[low]) / (middle - low)
        return high, high - middle, max((upper - lower) / (high - low), 0.0) if lower > 0 else 0.0

    def least(self, size: int) -> float:
        """A lower bound for the peak of a larger size: from the last reading on, the smallest slope between two readings."""
        sizes = sorted(self._peaks)
        if len(sizes) < 2:
            return 0.0
        slopes = [(self._peaks[high] - self._peaks[low]) / (high - low) for low, high in itertools.pairwise(sizes)]
        return self._peaks[sizes[-1]] + max(min(slopes), 0.0) * (size - sizes[-1])

    @property
    def is_measured(self) -> bool:
        """True if two readings give the slope."""
        sizes = sorted(self._peaks)
        return len(sizes) > 1 and self._peaks[max((size for size in sizes if size <= sizes[-1] / 2), default=sizes[0])] < self._peaks[sizes[-1]]

    @property
    def farthest(self) -> int:
        return max(self._peaks, default=0)

    @property
    def readings(self) -> int:
        return len(self._peaks)


class Search:
    """A search as a sequence of proposals: ask `propose` for a size, run it, `add` its reading, and so on until it proposes None.

    The arguments are those of `largest`. budget: the current budget.
    cautious: True where an out-of-memory costs more than one more step, as in training. The search then goes out in small strides, expects
    peaks that grow faster than a line to go on so, and does not run what is predicted above the budget.
    Raises `PlanError` without candidates.
    """

    def __init__(
        self,
        target: int,
        candidates: Sequence[int],
        *,
        budget: int,
        gradient_bytes: int = 0,
        daring: bool = True,
        cautious: bool = False,
        start: int = 1,
        known: Sequence[PeakReading] = (),
    ) -> None:
        if not candidates:
            raise PlanError(f"no micro-batch is allowed for a target batch of {target}")
        self._target, self._candidates, self._gradient_bytes, self._start, self._known = target, candidates, gradient_bytes, start, known
        self._daring, self._reach = daring and not cautious, _CAUTIOUS_REACH if cautious else _REACH
        self._line = Line(gradient_bytes, cautious=cautious)
        self._one_piece = candidates[-1] == target  # the candidates contain the window in one piece
        self._tried: dict[int, PeakReading] = {}
        for reading in known:
            self._line.add(reading, budget)
            if reading.micro_batch in candidates and (reading.accumulation_steps == 1) == (reading.micro_batch == target):
                self._tried[reading.micro_batch] = reading
        # candidates[low] fitted, candidates[high] did not
        self._low = max((index for index, size in enumerate(candidates) if _settled(size, target, known) is True), default=-1) if known else -1
        self._high = next(
            (index for index in range(self._low + 1, len(candidates)) if known and _settled(candidates[index], target, known) is False), len(candidates)
        )
        self._misses = 0  # consecutive predictions that did not fit
        self._predicted_refusal: int | None = None

    def propose(self, budget: int) -> int | None:
        """The size to run next; None if the answer is known."""
        while self._high - self._low > 1:
            index = _next(self._candidates, self._low, self._high, self._line, budget, self._target, self._misses, self._start, self._reach)
            if self._dares(index, budget):
                return self._candidates[index]
            self._predicted_refusal = self._candidates[index]
            self._high = index
        last = len(self._candidates) - 1
        if self._one_piece and self._high < last and self._target not in self._tried and _settled(self._target, self._target, self._known) is None:
            # The window in one piece may still fit, because it holds no gradients.
            possible = self._line.least(self._target) - self._gradient_bytes <= budget
            if (possible or self._low < 0) and self._dares(last, budget):
                return self._target
        return None

    def add(self, reading: PeakReading, budget: int) -> None:
        """Takes the reading of a size that was proposed."""
        size = reading.micro_batch
        index, last = self._candidates.index(size), len(self._candidates) - 1
        self._tried[size] = reading
        self._line.add(reading, budget)
        if reading.fits:
            # All sizes below one that fits count as fitting, also a refused one: readings need not be monotone.
            self._low, self._misses = index, 0
            self._high = max(self._high, self._low + 1)
        elif index < self._high:
            self._misses += 1
            if self._one_piece and index == last and index - self._low > 1:
                # The window in one piece did not fit. This says nothing about smaller sizes, so it does not count as a miss.
                self._misses -= 1
            self._high = index

    def result(self, budget: int) -> SearchResult:
        """The answer so far."""
        if self._low < 0:
            return SearchResult(0, 0, 0, min(self._tried, default=None), self._predicted_refusal)
        answer = self._candidates[self._low]
        refused = [reading.micro_batch for reading in (*self._tried.values(), *self._known) if not reading.fits and reading.micro_batch > answer]
        predicted_size = self._line.most(budget)
        guess = None if predicted_size is None else max(answer, min(int(predicted_size), min(refused, default=self._target + 1) - 1))
        return SearchResult(answer, math.ceil(self._target / answer), answer, min(refused, default=None), self._predicted_refusal, guess)

    def _dares(self, index: int, budget: int) -> bool:
        """False for a size that is predicted above the budget, if such sizes must not run."""
        if self._daring:
            return True
        size = self._candidates[index]
        predicted = self._line.peak(size, resident=size != self._target)
        if predicted is None or predicted <= budget:
            return True
        # Costs that do not grow with the size count as slope where one reading and what was held before make the line.
        return self._line.cautious and not self._line.is_measured and size <= _UNMEASURED_REACH * self._line.farthest


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
    search = Search(target, candidates, budget=budget_bytes(), gradient_bytes=gradient_bytes, daring=daring, start=start, known=known)
    while (size := search.propose(budget_bytes())) is not None:
        search.add(fits(size, math.ceil(target / size)), budget_bytes())
    return search.result(budget_bytes())


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
_REACH, _CAUTIOUS_REACH, _UNMEASURED_REACH = 32, 4, 2


def _next(candidates: Sequence[int], low: int, high: int, line: Line, budget: float, target: int, misses: int, start: int, reach: int) -> int:
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
        return at_most(min(second_size, reach * known_size))
    if line.cautious and not line.is_measured:
        # A slope from what was held before is too steep rather than too flat.
        return at_most(max(_UNMEASURED_REACH * line.farthest, min(guess if guess is not None else math.inf, reach * line.farthest)))
    if guess is None:  # no line, so no guess: take the geometric mean
        return at_most(math.sqrt(candidates[low] * candidates[min(high, len(candidates) - 1)]))
    if misses >= 2:
        return (low + high) // 2
    if high == len(candidates) and candidates[-1] == target:
        one_piece_peak = line.peak(target, resident=False)
        if one_piece_peak is not None and one_piece_peak <= budget and target <= reach * line.farthest:
            return high - 1  # one piece, without accumulation, is the best answer
    if misses == 1:
        # The line was wrong once: go halfway between the largest fit and the guess.
        return at_most((candidates[low] + min(guess, candidates[high])) / 2) if high - low > 2 else low + 1
    return at_most(min(guess, reach * line.farthest))
