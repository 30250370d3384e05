"""The announcement of a window: before any rank runs it, each rank announces its samples and counts to all ranks."""

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
    """A window over all ranks.

    held: samples of each rank.
    counts: for each job, the sum of `job.count` over all ranks; None for a job without `count`.
    careful: True if the ranks vote on this window. stops: True if a rank has been asked to stop after it.
    """

    held: tuple[int, ...]
    counts: tuple[float | None, ...]
    careful: bool
    stops: bool = False

    @property
    def samples(self) -> int:
        return sum(self.held)


class RankTeam:
    """The ranks that train together. All ranks call `announce` and `handed_over` together, window by window.

    careful_windows: the number of windows with a vote, at the start and after trouble; None for all windows.
    in_step: True if forward communicates. any_sizes: True if windows are counted in tokens, so that their samples vary.
    """

    def __init__(self, ranks: Ranks, fleet: Fleet, careful_windows: int | None, *, in_step: bool, any_sizes: bool = False) -> None:
        self._in_step, self._any_sizes = in_step, any_sizes
        self.ranks, self._fleet, self._careful_windows = ranks, fleet, careful_windows
        self._careful_left = careful_windows or 0
        self.lockstep = fleet.lockstep
        self.votes_every = 0  # windows after which one is voted on all the same, whose time is taken; 0 for none, 1 for all
        self.windows = self._untimed = 0
        self.out: tuple[int, ...] = ()
        self._largest_sample, self._short = 0.0, 0

    def timed(self) -> None:
        """Says that the ranks' times of this window were taken."""
        self._untimed = 0

    def follow(self, fleet: Fleet) -> None:
        """Shares windows out by this fleet from now on. Called on all ranks at the same window."""
        self._fleet = fleet

    def announce(self, whole: Window, counts: Sequence[Callable[[Any], Any] | None], *, stops: bool = False) -> WindowAnnouncement:
        """Tells all ranks the samples and counts of this rank's window, and returns those of all ranks.

        stops: this rank has been asked to stop after this window. whole: this rank's window, before ranks that cannot run hand over samples. counts: `count` of each job.
        Raises `PlanError` on every rank if the loaders do not match the plan. If `count` fails on one rank, that rank raises
        the error and the others raise `RanksDisagree`.
        """
        failure: Exception | None = None
        parts = [(part, size) for part, size in zip(whole.parts, whole.sizes) if size]
        bytes_per_sample = max((batches.nbytes(part) / size for part, size in parts), default=0.0)
        self.windows += 1
        self._untimed += 1
        is_timed = bool(self.votes_every) and self._untimed >= self.votes_every
        careful = is_timed or self._careful_windows is None or self._careful_left > 0 or bytes_per_sample > self._largest_sample
        self._largest_sample = max(bytes_per_sample, self._largest_sample)
        counted = [0.0] * len(counts)
        try:
            counted = [0.0 if count is None else sum(float(count(part)) for part, _ in parts) for count in counts]
        except Exception as error:  # raised after the other ranks know about it
            failure = error
        table = self.ranks.table([whole.samples, careful, bool(whole.parts), failure is not None, stops, *counted], "announcing a window")
        if failure is not None:
            raise failure
        if failed := [rank for rank, row in enumerate(table) if row[3]]:
            raise RanksDisagree(f"{ranks_in_words(failed)} failed in counting this window, so no rank steps: its own output says why")
        samples_by_rank = tuple(int(row[0]) for row in table)
        totals = tuple(None if count is None else sum(row[5 + job] for row in table) for job, count in enumerate(counts))
        self._check(
            whole,
            announcement := WindowAnnouncement(samples_by_rank, totals, any(row[1] for row in table), any(row[4] for row in table)),
            [rank for rank, row in enumerate(table) if not row[2]],
        )
        return announcement

    def _check(self, window: Window, announcement: WindowAnnouncement, empty_ranks: Sequence[int]) -> None:
        shares, target = self._fleet.shares, self._fleet.target
        if not announcement.samples:
            raise PlanError("a window of no samples: give a batch with at least one")
        if self._in_step and empty_ranks:
            raise PlanError(
                f"{ranks_in_words(empty_ranks)} has no sample to run while the others meet in forward: loop over plan.windows(loader) with plan.batch_sampler(dataset)"
            )
        if self._any_sizes:
            return
        for rank, (samples, share) in enumerate(zip(announcement.held, shares)):
            if samples > share and rank not in self.out:
                raise PlanError(
                    f"the loader of rank {rank} gives {samples} samples a step, and its share is {share}: "
                    "loop over plan.windows(DataLoader(dataset, batch_sampler=plan.batch_sampler(dataset)))"
                )
        self._short = self._short + 1 if announcement.samples < target and not window.regrouped else 0
        if self._short > 1:
            missing = [f"rank {rank} {samples} of {share}" for rank, (samples, share) in enumerate(zip(announcement.held, shares)) if samples < share]
            raise PlanError(
                f"the loaders give {announcement.samples} samples a step for a target batch of {target}, twice in a row ({', '.join(missing[:4])}): "
                "loop over plan.windows(DataLoader(dataset, batch_sampler=plan.batch_sampler(dataset)))"
            )

    def handed_over(self, whole: Window, found: WindowAnnouncement) -> Window:
        """This rank's window, plus its part of the samples of ranks that are out; an empty window if this rank is out."""
        samples_by_rank = [0 if rank in self.out else samples for rank, samples in enumerate(found.held)]
        window = whole
        for source in self.out:
            if not found.held[source]:
                continue
            own_rank = self.ranks.rank
            parts, sizes, sizes_given = self.ranks.handed(
                (whole.parts, whole.sizes, whole.told) if own_rank == source else ((), (), False), source, "handing samples over"
            )
            extra = self._fleet.with_more(samples_by_rank, found.held[source], self.out)
            start = sum(extra[:own_rank])
            if own_rank == source:
                window = Window((), ())
            elif extra[own_rank]:
                window = window.joined(Window(parts, sizes, whole.split, told=sizes_given).between(start, start + extra[own_rank]))
            samples_by_rank = [before + more for before, more in zip(samples_by_rank, extra)]
        return window

    def steps(self, found: WindowAnnouncement) -> int:
        """The number of micro-steps that every rank runs in this window; 0 if ranks may run different numbers."""
        return self._fleet.steps_of(found.held) if self._fleet.lockstep else 0

    def ran_out(self, out: Sequence[int]) -> None:
        """From now on these ranks run nothing, and the others run their samples. Raises `RanksDisagree` if no rank is left."""
        self.out = tuple(sorted({*self.out, *out}))
        if len(self.out) == self.ranks.world_size:
            raise RanksDisagree("no rank is left that can hold one sample: start again with a plan that is tuned anew")
        log.warning("%s cannot hold one sample any more: the others run its samples, and it still steps; tune again when you can", ranks_in_words(out))
        self.trouble()

    def trouble(self) -> None:
        """From now on, `careful_windows` windows are run with a vote."""
        self._careful_left = self._careful_windows or 0

    def went_by(self, rescued: bool) -> None:
        """Called at the end of each window. rescued: True if an out-of-memory changed how this rank ran it."""
        if rescued:
            self.trouble()
        else:
            self._careful_left = max(self._careful_left - 1, 0)
