"""`WindowSampler`: draws the samples of each window and gives every rank its slice.

A window is the same set of samples for any number and any kind of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch.utils.data import Sampler

from autoaccum.data.tokens import packed, slices
from autoaccum.errors import PlanError

# (number of samples in the window over all ranks) -> the micro-batch sizes of every rank
Cuts = Callable[[int], Sequence[Sequence[int]]]
Place = tuple[int, int]  # of a window: its epoch, and where it begins in the epoch's order


class WindowSampler(Sampler[list[int]]):
    """Yields the indices of this rank's micro-batches, one after the other, for `DataLoader(dataset, batch_sampler=...)`.

    `Plan.batch_sampler` makes it. Each iteration is one epoch; `set_epoch` chooses which.
    The shares of ranks may change from a window on that no rank has begun to read (`share_from`).
    The order of an epoch depends only on `seed` and the epoch's number. Window w holds samples w * target to (w + 1) * target of
    that order, and each rank takes its slice of the window. The state contains neither rank nor world size, so a stopped run can
    continue with other ranks. A rank without a share of a window reads one sample of it, because it must run something if forward
    communicates.

    length: the number of samples in the dataset.
    target: the number of samples in a window.
    cuts: a function that returns the micro-batch sizes of every rank for a window; a size of zero means no micro-batch.
    drop_last: True leaves out the smaller last window.
    arrange: a function that makes a window's indices into micro-batches, in place of `cuts`; for one rank only.
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
        self.epoch = self.done = self.in_window = 0  # progress of reading: samples in complete windows, micro-batches of the next window
        self.began = (0, 0, 0)  # (epoch, done, in_window) at the start of the last iteration
        self._reading = False
        self._shared: list[tuple[Place, Cuts]] = [((0, 0), cuts)]  # from which window on, ascending
        self._forgotten = 0  # how many earlier ones are not kept
        self._known_slices: dict[tuple[int, int], tuple[int, tuple[int, ...]]] = {}

    def __iter__(self) -> Iterator[list[int]]:
        if self._reading:  # the last iteration ended early: as with torch's samplers, this one is a new epoch
            self.set_epoch(self.epoch + 1)
        self._reading = True
        self.began = epoch, first, to_skip = self.epoch, self.done, self.in_window
        order = self._order(epoch)
        for start, samples in self._bounds(order, first):
            pieces = self._micro_batches(order[start : start + samples], (epoch, start))
            for index, piece in enumerate(pieces):
                if to_skip:
                    to_skip -= 1
                    continue
                is_last = index == len(pieces) - 1
                self.epoch, self.done, self.in_window = epoch, start + samples if is_last else start, 0 if is_last else index + 1
                yield piece
        self.set_epoch(epoch + 1)

    def __len__(self) -> int:
        """The number of this rank's micro-batches in an epoch."""
        return sum(len(sizes) for _, _, sizes in self.windows(0))

    @property
    def arranged(self) -> bool:
        """True if the sizes of micro-batches depend on their samples."""
        return self.arrange is not None

    def windows(self, start: int, epoch: int | None = None) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        """Yields the windows from `start` to the end of an epoch; of the one that is read if `epoch` is None. Once a loader has read ahead to its end, that is
        the next one.

        Of each: the position in the epoch's order where it begins, its samples over all ranks, and the sizes of this rank's micro-batches.
        """
        if epoch is None:
            epoch = self.began[0] if self._reading else self.epoch
        order = self._order(epoch) if self.arranged else ()
        for begin, samples in self._bounds(order, start):
            yield begin, samples, self._sizes(order[begin : begin + samples], samples, (epoch, begin))

    def _bounds(self, order: Sequence[int], start: int) -> Iterator[tuple[int, int]]:
        """Where each window begins in the order, and how many samples it has."""
        while start < self.length:
            samples = min(self.target, self.length - start)
            if samples < self.target and self.drop_last:
                return
            yield start, samples
            start += samples

    @property
    def unread(self) -> Place:
        """The first window of which nothing was read, also not ahead of the training."""
        return self.epoch, self.done + (self.target if self.in_window else 0)

    @property
    def following(self) -> Place:
        """Where the next iteration begins."""
        return (self.epoch + 1, 0) if self._reading else (self.epoch, self.done)

    def share_from(self, place: Place, cuts: Cuts) -> int:
        """Cuts windows with `cuts` from this place on. Returns the version of the shares, as in `version`. Raises `PlanError` for a window that is read already."""
        if place < self.unread:
            raise PlanError(f"windows of {self.target} samples are read up to {self.unread}, and new shares begin at {place}")
        kept = [self._shared[0], *((begins, each) for begins, each in self._shared[1:] if begins < place)]
        self._forgotten += len(self._shared) - len(kept)  # so that no version stands for two shares
        self._shared = [*kept, (place, cuts)]
        return self.version(place)

    def version(self, place: Place) -> int:
        """How often shares had changed before the window that begins at this place."""
        return self._forgotten + sum(begins <= place for begins, _ in self._shared[1:])

    def _micro_batches(self, window: Sequence[int], place: Place) -> list[list[int]]:
        """This rank's micro-batches of a window, as indices; one sample for a rank that has none."""
        if self.arrange is not None:
            return list(self.arrange(window))
        first, sizes = self._slice(len(window), place)
        return [list(window[end : end + size]) if size else [window[0]] for end, size in zip(accumulate(sizes, initial=first), sizes)]

    def _sizes(self, window: Sequence[int], samples: int, place: Place) -> tuple[int, ...]:
        """The sizes of `_micro_batches`; a 0 for the sample of a rank that has none. window: empty unless `arranged`."""
        return self._slice(samples, place)[1] if self.arrange is None else tuple(map(len, self.arrange(window)))

    def set_epoch(self, epoch: int) -> None:
        """Makes the next iteration read this epoch from its start."""
        self.epoch, self.done, self.in_window, self._reading = epoch, 0, 0, False
        self._forget_places()

    def state_dict(self) -> dict[str, int]:
        """The position up to which the loader has read. Its workers read ahead; `Windows.state_dict` has the position of the training."""
        return {**self.state_of(self.epoch, self.done), "in_window": self.in_window}

    def state_of(self, epoch: int, done: int) -> dict[str, int]:
        """The state after `done` samples of the epoch, at the end of a window."""
        return {"seed": self.seed, "epoch": epoch, "done": done, "in_window": 0, "target": self.target, "length": self.length, "shuffle": int(self.shuffle)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues from a state. Raises `PlanError` for a state of other data, another order, or other windows."""
        for name in ("length", "seed", "target", "shuffle"):
            if state.get(name) != int(getattr(self, name)):
                raise PlanError(f"the state is of {name} {state.get(name)}, and this sampler has {int(getattr(self, name))}: its windows would be others")
        self.epoch, self.done, self.in_window, self._reading = state["epoch"], state["done"], state.get("in_window", 0), False
        self._forget_places()

    def _forget_places(self) -> None:
        """Where reading goes back, all is read with the last shares."""
        if (self.epoch, self.done) < self._shared[-1][0]:
            self._forgotten += len(self._shared) - 1
            self._shared = [((0, 0), self._shared[-1][1])]

    def _order(self, epoch: int) -> Sequence[int]:
        if not self.shuffle:
            return range(self.length)
        return torch.randperm(self.length, generator=torch.Generator().manual_seed(self.seed + epoch)).tolist()  # type: ignore[no-any-return]

    def _slice(self, samples: int, place: Place) -> tuple[int, tuple[int, ...]]:
        """The offset of this rank's samples in a window, and the sizes of its micro-batches; `(0,)` for a rank without samples."""
        version = self.version(place)
        if (samples, version) not in self._known_slices:
            cuts = self._shared[version - self._forgotten][1](samples)
            self._known_slices[samples, version] = (sum(map(sum, cuts[: self.rank])), tuple(cuts[self.rank]) or (0,))
        return self._known_slices[samples, version]


class TokenSampler(WindowSampler):
    """A `WindowSampler` whose windows hold at least `target` tokens, and one sample less would not hold them.

    tokens: what counts in every sample, in the dataset's order. lengths: what it takes of `budget`, the tokens of a micro-batch.
    padded: as in `tokens.packed`.
    shares: of every rank, in any unit. A rank's slice of a window is cut into micro-batches by itself.
    """

    def __init__(
        self,
        tokens: Sequence[float],
        target: int,
        budget: float,
        shares: Sequence[float],
        *,
        padded: bool,
        lengths: Sequence[float] | None = None,
        **order: Any,
    ) -> None:
        super().__init__(len(tokens), target, lambda _: (), **order)
        self.tokens, self._budget, self._shares, self.padded = tokens, budget, shares, padded
        self._lengths = tokens if lengths is None else lengths

    @property
    def arranged(self) -> bool:
        return True

    def _bounds(self, order: Sequence[int], start: int) -> Iterator[tuple[int, int]]:
        while start < self.length:
            held, end = 0.0, start
            while end < self.length and held < self.target:
                held, end = held + self.tokens[order[end]], end + 1
            if held < self.target and self.drop_last:
                return
            yield start, end - start
            start = end

    def tokens_in(self, start: int, samples: int) -> float:
        """The tokens of a window of the epoch that is read."""
        order = self._order(self.began[0])
        return float(sum(self.tokens[index] for index in order[start : start + samples]))

    def _own(self, window: Sequence[int]) -> Sequence[int]:
        first, end = slices([self.tokens[index] for index in window], self._shares)[self.rank]
        return window[first:end]

    def _micro_batches(self, window: Sequence[int], place: Place) -> list[list[int]]:
        return packed(self._own(window), self._lengths, self._budget, padded=self.padded) or [[window[0]]]

    def _sizes(self, window: Sequence[int], samples: int, place: Place) -> tuple[int, ...]:
        return tuple(map(len, packed(self._own(window), self._lengths, self._budget, padded=self.padded))) or (0,)
