"""When gradients cross ranks: announce, compute, vote, commit.

Every rank says what it brings; all micro-steps run without communication, so that an out-of-memory is the business of
one rank, which runs its part again, smaller; all vote; and only then gradients cross. Since that is later than need be,
it is done for the first windows and after trouble; from then on they cross in the backward of the last micro-batch, the
smallest one, beside its computation.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from autoaccum import batches
from autoaccum.engines import Engine
from autoaccum.errors import PlanError, RanksDisagree
from autoaccum.explaining import listed
from autoaccum.fleets import Fleet
from autoaccum.ranks import Ranks
from autoaccum.regrouping import Window

log = logging.getLogger("autoaccum")

DONE, AGAIN, CANNOT, FAILED = range(4)  # what a rank votes on its part of a window


class Void(Exception):
    """This window's gradients are void, on every rank, because of an out-of-memory. out: ranks that cannot hold one sample any more."""

    def __init__(self, out: Sequence[int] = ()) -> None:
        super().__init__(f"{listed(out)} cannot hold one sample" if out else "a rank ran out of memory")
        self.out = tuple(out)


@dataclass(frozen=True)
class Announced:
    """A window over all ranks. held: samples by rank. counts: of each job, what all counted beforehand, None where nobody does. careful: with a vote."""

    held: tuple[int, ...]
    counts: tuple[float | None, ...]
    careful: bool

    @property
    def samples(self) -> int:
        return sum(self.held)


class Team:
    """The ranks that train together, window by window, each calling at the same moment.

    careful_windows: how many windows, at first and after trouble, are voted on; None for all. in_step: whether forward communicates.
    """

    def __init__(self, ranks: Ranks, fleet: Fleet, careful_windows: int | None, *, in_step: bool) -> None:
        self._in_step = in_step
        self.ranks, self._fleet, self._careful_windows = ranks, fleet, careful_windows
        self._careful_left = careful_windows or 0
        self.lockstep = fleet.lockstep
        self.out: tuple[int, ...] = ()
        self._largest_sample, self._short = 0.0, 0

    def announce(self, whole: Window, counts: Sequence[Callable[[Any], Any] | None]) -> Announced:
        """What all ranks bring to this window. counts: each job's. Raises `PlanError` on every rank where the plan and the loaders do not agree."""
        failure: Exception | None = None
        parts = [(part, size) for part, size in zip(whole.parts, whole.sizes) if size]
        larger = max((batches.nbytes(part) / size for part, size in parts), default=0.0)
        careful = self._careful_windows is None or self._careful_left > 0 or larger > self._largest_sample
        self._largest_sample = max(larger, self._largest_sample)
        counted = [0.0] * len(counts)
        try:
            counted = [0.0 if count is None else sum(float(count(part)) for part, _ in parts) for count in counts]
        except Exception as error:  # the others are told before it is raised
            failure = error
        table = self.ranks.table([whole.samples, careful, bool(whole.parts), failure is not None, *counted], "announcing a window")
        if failure is not None:
            raise failure
        if failed := [rank for rank, row in enumerate(table) if row[3]]:
            raise RanksDisagree(f"{listed(failed)} failed in counting this window, so no rank steps: its own output says why")
        held = tuple(int(row[0]) for row in table)
        totals = tuple(None if count is None else sum(row[4 + at] for row in table) for at, count in enumerate(counts))
        self._check(found := Announced(held, totals, any(row[1] for row in table)), [rank for rank, row in enumerate(table) if not row[2]])
        return found

    def _check(self, found: Announced, without: Sequence[int]) -> None:
        shares, target = self._fleet.shares, self._fleet.target
        if not found.samples:
            raise PlanError("a window of no samples: give a batch with at least one")
        if self._in_step and without:
            raise PlanError(
                f"{listed(without)} has no sample to run while the others meet in forward: loop over plan.windows(loader) with plan.batch_sampler(dataset)"
            )
        for rank, (held, share) in enumerate(zip(found.held, shares)):
            if held > share and rank not in self.out:
                raise PlanError(
                    f"the loader of rank {rank} gives {held} samples a step, and its share is {share}: "
                    "loop over plan.windows(DataLoader(dataset, batch_sampler=plan.batch_sampler(dataset)))"
                )
        self._short = self._short + 1 if found.samples < target else 0
        if self._short > 1:
            missing = [f"rank {rank} {held} of {share}" for rank, (held, share) in enumerate(zip(found.held, shares)) if held < share]
            raise PlanError(
                f"the loaders give {found.samples} samples a step for a target batch of {target}, twice in a row ({', '.join(missing[:4])}): "
                "loop over plan.windows(DataLoader(dataset, batch_sampler=plan.batch_sampler(dataset)))"
            )

    def handed_over(self, whole: Window, found: Announced) -> Window:
        """This rank's window, with its part of what ranks bring that cannot run it."""
        held = [0 if rank in self.out else samples for rank, samples in enumerate(found.held)]
        mine = whole
        for source in self.out:
            if not found.held[source]:
                continue
            here = self.ranks.rank
            parts, sizes, told = self.ranks.handed(
                (whole.parts, whole.sizes, whole.told) if here == source else ((), (), False), source, "handing samples over"
            )
            takes = self._fleet.with_more(held, found.held[source], self.out)
            start = sum(takes[:here])
            if here == source:
                mine = Window((), ())
            elif takes[here]:
                mine = mine.joined(Window(parts, sizes, whole.split, told=told).between(start, start + takes[here]))
            held = [before + more for before, more in zip(held, takes)]
        return mine

    def steps(self, found: Announced) -> int:
        """Micro-steps of a window in which all ranks run the same number of them; 0 where they need not."""
        return self._fleet.steps_of(found.held) if self._fleet.lockstep else 0

    def ran_out(self, out: Sequence[int]) -> None:
        """From now on these ranks hand their samples over. Raises `RanksDisagree` where nobody is left."""
        self.out = tuple(sorted({*self.out, *out}))
        if len(self.out) == self.ranks.world_size:
            raise RanksDisagree("no rank is left that can hold one sample: start again with a plan that is tuned anew")
        log.warning("%s cannot hold one sample any more: the others run its samples, and it still steps; tune again when you can", listed(out))
        self.trouble()

    def trouble(self) -> None:
        """The next windows are voted on."""
        self._careful_left = self._careful_windows or 0

    def went_by(self, rescued: bool) -> None:
        """A window has ended."""
        if rescued:
            self.trouble()
        else:
            self._careful_left = max(self._careful_left - 1, 0)


class Crossing:
    """One window of one job on all ranks. out: those that run nothing of it, whatever they brought. job: its place in turn.

    samples, count: of the window over all ranks. averaged: over how many ranks the engine averages.
    crossed: True once gradients may have crossed, after which nothing can be redone.
    """

    def __init__(self, engine: Engine, ranks: Ranks, announced: Announced, out: Sequence[int] = (), job: int = 0) -> None:
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
            raise RanksDisagree(f"{listed(failed)} failed in this window, so no rank steps: its own output says why")
        out = [rank for rank, each in enumerate(votes) if each == CANNOT]
        if out or AGAIN in votes:
            raise Void(out)

    def failed(self) -> None:
        """Tells the others that this rank is about to raise, where they would wait for its vote."""
        if self.votes:
            with suppress(RanksDisagree, Void):  # its own failure is what it has to tell
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
