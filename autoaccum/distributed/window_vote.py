"""When gradients cross ranks: announce, compute, vote, commit.

Every rank says what it brings; all micro-steps run without communication, so that an out-of-memory is the business of
one rank, which runs its part again, smaller; all vote; and only then gradients cross. Since that is later than need be,
it is done for the first windows and after trouble; from then on they cross in the backward of the last micro-batch, the
smallest one, beside its computation.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist

from autoaccum.distributed.announcement import WindowAnnouncement
from autoaccum.distributed.engines import Engine
from autoaccum.distributed.ranks import Ranks
from autoaccum.errors import RanksDisagree
from autoaccum.units import ranks_in_words

log = logging.getLogger("autoaccum")

DONE, AGAIN, CANNOT, FAILED = range(4)  # what a rank votes on its part of a window


class VoidWindow(Exception):
    """This window's gradients are void, on every rank, because of an out-of-memory. out: ranks that cannot hold one sample any more."""

    def __init__(self, out: Sequence[int] = ()) -> None:
        super().__init__(f"{ranks_in_words(out)} cannot hold one sample" if out else "a rank ran out of memory")
        self.out = tuple(out)


class WindowVote:
    """One window of one job on all ranks. out: those that run nothing of it, whatever they brought. job: its place in turn.

    samples, count: of the window over all ranks. averaged: over how many ranks the engine averages.
    crossed: True once gradients may have crossed, after which nothing can be redone.
    """

    def __init__(self, engine: Engine, ranks: Ranks, announced: WindowAnnouncement, out: Sequence[int] = (), job: int = 0) -> None:
        self._engine, self._ranks = engine, ranks
        self.samples, self.count, self.averaged = announced.samples, announced.counts[job], engine.averages_over
        # A rank without a sample, or whose last micro-batch counts nothing, has no backward for gradients to cross in.
        apart = engine.pulses_apart and (bool(out) or 0 in announced.held or self.count is not None)
        # Where forward communicates no rank can run anything again alone, and a vote would be for nothing.
        self._careful = not engine.in_step and (announced.careful or apart)
        self.crossed = self._voted = False

    @property
    def in_step(self) -> bool:
        """Whether every rank's every micro-step, forward and backward, waits for those of the others."""
        return self._engine.in_step

    @property
    def redone(self) -> str:
        """Who runs a window again in which this rank ran out: it "alone", all "together", or nobody, "never"."""
        if self.crossed or (self._engine.redone == "together" and not self._careful):
            return "never"
        return self._engine.redone

    def gather(self) -> None:
        """Called before the first forward, also of a window that runs again."""
        self.crossed = self._voted = False
        self._engine.gather()

    @contextmanager
    def around(self, *, last: bool) -> Iterator[None]:
        """Around forward and backward of one micro-batch."""
        if last:
            self.crossed = True
            with self._engine.crossing():
                yield
        else:
            with self._engine.quiet():
                yield

    def owed(self, counted: Sequence[float]) -> tuple[float, float]:
        """The samples and the count that a micro-batch's terms are divided by, such that what the engine averages is the window's mean."""
        del counted  # what all ranks counted, this one among them, was announced
        return self.samples / self.averaged, (self.count or 0.0) / self.averaged

    def crosses_at(self, pieces: Iterable[Any], counted: Sequence[float]) -> int:
        """Index of the micro-batch in whose backward gradients cross; -1 where they cross afterwards."""
        if self._careful:
            return -1
        last = (len(pieces) if isinstance(pieces, Sized) else sum(1 for _ in pieces)) - 1
        return -1 if counted and not counted[-1] and not self.in_step else last  # what counts nothing has no backward

    def settle(self, backwards: int) -> None:
        """Called after the last of so many backwards; the gradient of all ranks is in `.grad` afterwards.

        Raises `Void`, `RanksDisagree` where a rank failed, and `UsageError` where a later window could not cross.
        """
        if self._careful:
            if backwards:
                self._engine.check()
            self.vote(DONE)
        if not self.crossed:
            self.crossed = True
            self._engine.pulse()

    def vote(self, mine: int) -> None:
        """Tells the others how this rank's part went. Raises as `settle` does; returns where all are done."""
        self._voted = True
        votes = [int(row[0]) for row in self._ranks.table([mine], "voting on a window")]
        failed = [rank for rank, each in enumerate(votes) if each == FAILED]
        if failed:
            raise RanksDisagree(f"{ranks_in_words(failed)} failed in this window, so no rank steps: its own output says why")
        out = [rank for rank, each in enumerate(votes) if each == CANNOT]
        if out or AGAIN in votes:
            raise VoidWindow(out)

    def failed(self) -> None:
        """Tells the others that this rank is about to raise, where they would wait for its vote."""
        if self.votes:
            with suppress(RanksDisagree, VoidWindow):  # its own failure is what it has to tell
                self.vote(FAILED)

    @property
    def votes(self) -> bool:
        """True where the others wait for this rank's vote."""
        return self._careful and not self.crossed and not self._voted

    def void(self) -> None:
        """Forgets gradients that were left by a window that failed."""
        self._engine.void()

    def totals(self, loss: torch.Tensor | None, counts: Sequence[torch.Tensor | float], device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Over all ranks, 0-d on the device: the sum of what micro-batches contributed, and of what they counted, None where none did.

        loss, counts: this rank's; of a rank without a sample, None and nothing.
        """
        both = torch.zeros(3, dtype=torch.float64, device=device)
        if loss is not None:
            both[0] = loss.double()
        if counts:
            both[1], both[2] = sum(counts), 1.0
        dist.all_reduce(both, group=self._engine.group)
        # Whether losses are sums with a count is the same on every rank; one that ran nothing asks the device.
        sums = self.count is None and (bool(counts) if loss is not None else bool(both[2] > 0))
        return both[0] / self.averaged, both[1] if sums else None
