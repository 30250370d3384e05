"""The vote on a window, which decides when gradients cross ranks: announce, compute, vote, commit.

Every rank announces its samples. All micro-steps run without communication. So an out-of-memory concerns one rank only,
and that rank runs its part again in smaller micro-batches. Then all ranks vote, and only then gradients cross. This delays
the crossing, so it is done only for the first windows and after trouble. In the other windows, gradients cross in the
backward of the last micro-batch, the smallest one, in parallel to its computation.
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

DONE, AGAIN, CANNOT, FAILED = range(4)  # the possible votes of a rank on its part of a window


class VoidWindow(Exception):
    """Raised on every rank if an out-of-memory made this window's gradients void.

    out: ranks that cannot hold one sample any more.
    """

    def __init__(self, out: Sequence[int] = ()) -> None:
        super().__init__(f"{ranks_in_words(out)} cannot hold one sample" if out else "a rank ran out of memory")
        self.out = tuple(out)


class WindowVote:
    """One window of one job on all ranks.

    out: ranks that run nothing of this window. job: the index of the job.
    samples, count: of the window over all ranks. averaged: the number of ranks that the engine averages over.
    crossed: True when gradients may have crossed. After that nothing can run again.
    """

    def __init__(self, engine: Engine, ranks: Ranks, announced: WindowAnnouncement, out: Sequence[int] = (), job: int = 0) -> None:
        self._engine, self._ranks = engine, ranks
        self.samples, self.count, self.averaged = announced.samples, announced.counts[job], engine.averages_over
        # A rank without a sample, or with a last micro-batch whose count is 0, has no backward in which gradients can cross.
        pulse_needed = engine.pulses_apart and (bool(out) or 0 in announced.held or self.count is not None)
        # If forward communicates, no rank can run again alone, and a vote would be useless.
        self._careful = not engine.in_step and (announced.careful or pulse_needed)
        self.crossed = self._voted = False

    @property
    def in_step(self) -> bool:
        """True if each micro-step of a rank, forward and backward, waits for the other ranks."""
        return self._engine.in_step

    @property
    def redone(self) -> str:
        """Who runs this window again if this rank runs out of memory: "alone" (this rank), "together" (all ranks), or "never"."""
        if self.crossed or (self._engine.redone == "together" and not self._careful):
            return "never"
        return self._engine.redone

    def gather(self) -> None:
        """Called before the first forward, also if the window runs again."""
        self.crossed = self._voted = False
        self._engine.gather()

    @contextmanager
    def around(self, *, last: bool) -> Iterator[None]:
        """A context for forward and backward of one micro-batch. last: True if gradients cross in its backward."""
        if last:
            self.crossed = True
            with self._engine.crossing():
                yield
        else:
            with self._engine.quiet():
                yield

    def owed(self, counted: Sequence[float]) -> tuple[float, float]:
        """The samples and the count by which a micro-batch's loss is divided, so that the engine's result is the window's mean.

        counted: the counts of this rank's micro-batches; not used here.
        """
        del counted  # the announcement has the count over all ranks
        return self.samples / self.averaged, (self.count or 0.0) / self.averaged

    def crosses_at(self, pieces: Iterable[Any], counted: Sequence[float]) -> int:
        """Index of the micro-batch in whose backward gradients cross; -1 if they cross after all backwards."""
        if self._careful:
            return -1
        last = (len(pieces) if isinstance(pieces, Sized) else sum(1 for _ in pieces)) - 1
        return -1 if counted and not counted[-1] and not self.in_step else last  # a count of 0 has no backward

    def settle(self, backwards: int) -> None:
        """Called after the last backward. Afterwards `.grad` has the gradient of all ranks.

        backwards: the number of backwards that ran on this rank. Raises `VoidWindow`, `RanksDisagree` if a rank failed, and
        `UsageError` if gradients could not cross in a later window.
        """
        if self._careful:
            if backwards:
                self._engine.check()
            self.vote(DONE)
        if not self.crossed:
            self.crossed = True
            self._engine.pulse()

    def vote(self, mine: int) -> None:
        """Sends this rank's vote to all ranks. Returns if all votes are DONE. Otherwise raises `VoidWindow` or `RanksDisagree`."""
        self._voted = True
        votes = [int(row[0]) for row in self._ranks.table([mine], "voting on a window")]
        failed = [rank for rank, vote in enumerate(votes) if vote == FAILED]
        if failed:
            raise RanksDisagree(f"{ranks_in_words(failed)} failed in this window, so no rank steps: its own output says why")
        out = [rank for rank, vote in enumerate(votes) if vote == CANNOT]
        if out or AGAIN in votes:
            raise VoidWindow(out)

    def failed(self) -> None:
        """Called before this rank raises. Votes FAILED if the other ranks wait for its vote."""
        if self.votes:
            with suppress(RanksDisagree, VoidWindow):  # this rank raises its own error
                self.vote(FAILED)

    @property
    def votes(self) -> bool:
        """True if the other ranks wait for this rank's vote."""
        return self._careful and not self.crossed and not self._voted

    def void(self) -> None:
        """Drops the gradients of a window that failed."""
        self._engine.void()

    def totals(self, loss: torch.Tensor | None, counts: Sequence[torch.Tensor | float], device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The sums over all ranks of the micro-batches' losses and counts, each 0-d on the device; None for no counts.

        loss: the sum of this rank's micro-batches; None on a rank without a sample. counts: of this rank's micro-batches.
        """
        totals = torch.zeros(3, dtype=torch.float64, device=device)
        if loss is not None:
            totals[0] = loss.double()
        if counts:
            totals[1], totals[2] = sum(counts), 1.0
        dist.all_reduce(totals, group=self._engine.group)
        # All ranks agree on whether losses are sums with a count. A rank that ran nothing reads it from the device.
        sums = self.count is None and (bool(counts) if loss is not None else bool(totals[2] > 0))
        return totals[0] / self.averaged, totals[1] if sums else None
