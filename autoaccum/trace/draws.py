"""Sizes that a job draws at random: every trace sees the same draws, those of the largest of several."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from autoaccum.simulate import Tape, same_tape

_TRIED = 6


class Draws:
    """The seed of Python's and NumPy's random numbers in every trace. met: True once a job has drawn any. remark: what to say of it, or ""."""

    def __init__(self) -> None:
        self.seed, self.met, self.remark = 0, False, ""
        self._decided = False

    @contextmanager
    def seeded(self) -> Iterator[None]:
        """Inside, random numbers begin at the seed. Afterwards they go on as if nothing had been drawn."""
        numpy: Any = sys.modules.get("numpy")
        states = random.getstate(), None if numpy is None else numpy.random.get_state()
        random.seed(self.seed)
        if numpy is not None:
            numpy.random.seed(self.seed)
        begun = random.getstate(), None if numpy is None else numpy.random.get_state()
        try:
            yield
        finally:
            drawn = random.getstate() != begun[0] or (numpy is not None and str(numpy.random.get_state()) != str(begun[1]))
            self.met = self.met or drawn
            random.setstate(states[0])
            if numpy is not None:
                numpy.random.set_state(states[1])

    def worst(self, tape: Tape, trace: Callable[[], Tape]) -> Tape:
        """The tape with the largest peak over several seeds, whose seed stays. trace: traces the same windows again, with the seed of then."""
        if not self.met or self._decided:
            return tape
        self._decided = True
        best, peaks, differs = (tape, self.seed), [tape.requested_peak()], False
        for seed in range(1, _TRIED):
            self.seed = seed
            other = trace()
            differs = differs or not same_tape(tape, other)
            peaks.append(other.requested_peak())
            if peaks[-1] > best[0].requested_peak():
                best = other, seed
        self.seed = best[1]
        if differs and max(peaks) > min(peaks):
            self.remark = (
                f"the job draws sizes at random: this is the largest of {_TRIED} draws, {max(peaks) / min(peaks):.2g} times the smallest; "
                "to be sure of the largest of all, give the job its largest size while you estimate"
            )
        return best[0]
