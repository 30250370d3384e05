"""How ranks agree: by explicit reduction on a gloo group of their own, with a timeout.

A device's own collectives would wait in its queue behind the work, cannot say who is missing, and lose the context
when they time out. So ranks agree on the host.
"""

from __future__ import annotations

import pickle
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from autoaccum.distributed.environment import launched
from autoaccum.errors import RanksDisagree, UsageError

TIMEOUT_S = 1800.0
Told = TypeVar("Told")


def here(group: Any = None, timeout_s: float = TIMEOUT_S) -> Ranks | None:
    """The ranks of `group` (of all, without one), None where this process is alone. Every rank of the group calls it at the same moment.

    Raises `UsageError` where torchrun started several ranks and `torch.distributed` is not initialised.
    """
    if not (dist.is_available() and dist.is_initialized()):
        if (told := launched()) is not None:
            raise UsageError(
                f"torchrun started {told.world_size} ranks, and torch.distributed is not initialised: call torch.distributed.init_process_group() first"
            )
        return None
    members = dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)
    if len(members) < 2:
        return None
    if not timeout_s > 0:
        raise UsageError(f"rank_timeout_s must be more than 0 seconds, not {timeout_s!r}")
    met = _met.setdefault(dist.group.WORLD, {})
    known = (tuple(members), timeout_s)
    if known not in met:
        met[known] = Ranks(members, timeout_s)
    return met[known]


# By the world that they are part of: one that was destroyed takes its groups along.
_met: WeakKeyDictionary[Any, dict[tuple[tuple[int, ...], float], Ranks]] = WeakKeyDictionary()


class Ranks:
    """The ranks of one data-parallel job. Every method is called by all of them at the same moment.

    A rank that does not come within the timeout, or whose process has ended, makes the others raise `RanksDisagree`.
    """

    def __init__(self, members: Sequence[int], timeout_s: float) -> None:
        self.members, self.timeout_s = tuple(members), timeout_s
        self.rank, self.world_size = self.members.index(dist.get_rank()), len(self.members)
        self._lost = False
        whole = len(self.members) == dist.get_world_size()
        # Groups of their own, so that no collective of the job can be mistaken for one of ours.
        try:
            self._group = dist.new_group(list(self.members), timedelta(seconds=timeout_s), "gloo", use_local_synchronization=not whole)
        except RuntimeError as error:
            raise self.lost(error, "meeting the others") from error

    def table(self, row: Sequence[float], what: str) -> list[list[float]]:
        """Every rank's row of figures, by rank. what: the ranks are doing, for the message if one is missing."""
        figures = torch.zeros(self.world_size, len(row), dtype=torch.float64)
        figures[self.rank] = torch.tensor(row, dtype=torch.float64)
        self._meet(lambda: dist.all_reduce(figures, group=self._group), what)
        return figures.tolist()  # type: ignore[no-any-return]

    def gathered(self, told: Told, what: str) -> list[Told]:
        """What every rank told, by rank."""
        own = pickle.dumps(told)
        sizes = [int(row[0]) for row in self.table([len(own)], what)]
        # Not `all_gather_object`, which needs NumPy.
        buffers = [bytearray(max(sizes)) for _ in sizes]
        mine = bytearray(max(sizes))
        mine[: len(own)] = own
        self._meet(lambda: dist.all_gather([_shared(each) for each in buffers], _shared(mine), group=self._group), what)
        return [pickle.loads(buffer[:size]) for buffer, size in zip(buffers, sizes)]

    def handed(self, told: Told, source: int, what: str) -> Told:
        """What rank `source` told; what the others give is not looked at."""
        own = pickle.dumps(told) if self.rank == source else b""
        buffer = bytearray(int(self.table([len(own)], what)[source][0]))
        buffer[: len(own)] = own
        self._meet(lambda: dist.broadcast(_shared(buffer), self.members[source], group=self._group), what)
        return pickle.loads(buffer)  # type: ignore[no-any-return]

    def same(self, what: str, told: Told) -> Told:
        """`told`, where all ranks told the same. Raises `RanksDisagree` that names those which did not."""
        found = self.gathered(told, f"comparing {what}")
        values = list(dict.fromkeys(map(repr, found)))
        if len(values) > 1:
            usual = max(values, key=[repr(each) for each in found].count)
            other = [rank for rank, each in enumerate(found) if repr(each) != usual]
            says = "; ".join(f"rank {rank} has {found[rank]!r}" for rank in other[:4])
            raise RanksDisagree(f"ranks disagree on {what}: {says}, the others {usual}: start every rank with the same")
        return told

    def _meet(self, collective: Any, what: str) -> None:
        if self._lost:
            raise RanksDisagree(f"a rank was lost earlier, so {what} cannot be done together: start the job again")
        try:
            collective()
        except RuntimeError as error:
            raise self.lost(error, what) from error

    def lost(self, error: RuntimeError, what: str) -> RanksDisagree:
        """What to raise for a collective that failed with `error`: it names who is missing, as far as that can be found out."""
        self._lost = True
        missing = self._missing()
        who = f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}" if missing else "a rank"
        return RanksDisagree(
            f"{who} did not come while rank {self.rank} was {what}: it ended, or did something else for too long; "
            f"its own output says why ({str(error).strip().splitlines()[0][:160]})"
        )

    def _missing(self) -> list[int]:
        """Who does not answer the store either, asked by all who are still there; nobody where the store is gone, too."""
        with suppress(Exception):
            store = dist.distributed_c10d._get_default_store()
            name = "autoaccum/still_here/" + "-".join(map(str, self.members))
            store.set(f"{name}/{self.rank}", "1")
            until, missing = time.monotonic() + 8.0, []  # others may have begun to wait, and so give up, later
            for rank in range(self.world_size):
                key = f"{name}/{rank}"
                if rank == self.rank or store.check([key]):
                    continue
                try:
                    store.wait([key], timedelta(seconds=max(until - time.monotonic(), 0.05)))
                except RuntimeError:
                    missing.append(rank)
            return missing
        return []


def _shared(buffer: bytearray) -> torch.Tensor:
    """A tensor of the same memory."""
    return torch.frombuffer(buffer, dtype=torch.uint8)


def host() -> str:
    """A name for this machine that its ranks share, and no other's."""
    return socket.gethostname()
