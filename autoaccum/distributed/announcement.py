"""What the ranks bring to a window, announced by each before any of them runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from autoaccum.data import Window, batches
from autoaccum.distributed.fleet import Fleet
from autoaccum.distributed.ranks import Ranks
from autoaccum.errors import PlanError, RanksDisagree
from autoaccum.units import ranks_in_words

log = logging.getLogger("autoaccum")


@dataclass(frozen=True)
class WindowAnnouncement:
    """A window over all ranks. held: samples by rank. counts: of each job, what all counted beforehand, None where nobody does. careful: with a vote."""

    held: tuple[int, ...]
    counts: tuple[float | None, ...]
    careful: bool

    @property
    def samples(self) -> int:
        return sum(self.held)


class RankTeam:
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

    def announce(self, whole: Window, counts: Sequence[Callable[[Any], Any] | None]) -> WindowAnnouncement:
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
            raise RanksDisagree(f"{ranks_in_words(failed)} failed in counting this window, so no rank steps: its own output says why")
        held = tuple(int(row[0]) for row in table)
        totals = tuple(None if count is None else sum(row[4 + at] for row in table) for at, count in enumerate(counts))
        self._check(found := WindowAnnouncement(held, totals, any(row[1] for row in table)), [rank for rank, row in enumerate(table) if not row[2]])
        return found

    def _check(self, found: WindowAnnouncement, without: Sequence[int]) -> None:
        shares, target = self._fleet.shares, self._fleet.target
        if not found.samples:
            raise PlanError("a window of no samples: give a batch with at least one")
        if self._in_step and without:
            raise PlanError(
                f"{ranks_in_words(without)} has no sample to run while the others meet in forward: loop over plan.windows(loader) with plan.batch_sampler(dataset)"
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

    def handed_over(self, whole: Window, found: WindowAnnouncement) -> Window:
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

    def steps(self, found: WindowAnnouncement) -> int:
        """Micro-steps of a window in which all ranks run the same number of them; 0 where they need not."""
        return self._fleet.steps_of(found.held) if self._fleet.lockstep else 0

    def ran_out(self, out: Sequence[int]) -> None:
        """From now on these ranks hand their samples over. Raises `RanksDisagree` where nobody is left."""
        self.out = tuple(sorted({*self.out, *out}))
        if len(self.out) == self.ranks.world_size:
            raise RanksDisagree("no rank is left that can hold one sample: start again with a plan that is tuned anew")
        log.warning("%s cannot hold one sample any more: the others run its samples, and it still steps; tune again when you can", ranks_in_words(out))
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
