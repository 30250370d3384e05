"""The tapes of a job's windows, by card and size. A few sizes are traced; the tapes of other sizes are computed from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from autoaccum.simulate import Allocator, Card, Growth, NotAlike, Tape, replay, same_kernels, same_tape
from autoaccum.virtual.phantom import Phantom

_ANCHORS = (8, 256)  # the first traced micro-batch lies between these; fake tensors cost the same at any size

_SOME_CARD = (8519680, 108, 2048)  # for comparing tapes: bytes of cuBLAS's workspace, multiprocessors, threads of each multiprocessor

_BEYOND = 4  # a line that gives the right peak at one size is trusted up to this many times that size

PIECES = 3  # the third micro-batch of a window holds the same as the tenth: gradients, and the next piece of the input


@dataclass
class JobTapes:
    """The tapes of some jobs, by card and size."""

    phantom: Phantom
    shortest: int  # the smallest micro-batch that may be traced
    remarks: dict[str, None] = field(default_factory=dict)
    _growths: dict[Any, list[Growth] | None] = field(default_factory=dict)  # lines, each through two neighbouring sizes; None: every size is traced
    _tapes: dict[Any, Tape] = field(default_factory=dict)
    _highest: int = _ANCHORS[1]
    _straight: dict[Any, int] = field(default_factory=dict)  # the size up to which a single line is trusted

    def alike(self, card: Card) -> Card:
        """A known card whose tapes are also valid for `card`, because attention and convolutions use the same kernels; else `card`."""
        if self.phantom.asked_for_card:
            return replace(card, told=card.facts.name)
        convolves = self._convolves()
        known: dict[Card, None] = dict.fromkeys(key[0] for key in self._growths)
        for other in known:
            if same_kernels(card, other, self.phantom.attention, convolves=convolves):
                return other
        return card

    def _convolves(self) -> bool:
        return any("convolution" in tape.operators for tape in self._tapes.values())

    def exactly(self, card: Card, sizes: Sequence[int], *, twice: bool = False) -> Tape:
        """The tape of a window of these micro-batches, traced at exactly these sizes. twice: the window runs twice."""
        pieces = (sizes[0],) if len(sizes) == 1 else (sizes[0], sizes[-1]) if len(sizes) == 2 else (sizes[0], sizes[1], sizes[-1])
        key = (card, pieces, twice)
        if key not in self._tapes:
            if len(self._tapes) > 64:  # a tape of a large model takes a few MB
                self._tapes.clear()
            windows = [pieces[:1], *([pieces] * (2 if twice else 1))]
            draws = self.phantom.draws
            self._tapes[key] = draws.worst(self.phantom.tape(windows, card), lambda: self.phantom.tape(windows, card))
            if draws.remark:
                self.remarks[draws.remark] = None
            self.remarks.update(dict.fromkeys(self._tapes[key].assumed))
        return self._tapes[key]

    def about(self, card: Card, micro_batch: int, steps: int) -> Tape:
        """The tape of a window of equal micro-batches, computed from two traces at other sizes if only block sizes differ between them.

        A window in one piece is traced, because only the target has that size.
        """
        pieces = min(steps, PIECES)
        if pieces == 1:
            return self.exactly(card, (micro_batch,))
        key = (card, pieces)
        if key not in self._growths:
            self._growths[key] = self._first_line(card, micro_batch, pieces)
        growth = self._line(key, micro_batch)
        return self.exactly(card, (micro_batch,) * pieces) if growth is None else growth.at(micro_batch)

    def _first_line(self, card: Card, micro_batch: int, pieces: int) -> list[Growth] | None:
        """The first line, through two sizes between the anchors. None, with a remark, if the job's operations change between small sizes."""
        is_first = True
        while True:
            low = max(min(max(micro_batch, _ANCHORS[0]), self._highest), self.shortest)
            high = low + max(low // 8, 4)
            try:
                return [Growth(self.exactly(card, (low,) * pieces), self.exactly(card, (high,) * pieces), low, high)]
            except NotAlike as difference:
                if is_first:  # what a library makes once and keeps, as bitsandbytes' tables of codes, is made in the very first trace
                    is_first = False
                    self._tapes.clear()
                    continue
                if low <= _ANCHORS[0]:
                    self.remarks[f"what the job does changes with the micro-batch ({difference}), so every size was traced by itself"] = None
                    return None
                self._highest = _ANCHORS[0]  # from some size on, large tensors are processed in parts

    def _line(self, key: Any, micro_batch: int) -> Growth | None:
        """The known line whose size is the closest to `micro_batch`, by ratio; None without a line."""
        growths = self._growths.get(key)
        return min(growths, key=lambda growth: abs(math.log(max(micro_batch, 1) / growth.low_batch))) if growths else None

    def changes_with_size(self, card: Card) -> bool:
        """True if no line was found, so that every size is traced."""
        return any(growths is None for key, growths in self._growths.items() if key[0] == card)

    def anchor(self, card: Card, micro_batch: int, pieces: int) -> int:
        """The micro-batch through which the line for this size goes; 0 without a line."""
        growth = self._line((card, pieces), micro_batch)
        return 0 if growth is None else growth.low_batch

    def anchored(self, card: Card, micro_batch: int, steps: int) -> bool:
        """True if the line gave this size's peak to within 0.2 %.

        If that is not known, this traces the size. If the line is wrong, a new line goes through the size and its neighbour.
        Kernels have thresholds that two small sizes do not show, and the memory of a job may grow nonlinearly.
        """
        pieces = min(steps, PIECES)
        key = (card, pieces)
        growths = self._growths.get(key)
        if growths is None or any(growth.low_batch <= micro_batch <= growth.high_batch for growth in growths):
            return True
        # The memory of attention grows in the same way on every card. Convolution kernels have their own thresholds on each card.
        scope = key if self._convolves() else pieces
        if len(growths) == 1 and micro_batch <= self._straight.get(scope, 0):
            return True
        line, traced = self._line(key, micro_batch), self.exactly(card, (micro_batch,) * pieces)
        assert line is not None
        if not same_tape(line.at(micro_batch), traced):
            predicted, actual = (replay(tape.on(*_SOME_CARD), Allocator()).peak_reserved_bytes for tape in (line.at(micro_batch), traced))
            if predicted != actual:
                near = max(micro_batch + max(micro_batch // 8, 1), self.shortest)
                try:
                    growths.append(Growth(traced, self.exactly(card, (near,) * pieces), micro_batch, near))
                except NotAlike:
                    self._growths[key] = None
                return abs(predicted - actual) <= 0.002 * actual
        self._straight[scope] = max(_BEYOND * micro_batch, self._straight.get(scope, 0))
        return True
