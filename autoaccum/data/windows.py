"""A loader of any batch size, regrouped into windows; and a window, cut into micro-batches."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, RandomSampler

from autoaccum.data import batches
from autoaccum.data.sampler import WindowSampler
from autoaccum.errors import PlanError

Cut = Iterable[tuple[Any, int]]  # micro-batches and their samples; may be gone through again
_END = object()
Splitter = Callable[[Any, Sequence[int]], Sequence[Any]]


class Window:
    """The samples of one optimizer step on one rank, as the loader gave them; on the host until they run.

    parts: batches, or the pieces of batches, in order. sizes: samples of each. samples: of all.
    told: True where somebody said how many samples a part holds, because its first dimension does not: then parts are
    cut by `split` alone, and never joined. arranged: True where parts are micro-batches of as many samples as their length allows.
    of_all: samples of this window over all ranks, where that is known to be more.
    """

    def __init__(
        self,
        parts: Sequence[Any],
        sizes: Sequence[int],
        split: Splitter | None = None,
        *,
        told: bool = False,
        arranged: bool = False,
        of_all: int | None = None,
    ) -> None:
        self.parts, self.sizes, self.samples = tuple(parts), tuple(sizes), sum(sizes)
        self.split, self.told, self.arranged = split, told, arranged
        self.of_all = self.samples if of_all is None else of_all

    def __repr__(self) -> str:
        return f"Window({self.samples} samples in {len(self.parts)} part{'s' if len(self.parts) != 1 else ''})"

    @classmethod
    def of(cls, parts: Iterable[Any], split: Splitter | None = None, samples: Callable[[Any], int] | None = None) -> Window:
        """A window of batches that are at hand. Raises `PlanError` for one whose samples cannot be counted."""
        held = list(parts)
        return cls(held, [counted(part, samples) for part in held], split, told=samples is not None)

    def between(self, start: int, stop: int) -> Window:
        """The samples from `start` up to `stop`. Raises `PlanError` where a part would have to be cut and cannot be."""
        parts, sizes, at = [], [], 0
        for part, have in zip(self.parts, self.sizes):
            first, last = max(start - at, 0), min(stop - at, have)
            at += have
            if first >= last:
                continue
            if last - first < have:
                if self.told and self.split is None:
                    raise PlanError(f"a batch of {have} samples cannot be cut, and a rank's part of the window ends inside it: give split=")
                kept = [size for size in (first, last - first, have - last) if size]
                part = self._pieces(part, kept, have)[1 if first else 0]
            parts.append(part)
            sizes.append(last - first)
        return Window(parts, sizes, self.split, told=self.told)

    def joined(self, other: Window) -> Window:
        """This window's samples and then the other's."""
        own = [(part, size) for part, size in zip(self.parts, self.sizes) if size]
        return Window(
            [*(part for part, _ in own), *other.parts], [*(size for _, size in own), *other.sizes], self.split or other.split, told=self.told or other.told
        )

    def cut_by(self, split: Splitter) -> Window:
        """The same window with a splitter, if it has none of its own."""
        return self if self.split is not None else Window(self.parts, self.sizes, split, told=self.told, arranged=self.arranged)

    def runs_as(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """What `cut` makes of these sizes, as far as it is known beforehand: parts that cannot be cut stay what they are."""
        return self.sizes if self.told and self.split is None else tuple(sizes)

    def cut(self, sizes: Sequence[int], *, most: int | None = None) -> Cut:
        """The window in micro-batches of `sizes`, which must sum to its samples.

        Parts are cut where a micro-batch ends and joined where one spans them; parts that cannot be joined
        (each padded to its own longest sample) come as smaller micro-batches. Parts that cannot be cut come as they
        are, if they hold no more than `most` (by default the largest of `sizes`). Raises `PlanError` for one that holds more.
        """
        if sum(sizes) != self.samples:
            raise PlanError(f"cannot cut {self.samples} samples into {list(sizes)}: that is {sum(sizes)}")
        if self.told and self.split is None:
            allowed = most or max(sizes)
            if max(self.sizes) > allowed:
                raise PlanError(
                    f"a batch of {max(self.sizes)} samples cannot be cut, and a micro-batch may hold {allowed}: "
                    "use DataLoader(batch_sampler=plan.batch_sampler(dataset)), give split=, or leave samples= out where the first dimension counts them"
                )
            return list(zip(self.parts, self.sizes))
        if len(self.parts) == 1:
            return list(zip(self._pieces(self.parts[0], sizes, self.samples), sizes))
        groups: list[list[tuple[Any, int]]] = []
        ends = iter(sizes)
        room = 0  # in the group that is being filled
        for part, have in zip(self.parts, self.sizes):
            lengths = []
            starts_group = []
            while have:
                fresh = room == 0
                room = room or next(ends)
                lengths.append(min(room, have))
                starts_group.append(fresh)
                room -= lengths[-1]
                have -= lengths[-1]
            for piece, length, fresh in zip(self._pieces(part, lengths, sum(lengths)), lengths, starts_group):
                if fresh:
                    groups.append([])
                groups[-1].append((piece, length))
        return [pair for group in groups for pair in group] if self.told else _Joined(groups)

    def _pieces(self, part: Any, sizes: Sequence[int], samples: int) -> Sequence[Any]:
        if len(sizes) == 1:
            return [part]
        return self.split(part, sizes) if self.split is not None else batches.split(part, sizes, samples=samples)


class _Joined:
    """Micro-batches that are joined when their turn comes; may be gone through again."""

    def __init__(self, groups: list[list[tuple[Any, int]]]) -> None:
        self._groups = groups

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        for group in self._groups:
            joined = batches.join([batch for batch, _ in group]) if len(group) > 1 else None
            if joined is None:
                yield from group
            else:
                yield joined, sum(samples for _, samples in group)


class Windows:
    """What `Plan.windows` returns: iterates a loader as windows of exactly `samples_of_all` samples, the last one smaller, or left out.

    Over ranks, each yields its own part: all of them read the same loader and keep the samples that are theirs, or each
    reads a loader with `Plan.batch_sampler`, which gives it no others. `shares(samples)` says how many each rank has of a window;
    `alike` is given a checksum of the first batch, and raises where ranks read unlike ones.
    Each iteration is one epoch. It has a length where the loader's number of samples is known.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        share: int,
        *,
        samples: Callable[[Any], int] | None = None,
        split: Splitter | None = None,
        drop_last: bool = False,
        shares: Callable[[int], Sequence[int]] | None = None,
        rank: int = 0,
        alike: Callable[[int], object] | None = None,
    ) -> None:
        if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
            raise PlanError(f"windows takes a loader, not a dataset (a {type(loader).__name__}): give DataLoader(dataset, batch_size=...), of any size")
        if not hasattr(loader, "__iter__") or _is_one_batch(loader):
            raise PlanError(f"windows takes a loader of batches, not one batch (a {type(loader).__name__}): give the DataLoader itself")
        self._loader, self._share, self._samples, self._split, self._drop_last = loader, share, samples, split, drop_last
        self._shares, self._rank, self._alike = shares, rank, alike
        self._sampler = _window_sampler(loader)
        if self._sampler is not None:
            if drop_last != self._sampler.drop_last:
                raise PlanError(
                    f"drop_last={drop_last}, and the loader's sampler has {self._sampler.drop_last}: say it in plan.batch_sampler(dataset, drop_last=...)"
                )
        elif shares is not None:
            _check_alike(loader)

    def __iter__(self) -> Iterator[Window]:
        if self._sampler is not None:
            yield from self._sampled(self._sampler)
            return
        for window in self._regrouped():
            if self._shares is None:
                yield window
                continue
            shares = self._shares(window.samples)
            start = sum(shares[: self._rank])
            if shares[self._rank]:
                own, sizes = window.between(start, start + shares[self._rank]), None
            else:  # it has a sample to run where forward communicates, as with `Plan.batch_sampler`
                own, sizes = window if window.told and window.split is None else window.between(0, 1), (0,)
            yield Window(own.parts[: len(sizes or own.sizes)], sizes or own.sizes, own.split, told=own.told, of_all=window.samples)

    def state_dict(self) -> dict[str, int]:
        """Where the windows that were yielded end, for `load_state_dict`; of a loader with `Plan.batch_sampler` only.

        The sampler's own state is where the loader has read to, which may be further.
        """
        return self._told_sampler().state_of(self._epoch, self._done)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on from there, with any number of ranks. Raises `PlanError` for other data or another order."""
        self._told_sampler().load_state_dict(state)
        self._epoch, self._done = state["epoch"], state["done"]

    _epoch = _done = 0

    def _told_sampler(self) -> WindowSampler:
        if self._sampler is None:
            raise PlanError("only a loader with plan.batch_sampler(dataset) has a state: DataLoader(dataset, batch_sampler=plan.batch_sampler(dataset))")
        return self._sampler

    def _sampled(self, sampler: WindowSampler) -> Iterator[Window]:
        """The loader's batches are this rank's micro-batches already; the sampler knows which belong together."""
        read = iter(self._loader)
        ahead = [batch for batch in [next(read, _END)] if batch is not _END]  # only now the sampler has begun, where it was told to
        self._epoch, self._done, inside = sampler.began
        if inside:
            raise PlanError("the loader goes on inside a window, whose first micro-batches are gone: load a state of the end of a window")
        for start, sizes in sampler.windows(self._done) if ahead else ():
            parts = [ahead.pop() if ahead else next(read) for _ in sizes]
            of_all = min(sampler.target, sampler.length - start)
            self._done = start + of_all
            if self._samples is not None and any(sizes):
                sizes = tuple(int(self._samples(part)) if size else 0 for part, size in zip(parts, sizes))
            yield Window(parts, sizes, self._split, told=self._samples is not None, arranged=sampler.arrange is not None, of_all=of_all)
        self._epoch, self._done = self._epoch + 1, 0

    def _regrouped(self) -> Iterator[Window]:
        parts: list[Any] = []
        sizes: list[int] = []
        ragged = even = False
        for index, batch in enumerate(self._loader):
            if index == 0 and self._alike is not None:
                self._alike(_checksum(batch))
            # Whether a list holds samples or fields is told by what it holds; of a ragged loader, some batch may happen to be even.
            if batches.is_list_of_samples(batch) and not ragged:
                if even:
                    raise PlanError(
                        "the loader gives lists of tensors, first of one length, which were taken for fields, then of unlike lengths, which are samples: "
                        "give samples=len and split= with a function that cuts a list"
                    )
                ragged = True
            even = even or (isinstance(batch, list) and not ragged)
            batch = batches.as_samples(batch) if ragged else batch
            have = counted(batch, self._samples)
            while have:
                room = self._share - sum(sizes)
                piece, taken = batch, have
                if have > room:
                    taken = room
                    piece, batch = self._halves(batch, room, have - room)
                parts.append(piece)
                sizes.append(taken)
                have -= taken
                if taken == room:
                    yield Window(parts, sizes, self._split, told=self._samples is not None)
                    parts, sizes = [], []
        if parts and not self._drop_last:
            yield Window(parts, sizes, self._split, told=self._samples is not None)

    def __len__(self) -> int:
        """Windows in an epoch. Raises `TypeError` where the loader does not tell its samples."""
        if self._sampler is not None:
            return sum(1 for _ in self._sampler.windows(0))
        whole, rest = divmod(samples_in(self._loader), self._share)
        return whole + (1 if rest and not self._drop_last else 0)

    def _halves(self, batch: Any, first: int, rest: int) -> Sequence[Any]:
        try:
            if self._split is None and self._samples is not None:
                raise PlanError("its samples were told, and nobody said how to cut it")
            return (self._split or batches.split)(batch, [first, rest])
        except PlanError as error:
            raise PlanError(
                f"a loader batch of {first + rest} samples does not end where a window of {self._share} does, and cannot be cut: "
                "use DataLoader(batch_sampler=plan.batch_sampler(dataset)), give split=, or leave samples= out where the first dimension counts them"
            ) from error


def counted(batch: Any, samples: Callable[[Any], int] | None = None) -> int:
    """Samples in a batch, as `samples` says or along its first dimension. Raises `PlanError` where neither tells."""
    if samples is not None:
        return int(samples(batch))
    try:
        return batches.count(batch)
    except PlanError as error:
        if isinstance(batch, (DataLoader, Windows)) or hasattr(batch, "__next__"):
            raise PlanError(f"a {type(batch).__name__} is not one batch: for window in plan.windows(loader): loop.step(window, loss)") from None
        if isinstance(batch, (torch.Tensor, list, tuple)) or hasattr(batch, "keys"):
            raise
        raise PlanError(f"{error}; for batches that cannot be cut, plan.windows(loader, samples=...) with a function that says how many they hold") from None


def _checksum(batch: Any) -> int:
    """Of the beginnings of its tensors."""
    found = 0
    for _, tensor in batches.tensors(batch):
        first = tensor.detach().flatten()[:1024].cpu().contiguous().view(torch.uint8).tolist()
        found = zlib.crc32(bytes(first), found)
    return found


def _window_sampler(loader: Any) -> WindowSampler | None:
    found = getattr(loader, "batch_sampler", None)
    return found if isinstance(found, WindowSampler) else None


def _check_alike(loader: Any) -> None:
    """Raises `PlanError` for a loader that is known not to give every rank the same samples in the same order."""
    cure = "use DataLoader(dataset, batch_sampler=plan.batch_sampler(dataset)), which gives every rank its share"
    sampler = getattr(loader, "sampler", None)
    batch_sampler = getattr(loader, "batch_sampler", None)
    if type(loader).__name__ in ("DataLoaderShard", "DataLoaderDispatcher") or type(batch_sampler).__name__ == "BatchSamplerShard":
        raise PlanError(f"the loader is shared out among the ranks by Accelerate already, evenly: {cure}, and do not prepare() it")
    if isinstance(sampler, DistributedSampler):
        raise PlanError(f"the loader is shared out among the ranks by DistributedSampler already, evenly: {cure}")
    if isinstance(sampler, RandomSampler) and sampler.generator is None:
        raise PlanError(f"the loader shuffles, and every rank in an order of its own: {cure}, or give the loader generator=torch.Generator().manual_seed(...)")


def _is_one_batch(given: Any) -> bool:
    """A tensor, a mapping, or fields side by side: tensors of one length and unlike shapes. Alike, they may be batches."""
    if isinstance(given, (torch.Tensor, str, bytes)) or hasattr(given, "keys"):
        return True
    if not isinstance(given, (list, tuple)) or not given or not all(isinstance(item, torch.Tensor) and item.dim() for item in given):
        return False
    return len({len(item) for item in given}) == 1 and len({(item.shape[1:], item.dtype) for item in given}) > 1


def samples_in(loader: Any) -> int:
    """Samples that a loader gives in an epoch. Raises `TypeError` where it does not tell."""
    if isinstance(loader, DataLoader) and loader.batch_size is not None and isinstance(loader.sampler, Sized):
        return len(loader) * loader.batch_size if loader.drop_last else len(loader.sampler)
    raise TypeError(f"a {type(loader).__name__} does not say how many samples it has, so its windows cannot be counted beforehand")
