"""Which samples each rank takes from a window. A window is the same set of samples on any number of ranks, of any kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import torch
from torch.utils.data import Sampler

from autoaccum.errors import PlanError

# (samples of the window over all ranks) -> every rank's micro-batches
Cuts = Callable[[int], Sequence[Sequence[int]]]


class WindowSampler(Sampler[list[int]]):
    """Indices of one micro-batch of this rank after another: for `DataLoader(dataset, batch_sampler=...)`.

    Window w of an epoch is samples w * target to (w + 1) * target of an order that seed and epoch alone give, whatever
    the ranks; each takes its slice. Its state knows neither rank nor world, so a run goes on with other ranks where it stopped.
    A rank without a share of a window reads one sample of it, so that it has something to run where forward communicates.
    Each iteration is an epoch; `set_epoch` chooses one. drop_last: leaves the smaller last window out.

    Made by `Plan.batch_sampler`. target: samples of a window. cuts: every rank's micro-batches of a window; a zero is none.
    arrange: makes a window's indices into micro-batches instead, on one rank; where each begins is then of this order.
    """

    def __init__(
        self,
        length: int,
        target: int,
        cuts: Cuts,
        *,
        rank: int = 0,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        arrange: Callable[[Sequence[int]], Sequence[list[int]]] | None = None,
    ) -> None:
        self.arrange = arrange
        self.length, self.target, self.rank, self.shuffle, self.seed, self.drop_last = length, target, rank, shuffle, seed, drop_last
        self.epoch = self.done = self.in_window = 0  # read so far: samples in whole windows, and micro-batches of the one after these
        self.began = (0, 0, 0)  # where the last iteration started, in the same terms
        self._reading = False
        self._cuts = cuts
        self._known: dict[int, tuple[int, tuple[int, ...]]] = {}

    def __iter__(self) -> Iterator[list[int]]:
        if self._reading:  # the one before was left early: as with torch's samplers, this is a new epoch
            self.set_epoch(self.epoch + 1)
        self._reading = True
        self.began = epoch, first, skipped = self.epoch, self.done, self.in_window
        order = self._order(epoch)
        for start, sizes in self.windows(first):
            samples = min(self.target, self.length - start)
            if self.arrange is not None:
                pieces = list(self.arrange(order[start : start + samples]))
            else:
                ends = list(accumulate(sizes, initial=start + self._slice(samples)[0]))
                pieces = [list(order[end : end + size]) if size else [order[start]] for end, size in zip(ends, sizes)]
            for index, piece in enumerate(pieces):
                if skipped:
                    skipped -= 1
                    continue
                over = index == len(pieces) - 1
                self.epoch, self.done, self.in_window = epoch, start + samples if over else start, 0 if over else index + 1
                yield piece
        self.set_epoch(epoch + 1)

    def __len__(self) -> int:
        """Micro-batches of this rank in an epoch."""
        return sum(len(sizes) for _, sizes in self.windows(0))

    def windows(self, start: int) -> Iterator[tuple[int, tuple[int, ...]]]:
        """From `start` to the end of the epoch that is being read: where each window begins in its order, and this rank's micro-batches of it."""
        order = self._order(self.began[0] if self._reading else self.epoch) if self.arrange is not None else ()
        while start < self.length:
            samples = min(self.target, self.length - start)
            if samples < self.target and self.drop_last:
                return
            yield start, self._slice(samples)[1] if self.arrange is None else tuple(map(len, self.arrange(order[start : start + samples])))
            start += self.target

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is that epoch, from its start."""
        self.epoch, self.done, self.in_window, self._reading = epoch, 0, 0, False

    def state_dict(self) -> dict[str, int]:
        """Where the loader has read to; its workers read ahead. `Windows.state_dict` is what has been trained on."""
        return {**self.state_of(self.epoch, self.done), "in_window": self.in_window}

    def state_of(self, epoch: int, done: int) -> dict[str, int]:
        """The state after `done` samples of that epoch, at the end of a window."""
        return {"seed": self.seed, "epoch": epoch, "done": done, "in_window": 0, "target": self.target, "length": self.length, "shuffle": int(self.shuffle)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on from there. Raises `PlanError` for a state of other data, another order, or other windows."""
        for name in ("length", "seed", "target", "shuffle"):
            if state.get(name) != int(getattr(self, name)):
                raise PlanError(f"the state is of {name} {state.get(name)}, and this sampler has {int(getattr(self, name))}: its windows would be others")
        self.epoch, self.done, self.in_window, self._reading = state["epoch"], state["done"], state.get("in_window", 0), False

    def _order(self, epoch: int) -> Sequence[int]:
        if not self.shuffle:
            return range(self.length)
        return torch.randperm(self.length, generator=torch.Generator().manual_seed(self.seed + epoch)).tolist()  # type: ignore[no-any-return]

    def _slice(self, samples: int) -> tuple[int, tuple[int, ...]]:
        """Where this rank's samples start in a window, and its micro-batches; one of none where it has no samples."""
        if samples not in self._known:
            cuts = self._cuts(samples)
            self._known[samples] = (sum(map(sum, cuts[: self.rank])), tuple(cuts[self.rank]) or (0,))
        return self._known[samples]
