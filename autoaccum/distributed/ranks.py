"""The ranks of a job, and how they agree: by collectives on the host, in a separate gloo group with a timeout.

Collectives on the device would wait in its queue behind the training's work. They cannot report which rank is missing,
and a timeout destroys the context.
"""

from __future__ import annotations

import pickle
import socket
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from autoaccum.distributed.environment import launched, restart_hazard
from autoaccum.errors import AutoaccumWarning, RanksDisagree, UsageError

TIMEOUT_S = 1800.0
Told = TypeVar("Told")


def here(group: Any = None, timeout_s: float = TIMEOUT_S) -> Ranks | None:
    """The ranks of `group`, or of the world without a group; None for a single rank. Every rank of the group must call it.

    Raises `UsageError` if torchrun started several ranks and `torch.distributed` is not initialised, or if the timeout is
    not positive.
    """
    if not (dist.is_available() and dist.is_initialized()):
        if (launch := launched()) is not None:
            raise UsageError(
                f"torchrun started {launch.world_size} ranks, and torch.distributed is not initialised: call torch.distributed.init_process_group() first"
            )
        return None
    members = dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)
    if len(members) < 2:
        return None
    if not timeout_s > 0:
        raise UsageError(f"rank_timeout_s must be more than 0 seconds, not {timeout_s!r}")
    ranks_by_key = _ranks_by_world.setdefault(dist.group.WORLD, {})
    key = (tuple(members), timeout_s)
    if key not in ranks_by_key:
        ranks_by_key[key] = made = Ranks(members, timeout_s)
        if made.rank == 0 and (hazard := restart_hazard()):
            warnings.warn(hazard, AutoaccumWarning, stacklevel=3)
    return ranks_by_key[key]


# By the world that the ranks belong to. The entry goes when that process group is destroyed.
_ranks_by_world: WeakKeyDictionary[Any, dict[tuple[tuple[int, ...], float], Ranks]] = WeakKeyDictionary()


class Ranks:
    """The ranks of one data-parallel job. `table`, `gathered`, `handed` and `same` are collectives: all ranks must call them.

    If a rank does not call within the timeout, or its process has ended, the others raise `RanksDisagree`.
    """

    def __init__(self, members: Sequence[int], timeout_s: float) -> None:
        self.members, self.timeout_s = tuple(members), timeout_s
        self.rank, self.world_size = self.members.index(dist.get_rank()), len(self.members)
        self._lost = False
        is_world = len(self.members) == dist.get_world_size()
        # A separate group, so that collectives of the job and of autoaccum cannot be mixed up.
        try:
            self._group = dist.new_group(list(self.members), timedelta(seconds=timeout_s), "gloo", use_local_synchronization=not is_world)
        except RuntimeError as error:
            raise self.lost(error, "meeting the others") from error

    def table(self, row: Sequence[float], what: str) -> list[list[float]]:
        """The rows of all ranks, by rank; every row has the same length.

        what: the current action, in words, for the error message if a rank is missing.
        """
        figures = torch.zeros(self.world_size, len(row), dtype=torch.float64)
        figures[self.rank] = torch.tensor(row, dtype=torch.float64)
        self._meet(lambda: dist.all_reduce(figures, group=self._group), what)
        return figures.tolist()  # type: ignore[no-any-return]

    def gathered(self, told: Told, what: str) -> list[Told]:
        """The values of all ranks, by rank. told: this rank's value, which must pickle. what: as in `table`."""
        own = pickle.dumps(told)
        sizes = [int(row[0]) for row in self.table([len(own)], what)]
        # Not `all_gather_object`, which needs NumPy.
        buffers = [bytearray(max(sizes)) for _ in sizes]
        mine = bytearray(max(sizes))
        mine[: len(own)] = own
        self._meet(lambda: dist.all_gather([_shared(buffer) for buffer in buffers], _shared(mine), group=self._group), what)
        return [pickle.loads(buffer[:size]) for buffer, size in zip(buffers, sizes)]

    def handed(self, told: Told, source: int, what: str) -> Told:
        """The value of rank `source`. told: this rank's value; only the source's is sent. what: as in `table`."""
        own = pickle.dumps(told) if self.rank == source else b""
        buffer = bytearray(int(self.table([len(own)], what)[source][0]))
        buffer[: len(own)] = own
        self._meet(lambda: dist.broadcast(_shared(buffer), self.members[source], group=self._group), what)
        return pickle.loads(buffer)  # type: ignore[no-any-return]

    def same(self, what: str, told: Told) -> Told:
        """Returns `told` if it is the same on all ranks. Otherwise raises `RanksDisagree`, which names the ranks that differ.

        what: a name for the value, for the error message.
        """
        answers = self.gathered(told, f"comparing {what}")
        variants = list(dict.fromkeys(map(repr, answers)))
        if len(variants) > 1:
            majority = max(variants, key=[repr(answer) for answer in answers].count)
            deviating = [rank for rank, answer in enumerate(answers) if repr(answer) != majority]
            differences = "; ".join(f"rank {rank} has {answers[rank]!r}" for rank in deviating[:4])
            raise RanksDisagree(f"ranks disagree on {what}: {differences}, the others {majority}: start every rank with the same")
        return told

    def _meet(self, collective: Any, what: str) -> None:
        if self._lost:
            raise RanksDisagree(f"a rank was lost earlier, so {what} cannot be done together: start the job again")
        try:
            collective()
        except RuntimeError as error:
            raise self.lost(error, what) from error

    def lost(self, error: RuntimeError, what: str) -> RanksDisagree:
        """The exception for a collective that failed with `error`. It names the missing ranks if they are known. what: as in `table`.

        Of several missing ranks one may still run: it waits for this rank in a group with a longer timeout. So only "or" is true.
        """
        self._lost = True
        missing = self._missing()
        who = " or ".join(f"rank {rank}" for rank in missing) or "a rank"
        return RanksDisagree(
            f"{who} did not come while rank {self.rank} was {what}: it ended, or did something else for too long; "
            f"its own output says why ({str(error).strip().splitlines()[0][:160]})"
        )

    def _missing(self) -> list[int]:
        """Ranks that do not write to torch's store within some seconds; an empty list if the store is gone, too.

        All ranks that still run call this.
        """
        with suppress(Exception):
            store = dist.distributed_c10d._get_default_store()
            name = "autoaccum/still_here/" + "-".join(map(str, self.members))
            store.set(f"{name}/{self.rank}", "1")
            deadline, missing = time.monotonic() + 8.0, []  # other ranks may have started to wait later, and so give up later
            for rank in range(self.world_size):
                key = f"{name}/{rank}"
                if rank == self.rank or store.check([key]):
                    continue
                try:
                    store.wait([key], timedelta(seconds=max(deadline - time.monotonic(), 0.05)))
                except RuntimeError:
                    missing.append(rank)
            return missing
        return []


def _shared(buffer: bytearray) -> torch.Tensor:
    """A tensor that shares the buffer's memory."""
    return torch.frombuffer(buffer, dtype=torch.uint8)


def host() -> str:
    """The name of this machine: the same for all ranks on it, different on other machines."""
    return socket.gethostname()
