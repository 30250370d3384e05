"""`ChangingShares`: when ranks share windows out anew, from what each has learned to hold and from the times that they take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from autoaccum.data import Window, Windows, WindowSampler
from autoaccum.distributed.announcement import RankTeam, WindowAnnouncement
from autoaccum.distributed.fleet import Fleet
from autoaccum.distributed.pace import Pace
from autoaccum.errors import UsageError

_MOST_ROUNDS = 3  # times that shares follow from what ranks have learned with the shares before
_TIMED_EVERY = 8  # windows, of which one is voted on to take the ranks' times


class ChangingShares:
    """The shares of ranks that train together, as they change. Every rank asks `agreed` after each window, and all take new shares before the same one.

    Where the windows of `through` have a sampler, its loaders have read ahead, and new shares begin with the first window that no rank has read.
    pace: takes the times of this rank's voted windows.
    """

    def __init__(self, team: RankTeam, fleet: Fleet, gpu: str, *, learns: bool, every: int | None) -> None:
        self._team, self._timed_every = team, min(_TIMED_EVERY, every or _TIMED_EVERY)
        team.votes_every = 1 if learns else self._timed_every
        self.pace = Pace(team.ranks, fleet, gpu, learned=not learns, pairs=fleet.pairs, every=every)
        self._follows = False  # True once windows come from `through`: other loaders keep the shares that they have
        self._stay = False
        self._windows: Windows | None = None  # that are iterated
        self._coming: tuple[WindowSampler, int, Fleet] | None = None  # of which sampler, and from which version on
        self._rounds, self._learns = 0, learns

    @classmethod
    def of(cls, team: RankTeam | None, fleet: Fleet | None, gpu: str, *, learns: bool, every: int | None, in_tokens: bool) -> ChangingShares | None:
        """None on one rank, and for a plan of trials unless `every` asks for it. Raises `UsageError` for what cannot be."""
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise UsageError(f"replan_after must be a number of windows, at least 1, or None, not {every!r}")
        if team is None or fleet is None or not (learns or every):
            return None
        if fleet.lockstep or in_tokens:
            raise UsageError("replan_after makes shares anew, and ranks in lockstep or with a target in tokens keep theirs: leave replan_after out")
        return cls(team, fleet, gpu, learns=learns, every=every)

    @property
    def are_kept(self) -> bool:
        """True if shares stay as they are: a rank is out, its loader does not follow, or two loaders are iterated in turn."""
        return bool(self._team.out) or not self._follows or self._stay

    def through(self, windows: Windows, shares_of: Callable[[int], Sequence[int]], now: Fleet) -> Windows:
        """The windows, shared out as they change. shares_of: every rank's samples of a window, of this many. now: the shares so far."""
        before, self._windows = self._windows, windows
        if before is not None and before.is_open and before.sampler is not windows.sampler:
            self._stay = True  # two loaders in turn, which have read ahead unlike far
        self._follows = True
        sampler = windows.sampler
        if sampler is not None and (before is None or before.sampler is not sampler):
            coming = now if self._coming is None or self._stay else self._coming[2]  # nothing of this loader is read yet
            version = sampler.share_from(sampler.following, self._cuts(coming))
            if coming is not now:
                self._coming = sampler, version, coming
        elif sampler is None and self._coming is not None and not self._stay:
            self._coming, self.pace.fleet = None, now
        return windows.shared_by(shares_of)

    def _cuts(self, fleet: Fleet) -> Callable[[int], Sequence[Sequence[int]]]:
        return partial(_whole_shares, fleet) if self._learns else fleet.cuts

    def agreed(self, announcement: WindowAnnouncement, *, settled: bool, most: int, is_whole: bool) -> Fleet | None:
        """Shares that all ranks take now; None if they stay, or come later by `due`. Called after each window.

        settled: this rank knows its largest micro-batch, `most`. is_whole: the window was no smaller than the target.
        """
        if not announcement.careful or not is_whole or self._coming is not None:
            return None
        self._team.timed()
        fleet, sampler = self.pace.agree(settled=settled, most=most, windows=self._team.windows), None if self._windows is None else self._windows.sampler
        if fleet is None or sampler is None:
            return fleet
        places = self._team.ranks.gathered(sampler.unread, "agreeing from which window on shares are new")
        self._coming = sampler, sampler.share_from(max(places), self._cuts(fleet)), fleet
        return None

    def due(self, window: Window) -> Fleet | None:
        """The shares that a sampler has cut this window by, if they are new to the loop."""
        if self._coming is None or window.drawn is None or window.drawn[0] is not self._coming[0] or window.drawn[1] < self._coming[1]:
            return None
        fleet, self._coming = self._coming[2], None
        return fleet

    def go_on_learning(self, *, are_new: bool) -> bool:
        """True if the ranks learn once more, with the shares that they took last. are_new: they are others than before."""
        self._rounds += 1
        return are_new and self._rounds < _MOST_ROUNDS

    def settle(self, fleet: Fleet) -> None:
        """Says that nothing more is learned: windows are voted on only to be timed, and a sampler draws micro-batches from now on."""
        self._team.votes_every = 0 if self.are_kept else self._timed_every
        self.pace.learned, self._learns = True, False
        if self._windows is not None and self._windows.sampler is not None:
            self._windows.sampler.share_from(self._windows.sampler.unread, fleet.cuts)


def _whole_shares(fleet: Fleet, samples: int) -> list[tuple[int, ...]]:
    """Every rank's part of a window as one batch, which is cut when it is known how much fits."""
    return [(share,) if share else () for share in fleet.of(samples)]
