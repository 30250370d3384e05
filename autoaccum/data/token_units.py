"""`TokenUnits`: a window measured in units of tokens, for micro-batches whose memory follows from their tokens and not from their samples."""

from __future__ import annotations

from itertools import accumulate

from autoaccum.data import tokens
from autoaccum.data.windows import Window


class TokenUnits:
    """The samples of one window, measured in units of `unit` tokens.

    Tokens are counted with their padding, as they take memory. Samples that only the user cuts may be of any layout, and are taken for one unit each.
    smallest: the fewest samples of a micro-batch.
    """

    def __init__(self, window: Window, unit: int, *, smallest: int = 1) -> None:
        self.unit, self._smallest = unit, smallest
        self._lengths: list[float] = []
        for part, size in zip(window.parts, window.sizes):
            self._lengths += [float(unit) if window.told else tokens.positions(part) / size] * size
        self._ends = list(accumulate(self._lengths, initial=0.0))

    def left(self, start: int) -> int:
        """The units from sample `start` to the end of the window, rounded up."""
        return self._rounded(self._ends[-1] - self._ends[start])

    def samples(self, start: int, units: int) -> int:
        """How many samples from `start` on fit into so many units, each padded to the longest of them; at least one."""
        left, longest, count = len(self._lengths) - start, 0.0, 0
        while count < left:
            longest = max(longest, self._lengths[start + count])
            if count >= self._smallest and (count + 1) * longest > units * self.unit:
                break
            count += 1
        # BatchNorm forbids a micro-batch of one sample.
        return count + 1 if left - count == 1 and self._smallest > 1 else count

    def of(self, start: int, samples: int) -> int:
        """The units of a micro-batch of so many samples from `start` on, rounded up."""
        return self._rounded(self._taken(start, samples))

    def fill(self, start: int, samples: int, units: int) -> float:
        """How much of so many units that micro-batch takes, up to 1."""
        return min(self._taken(start, samples) / (units * self.unit), 1.0) or 1.0

    def _taken(self, start: int, samples: int) -> float:
        return samples * max(self._lengths[start : start + samples], default=0.0)

    def _rounded(self, taken: float) -> int:
        return max(-int(-taken // self.unit), 1)


def longest_sample(window: Window) -> int:
    """The tokens of the longest sample of a window, padding included. Raises `PlanError` if samples have none."""
    return max(tokens.per_sample(part, size) for part, size in zip(window.parts, window.sizes) if size)
