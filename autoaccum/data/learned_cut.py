"""`LearnedCut`: a window's micro-batches, each as large as is known to fit when its turn comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

from autoaccum.data.token_units import TokenUnits
from autoaccum.data.windows import Window


class LearnedCut:
    """A window, cut while it runs. The first iteration decides the sizes; later ones give the same micro-batches again.

    next_size: `next_size(index, remaining)`, the size of the next micro-batch, between 1 and `remaining`: in samples, or in `units`.
    units: the window in units of tokens, if micro-batches are counted in those; None for samples.
    ahead: True if the next micro-batch may be copied to the device while one computes; the size of a next one may depend on the peak of this one.
    is_limited: True once parts could not be joined, so that micro-batches are no larger than they are, and parts are cut evenly.
    sizes: the samples of each micro-batch so far, as they ran. Parts that cannot be joined become micro-batches of their own.
    measures: their sizes as `next_size` counts them. fills: how much of its units each one takes; 1 for samples.
    parts: the window's own parts, for what must be known of all of them before the first one runs.
    """

    def __init__(
        self, window: Window, next_size: Callable[[int, int], int], *, units: TokenUnits | None = None, ahead: bool = False, is_limited: bool = False
    ) -> None:
        self.ahead = ahead
        self._window, self._next_size, self._units = window, next_size, units
        self.decided: list[int] = []  # the sizes that were asked for
        self.sizes: list[int] = []
        self.measures: list[int] = self.sizes if units is None else []
        self.fills: list[float] = []
        self.is_limited = is_limited
        self.parts = window.parts

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        start = 0
        for turn in range(self._window.samples):
            if start == self._window.samples:
                return
            if turn < len(self.sizes):
                size = self.sizes[turn]
                ((piece, _),) = self._window.between(start, start + size).cut((size,))
            else:
                piece, size = self._next(start)
            yield piece, size
            start += size

    def _next(self, start: int) -> tuple[Any, int]:
        units = self._units
        asked = self._next_size(len(self.sizes), self._window.samples - start if units is None else units.left(start))
        most = asked if units is None else units.samples(start, asked)
        wanted = self._in_part(start, most)
        self.decided.append(wanted if units is None else asked)
        pieces = list(self._window.between(start, start + wanted).cut((wanted,)))
        self.is_limited = self.is_limited or len(pieces) > 1
        piece, size = pieces[0]  # what it cannot be joined with comes next
        if units is None:
            self.decided[-1] = size
        else:
            if size < most or start + size == self._window.samples:  # it is not as full as it might be
                self.decided[-1] = min(units.of(start, size), asked)
            self.measures.append(self.decided[-1])
            self.fills.append(units.fill(start, size, self.decided[-1]))
        self.sizes.append(size)
        return piece, size

    def _in_part(self, start: int, size: int) -> int:
        """The size with which the part at `start` is cut evenly, where parts cannot be joined and it holds more than `size`."""
        ends = accumulate(self._window.sizes)
        left = next(end for end in ends if end > start) - start
        return -(-left // -(-left // size)) if self.is_limited and size < left else size
