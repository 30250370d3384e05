"""`LearnedCut`: a window's micro-batches, each as large as is known to fit when its turn comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from autoaccum.data.windows import Window


class LearnedCut:
    """A window, cut while it runs. The first iteration decides the sizes; later ones give the same micro-batches again.

    next_size: `next_size(index, remaining)`, the samples of the next micro-batch, between 1 and `remaining`.
    ahead: True if the next micro-batch may be copied to the device while one computes; the size of a next one may depend on the peak of this one.
    is_limited: True once parts could not be joined, so that micro-batches are no larger than they are.
    sizes: the samples of each micro-batch so far, as they ran. Parts that cannot be joined become micro-batches of their own.
    parts: the window's own parts, for what must be known of all of them before the first one runs.
    """

    def __init__(self, window: Window, next_size: Callable[[int, int], int], *, ahead: bool = False) -> None:
        self.ahead = ahead
        self._window, self._next_size = window, next_size
        self.decided: list[int] = []  # the sizes that were asked for
        self.sizes: list[int] = []
        self.is_limited = False
        self.parts = window.parts

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        start = 0
        for turn in range(self._window.samples):
            if start == self._window.samples:
                return
            is_new = turn == len(self.decided)
            if is_new:
                self.decided.append(self._next_size(len(self.sizes), self._window.samples - start))
            stop = start + self.decided[turn]
            pieces = list(self._window.between(start, stop).cut((stop - start,)))
            self.is_limited = self.is_limited or len(pieces) > 1
            for piece, size in pieces:
                if is_new:
                    self.sizes.append(size)
                yield piece, size
            start = stop
