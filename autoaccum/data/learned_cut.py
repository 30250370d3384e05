"""`LearnedCut`: a window's micro-batches, each as large as is known to fit when its turn comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

from autoaccum.data.windows import Window


class LearnedCut:
    """A window, cut while it runs. The first iteration decides the sizes; later ones give the same micro-batches again.

    next_size: `next_size(index, remaining)`, the samples of the next micro-batch, between 1 and `remaining`.
    ahead: True if the next micro-batch may be copied to the device while one computes; the size of a next one may depend on the peak of this one.
    is_limited: True once parts could not be joined, so that micro-batches are no larger than they are, and parts are cut evenly.
    sizes: the samples of each micro-batch so far, as they ran. Parts that cannot be joined become micro-batches of their own.
    parts: the window's own parts, for what must be known of all of them before the first one runs.
    """

    def __init__(self, window: Window, next_size: Callable[[int, int], int], *, ahead: bool = False, is_limited: bool = False) -> None:
        self.ahead = ahead
        self._window, self._next_size = window, next_size
        self.decided: list[int] = []  # the sizes that were asked for
        self.sizes: list[int] = []
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
                size = self._in_part(start, self._next_size(len(self.sizes), self._window.samples - start))
                self.decided.append(size)
                pieces = list(self._window.between(start, start + size).cut((size,)))
                self.is_limited = self.is_limited or len(pieces) > 1
                piece, size = pieces[0]  # what it cannot be joined with comes next
                self.decided[-1] = size
                self.sizes.append(size)
            yield piece, size
            start += size

    def _in_part(self, start: int, size: int) -> int:
        """The size with which the part at `start` is cut evenly, where parts cannot be joined and it holds more than `size`."""
        ends = accumulate(self._window.sizes)
        left = next(end for end in ends if end > start) - start
        return -(-left // -(-left // size)) if self.is_limited and size < left else size
