"""The tapes of a job's windows by card and size: a few are traced, the others follow from these."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from autoaccum.simulate import Allocator, Card, Growth, NotAlike, Tape, replay, same_kernels, same_tape
from autoaccum.virtual.phantom import Phantom

_ANCHORS = (8, 256)  # between these lies the first micro-batch that is traced; fake tensors cost the same at any size

_SOME_CARD = (8519680, 108, 2048)  # to compare tapes on: cuBLAS's workspace, multiprocessors and their threads

_BEYOND = 4  # a line that told one size's peak is believed up to so many times that size

PIECES = 3  # a window's third micro-batch holds what the tenth does: gradients, and the next piece of the input


@dataclass
class JobTapes:
    """The tapes of some jobs, by card and size."""

    phantom: Phantom
    shortest: int  # the smallest micro-batch that may be traced
    remarks: dict[str, None] = field(default_factory=dict)
    _growths: dict[Any, list[Growth] | None] = field(default_factory=dict)  # lines, each through two neighbouring sizes; None: every size by itself
    _tapes: dict[Any, Tape] = field(default_factory=dict)
    _highest: int = _ANCHORS[1]
    _straight: dict[Any, int] = field(default_factory=dict)  # up to which size the one line may be believed

    def alike(self, card: Card) -> Card:
        """A card whose tapes are there and must be this one's, too, because attention and convolutions would take the same; else itself."""
        convolves = self._convolves()
        known: dict[Card, None] = dict.fromkeys(key[0] for key in self._growths)
        for other in known:
            if same_kernels(card, other, self.phantom.attention, convolves=convolves):
                return other
        return card

    def _convolves(self) -> bool:
        return any("convolution" in tape.operators for tape in self._tapes.values())

    def exactly(self, card: Card, sizes: Sequence[int], *, twice: bool = False) -> Tape:
        """The tape of a window of these micro-batches, traced as it is."""
        told = (sizes[0],) if len(sizes) == 1 else (sizes[0], sizes[-1]) if len(sizes) == 2 else (sizes[0], sizes[1], sizes[-1])
        key = (card, told, twice)
        if key not in self._tapes:
            if len(self._tapes) > 64:  # a tape of a large model takes a few MB
                self._tapes.clear()
            self._tapes[key] = self.phantom.tape([told[:1], *([told] * (2 if twice else 1))], card)
            self.remarks.update(dict.fromkeys(self._tapes[key].assumed))
        return self._tapes[key]

    def about(self, card: Card, micro_batch: int, steps: int) -> Tape:
        """The tape of a window of equal micro-batches, from two traces at other sizes if sizes change nothing else.

        Only the target comes in one piece, so that is traced as it is.
        """
        pieces = min(steps, PIECES)
        if pieces == 1:
            return self.exactly(card, (micro_batch,))
        key = (card, pieces)
        if key not in self._growths:
            self._growths[key] = self._drawn(card, micro_batch, pieces)
        growth = self._line(key, micro_batch)
        return self.exactly(card, (micro_batch,) * pieces) if growth is None else growth.at(micro_batch)

    def _drawn(self, card: Card, micro_batch: int, pieces: int) -> list[Growth] | None:
        """The first line, through two sizes between the anchors; None, with a remark, where what the job does changes between small ones."""
        while True:
            low = max(min(max(micro_batch, _ANCHORS[0]), self._highest), self.shortest)
            high = low + max(low // 8, 4)
            try:
                return [Growth(self.exactly(card, (low,) * pieces), self.exactly(card, (high,) * pieces), low, high)]
            except NotAlike as difference:
                if low <= _ANCHORS[0]:
                    self.remarks[f"what the job does changes with the micro-batch ({difference}), so every size was traced by itself"] = None
                    return None
                self._highest = _ANCHORS[0]  # large tensors are worked on in parts, from some size on

    def _line(self, key: Any, micro_batch: int) -> Growth | None:
        """Of the lines that are known, the one that was drawn nearest to that size, in proportion."""
        growths = self._growths.get(key)
        return min(growths, key=lambda each: abs(math.log(max(micro_batch, 1) / each.low_batch))) if growths else None

    def anchor(self, card: Card, micro_batch: int, pieces: int) -> int:
        """The micro-batch through which the line for that size is drawn; 0 without a line."""
        growth = self._line((card, pieces), micro_batch)
        return 0 if growth is None else growth.low_batch

    def anchored(self, card: Card, micro_batch: int, steps: int) -> bool:
        """Whether the line tells this size's peak. If that is not known, traces the size; where the line was wrong, another is
        drawn through it and its neighbour. Kernels have thresholds that two small sizes do not show, and jobs grow otherwise than in a line."""
        pieces = min(steps, PIECES)
        key = (card, pieces)
        growths = self._growths.get(key)
        if growths is None or any(each.low_batch <= micro_batch <= each.high_batch for each in growths):
            return True
        # What attention takes on one card or another grows alike; convolutions' kernels have thresholds of their own on each.
        alike = key if self._convolves() else pieces
        if len(growths) == 1 and micro_batch <= self._straight.get(alike, 0):
            return True
        line, traced = self._line(key, micro_batch), self.exactly(card, (micro_batch,) * pieces)
        assert line is not None
        if not same_tape(line.at(micro_batch), traced):
            told, true = (replay(tape.on(*_SOME_CARD), Allocator()).peak_reserved_bytes for tape in (line.at(micro_batch), traced))
            if told != true:
                near = max(micro_batch + max(micro_batch // 8, 1), self.shortest)
                try:
                    growths.append(Growth(traced, self.exactly(card, (near,) * pieces), micro_batch, near))
                except NotAlike:
                    self._growths[key] = None
                return abs(told - true) <= 0.002 * true
        self._straight[alike] = max(_BEYOND * micro_batch, self._straight.get(alike, 0))
        return True
