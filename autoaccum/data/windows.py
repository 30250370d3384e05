"""`Windows` regroups a loader of any batch size into windows; a `Window` is cut into micro-batches."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from itertools import groupby
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, RandomSampler

from autoaccum.data import batches
from autoaccum.data.sampler import WindowSampler
from autoaccum.data.tokens import TokenGauge
from autoaccum.errors import AutoaccumWarning, PlanError

Cut = Iterable[tuple[Any, int]]  # pairs of (micro-batch, number of its samples); can be iterated more than once
_END = object()
Splitter = Callable[[Any, Sequence[int]], Sequence[Any]]


class Window:
    """The samples of one optimizer step on one rank, as the loader gave them. They stay on the host until they run.

    parts: batches, or pieces of batches, in order.
    sizes: the number of samples in each part. samples: their sum.
    split: `split(batch, sizes)`, the user's function that cuts a part, or None.
    told: True if the user gave the sizes, because the first dimension does not count the samples. Then only `split` cuts parts,
    and parts are never joined.
    arranged: True if the parts are micro-batches already, whose sizes depend on the length of their samples.
    of_all: the samples of this window over all ranks; by default `samples`.
    regrouped: True if `Windows` made it. A smaller window is then the last one of an epoch; of other batches that can only be guessed.
    position: the place in the data behind this window, for `Windows.load_state_dict`; None if `Windows` did not make it, or if the place cannot be found again.
    drawn: the sampler that drew it, and the version of the ranks' shares by which it did; None without a sampler.
    """

    position: dict[str, int] | None = None
    drawn: tuple[WindowSampler, int] | None = None

    def __init__(
        self,
        parts: Sequence[Any],
        sizes: Sequence[int],
        split: Splitter | None = None,
        *,
        told: bool = False,
        arranged: bool = False,
        of_all: int | None = None,
        regrouped: bool = False,
    ) -> None:
        self.regrouped = regrouped
        self.parts, self.sizes, self.samples = tuple(parts), tuple(sizes), sum(sizes)
        self.split, self.told, self.arranged = split, told, arranged
        self.of_all = self.samples if of_all is None else of_all

    def __repr__(self) -> str:
        return f"Window({self.samples} samples in {len(self.parts)} part{'s' if len(self.parts) != 1 else ''})"

    @classmethod
    def of(cls, parts: Iterable[Any], split: Splitter | None = None, samples: Callable[[Any], int] | None = None) -> Window:
        """A window made of batches. Raises `PlanError` for a batch whose samples cannot be counted.

        samples: `samples(batch)`, the number of samples in a batch; None takes the first dimension.
        """
        part_list = list(parts)
        return cls(part_list, [counted(part, samples, cut_by_user=split is not None) for part in part_list], split, told=samples is not None)

    def between(self, start: int, stop: int) -> Window:
        """The samples from `start` to `stop` as a window. Raises `PlanError` if a part has to be cut and cannot be cut."""
        parts, sizes, part_start = [], [], 0
        for part, part_size in zip(self.parts, self.sizes):
            first, last = max(start - part_start, 0), min(stop - part_start, part_size)
            part_start += part_size
            if first >= last:
                continue
            if last - first < part_size:
                if self.told and self.split is None:
                    raise PlanError(f"a batch of {part_size} samples cannot be cut, and a rank's part of the window ends inside it: give split=")
                cut_sizes = [size for size in (first, last - first, part_size - last) if size]
                part = self._pieces(part, cut_sizes, part_size)[1 if first else 0]
            parts.append(part)
            sizes.append(last - first)
        return Window(parts, sizes, self.split, told=self.told)

    def joined(self, other: Window) -> Window:
        """A window with the samples of this window, followed by the samples of `other`."""
        own_parts = [(part, size) for part, size in zip(self.parts, self.sizes) if size]
        return Window(
            [*(part for part, _ in own_parts), *other.parts],
            [*(size for _, size in own_parts), *other.sizes],
            self.split or other.split,
            told=self.told or other.told,
        )

    def cut_by(self, split: Splitter) -> Window:
        """The same window with `split` as its splitter, or the window itself if it has a splitter."""
        return self if self.split is not None else Window(self.parts, self.sizes, split, told=self.told, arranged=self.arranged, regrouped=self.regrouped)

    def runs_as(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """The micro-batch sizes that `cut(sizes)` is expected to return. Parts that cannot be cut keep their sizes."""
        return self.sizes if self.told and self.split is None else tuple(sizes)

    def cut(self, sizes: Sequence[int], *, most: int | None = None, elsewhere: bool = False) -> Cut:
        """Cuts the window into micro-batches of `sizes`, which must sum to the window's samples.

        Parts are cut at the end of a micro-batch, and joined if a micro-batch spans several parts. Where parts cannot be joined
        (for example, each padded to its own longest sample) become smaller micro-batches. Parts that cannot be cut stay as they are.
        most: the largest size allowed for a part that cannot be cut; by default the largest of `sizes`.
        elsewhere: True if `most` is all that limits a micro-batch. Where parts cannot be joined, each is then cut by itself, into as few
        micro-batches as it takes.
        Raises `PlanError` for a part that cannot be cut and holds more, and if the sizes do not sum to the window's samples.
        """
        if sum(sizes) != self.samples:
            raise PlanError(f"cannot cut {self.samples} samples into {list(sizes)}: that is {sum(sizes)}")
        if self.told and self.split is None:
            allowed = most or max(sizes)
            if max(self.sizes) > allowed and not self.arranged:
                raise PlanError(
                    f"a batch of {max(self.sizes)} samples cannot be cut, and a micro-batch may hold {allowed}: "
                    "use DataLoader(batch_sampler=plan.batch_sampler(dataset)), give split=, or leave samples= out where the first dimension counts them"
                )
            return list(zip(self.parts, self.sizes))
        if tuple(sizes) == self.sizes:  # the parts are the micro-batches already
            return list(zip(self.parts, self.sizes))
        if len(self.parts) == 1:
            return list(zip(self._pieces(self.parts[0], sizes, self.samples), sizes))
        groups: list[list[tuple[Any, int]]] = []
        ends = iter(sizes)
        room = 0  # samples that the current group still needs
        for part, remaining in zip(self.parts, self.sizes):
            lengths = []
            starts_group = []
            while remaining:
                starts_here = room == 0
                room = room or next(ends)
                lengths.append(min(room, remaining))
                starts_group.append(starts_here)
                room -= lengths[-1]
                remaining -= lengths[-1]
            for piece, length, starts_here in zip(self._pieces(part, lengths, sum(lengths)), lengths, starts_group):
                if starts_here:
                    groups.append([])
                groups[-1].append((piece, length))
        return [pair for group in groups for pair in group] if self.told else _Joined(self, groups, (most or max(sizes)) if elsewhere else None)

    def _pieces(self, part: Any, sizes: Sequence[int], samples: int) -> Sequence[Any]:
        if len(sizes) == 1:
            return [part]
        return self.split(part, sizes) if self.split is not None else batches.split(part, sizes, samples=samples)


class _Joined:
    """Micro-batches that are joined only when they are iterated. Can be iterated more than once.

    most: the largest size allowed, if that is all that limits a micro-batch; None keeps the cuts. Where a micro-batch spans parts of unlike shapes, the
    window is then cut between those parts instead, and what is alike as evenly as it can be: cuts at the planned places would only add
    micro-batches.
    """

    def __init__(self, window: Window, groups: list[list[tuple[Any, int]]], most: int | None) -> None:
        self._window, self._groups, self._most = window, groups, most
        self._unlike: bool | None = None

    @property
    def sizes(self) -> list[int]:
        """The samples of each micro-batch, where parts cannot be joined too."""
        found = []
        for group in self._groups:
            alike = len({repr(batches.of_one(part)) for part, _ in group}) == 1
            found += [sum(size for _, size in group)] if alike else [size for _, size in group]
        return found

    def _spans_unlike(self) -> bool:
        """True if a micro-batch spans parts whose samples have unlike shapes."""
        if self._unlike is None:
            several = (group for group in self._groups if len(group) > 1)
            self._unlike = any(batches.of_one(part) != first for group in several for first in [batches.of_one(group[0][0])] for part, _ in group[1:])
        return self._unlike

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        if self._most is not None and self._spans_unlike():
            pairs = zip(self._window.parts, self._window.sizes)
            for _, alike in groupby(pairs, key=lambda pair: batches.of_one(pair[0])):
                parts, sizes = zip(*alike)
                samples = sum(sizes)
                steps = -(-samples // self._most)
                size, larger = divmod(samples, steps)
                yield from Window(parts, sizes, self._window.split).cut((size + 1,) * larger + (size,) * (steps - larger), most=self._most)
            return
        for group in self._groups:
            micro_batch = batches.join([batch for batch, _ in group]) if len(group) > 1 else None
            if micro_batch is None:
                yield from group
            else:
                yield micro_batch, sum(samples for _, samples in group)


class Windows:
    """Iterates a loader as windows of exactly `share` samples; the last window is smaller, or left out. `Plan.windows` makes it.

    Each iteration is one epoch. `len` works if the loader's number of samples is known.
    On several ranks, each rank yields its own part of every window. Either all ranks read the same loader, and each keeps its own
    samples; or each rank's loader has `Plan.batch_sampler`, and reads only that rank's samples.

    share: the samples of a window, over all ranks if `shares` is given.
    samples, split, drop_last: as in `Plan.windows`.
    shares: `shares(samples)`, the samples of each rank in a window; None on one rank.
    gauge: says where a window ends that is counted in tokens; None for windows of `share` samples.
    alike: called with a checksum of the first batch; raises if the ranks read different batches.
    Raises `PlanError` for a dataset or a single batch in place of a loader, and for a loader that does not suit the ranks.
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
        gauge: TokenGauge | None = None,
    ) -> None:
        if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
            raise PlanError(f"windows takes a loader, not a dataset (a {type(loader).__name__}): give DataLoader(dataset, batch_size=...), of any size")
        if not hasattr(loader, "__iter__") or _is_one_batch(loader):
            raise PlanError(f"windows takes a loader of batches, not one batch (a {type(loader).__name__}): give the DataLoader itself")
        self._loader, self._share, self._samples, self._split, self._drop_last = loader, share, samples, split, drop_last
        self._shares, self._rank, self._alike, self._gauge = shares, rank, alike, gauge
        self.ends: Callable[[], bool] = lambda: False  # asked before and after each window; a loop that is to stop answers True
        self._sampler = _window_sampler(loader)
        if self._sampler is not None:
            if drop_last != self._sampler.drop_last:
                raise PlanError(
                    f"drop_last={drop_last}, and the loader's sampler has {self._sampler.drop_last}: say it in plan.batch_sampler(dataset, drop_last=...)"
                )
        elif shares is not None:
            _check_unsharded(loader)

    def shared_by(self, shares: Callable[[int], Sequence[int]]) -> Windows:
        """The same, with shares that may change from window to window. A sampler shares windows out before they are read (`WindowSampler.share_from`)."""
        self._shares = shares
        return self

    @property
    def sampler(self) -> WindowSampler | None:
        """What draws the windows of the loader; None for a plain loader."""
        return self._sampler

    def __iter__(self) -> Iterator[Window]:
        self.is_open = True
        try:
            yield from self._whole()
        finally:
            self.is_open = False

    def _whole(self) -> Iterator[Window]:
        if self.ends():
            return
        finds_again = self._sampler is not None or not _shuffles(self._loader)
        samples = 0
        to_skip, self._to_skip = self._to_skip, 0
        for number, window in enumerate(self._windows()):
            if self._sampler is None:
                self._done = number + 1
            if number < to_skip:
                continue
            window.regrouped = True
            window.position = self.state_dict() if finds_again else None
            samples += window.of_all
            yield window
            if self.ends():
                return
        if samples < self._share and not to_skip and self._gauge is None and self._sampler is None:
            told = f"an epoch of this loader has {samples} samples" if samples or not self._drop_last else "an epoch of this loader has no whole window"
            warnings.warn(
                f"{told}, and the target batch is {self._share}: "
                + ("with drop_last=True there is no step at all" if self._drop_last else "every step is smaller"),
                AutoaccumWarning,
                stacklevel=2,
            )
        if self._sampler is None:
            self._epoch, self._done = self._epoch + 1, 0

    def _windows(self) -> Iterator[Window]:
        if self._sampler is not None:
            yield from self._sampled(self._sampler)
            return
        for window in self._regrouped():
            if self._shares is None:
                yield window
                continue
            start, stop = self._slice_of(window)
            if stop > start:
                own, sizes = window.between(start, stop), None
            else:  # this rank needs one sample to run if forward communicates, as with `Plan.batch_sampler`
                own, sizes = window if window.told and window.split is None else window.between(0, 1), (0,)
            yield Window(own.parts[: len(sizes or own.sizes)], sizes or own.sizes, own.split, told=own.told, of_all=window.samples)

    def _slice_of(self, window: Window) -> tuple[int, int]:
        """The first sample of this rank's part of a window, and the first one after it."""
        assert self._shares is not None
        if self._gauge is not None:
            whole = self._samples is not None and self._split is None
            return self._gauge.part_of(window.parts, window.sizes, self._shares(self._share), self._rank, whole=whole)
        shares = self._shares(window.samples)
        start = sum(shares[: self._rank])
        return start, start + shares[self._rank]

    def state_dict(self) -> dict[str, int]:
        """The position after the last yielded window, for `load_state_dict`.

        With `Plan.batch_sampler` it is a place in the data. The sampler's own state is the position up to which the loader has read, which may be
        later. Any other loader has to give the same batches again: the windows before the position are read and left out.
        Raises `PlanError` for a loader that shuffles by itself, whose order is another one in every run.
        """
        if self._sampler is not None:
            return self._sampler.state_of(self._epoch, self._done)
        if _shuffles(self._loader):
            raise PlanError(
                "the loader shuffles by itself, in another order in every run, so no place in it can be found again: "
                "DataLoader(dataset, batch_sampler=plan.batch_sampler(dataset)) shuffles by seed and epoch"
            )
        return {"epoch": self._epoch, "windows": self._done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues from a state, with any number of ranks. Raises `PlanError` for other data or another order."""
        if ("windows" in state) == (self._sampler is not None):
            raise PlanError("the state is of a loader with plan.batch_sampler, and this one has none, or the other way round: use the same kind of loader")
        if self._sampler is not None:
            self._sampler.load_state_dict(state)
            self._epoch, self._done = state["epoch"], state["done"]
            return
        self.state_dict()  # raises where no place can be found again
        self._epoch = state["epoch"]
        self._done = self._to_skip = state["windows"]

    def after(self, before: Windows) -> None:
        """Counts the epochs of a plain loader on from the windows of an earlier epoch, also of one that was left early. A sampler counts its own."""
        if self._sampler is None:
            self._epoch = before._epoch + (1 if before._done else 0)

    is_open = False  # True while somebody iterates
    _epoch = _done = _to_skip = 0  # of a plain loader, `_done` counts windows, otherwise samples

    def _sampled(self, sampler: WindowSampler) -> Iterator[Window]:
        """The windows of a loader with a `WindowSampler`.

        The loader's batches are this rank's micro-batches. The sampler gives their number in each window.
        """
        loader_iterator = iter(self._loader)
        first_batches = [batch for batch in [next(loader_iterator, _END)] if batch is not _END]  # `sampler.began` is set only when the first batch is read
        self._epoch, self._done, in_window = sampler.began
        if in_window:
            raise PlanError("the loader goes on inside a window, whose first micro-batches are gone: load a state of the end of a window")
        # The first dimension of samples that were put one after the other does not count them.
        told = self._samples is not None or not getattr(sampler, "padded", True)
        for start, of_all, sizes in sampler.windows(self._done, self._epoch) if first_batches else ():
            parts = [first_batches.pop() if first_batches else next(loader_iterator) for _ in sizes]
            self._done = start + of_all
            if self._samples is not None and any(sizes):
                sizes = tuple(int(self._samples(part)) if size else 0 for part, size in zip(parts, sizes))
            if self._gauge is not None and not told:
                self._gauge.compare(parts, sizes, sampler, start, of_all)
            window = Window(parts, sizes, self._split, told=told, arranged=sampler.arranged, of_all=of_all)
            window.drawn = sampler, sampler.version((self._epoch, start))
            yield window
        self._epoch, self._done = self._epoch + 1, 0

    def _regrouped(self) -> Iterator[Window]:
        parts: list[Any] = []
        sizes: list[int] = []
        ragged_seen = even_seen = False
        if self._gauge is not None:
            self._gauge.restart()  # an earlier iteration may have ended inside a window
        for index, batch in enumerate(self._loader):
            if index == 0 and self._alike is not None:
                self._alike(_checksum(batch))
            # The items decide if a list holds samples or fields. In a ragged loader, a batch may have samples of one length by chance.
            if batches.is_list_of_samples(batch) and not ragged_seen:
                if even_seen:
                    raise PlanError(
                        "the loader gives lists of tensors, first of one length, which were taken for fields, then of unlike lengths, which are samples: "
                        "give samples=len and split= with a function that cuts a list"
                    )
                ragged_seen = True
            even_seen = even_seen or (isinstance(batch, list) and not ragged_seen)
            batch = batches.as_samples(batch) if ragged_seen else batch
            remaining = counted(batch, self._samples, cut_by_user=self._split is not None)
            while remaining:
                if self._gauge is None:
                    piece_size = min(remaining, self._share - sum(sizes))
                    full = sum(sizes) + piece_size == self._share
                else:
                    piece_size, full = self._gauge.take(batch, remaining, whole=self._samples is not None and self._split is None)
                piece = batch
                if piece_size < remaining:
                    piece, batch = self._halves(batch, piece_size, remaining - piece_size)
                parts.append(piece)
                sizes.append(piece_size)
                remaining -= piece_size
                if full:
                    yield Window(parts, sizes, self._split, told=self._samples is not None)
                    parts, sizes = [], []
        if parts and not self._drop_last:
            yield Window(parts, sizes, self._split, told=self._samples is not None)

    def __len__(self) -> int:
        """The number of windows in an epoch. Raises `TypeError` if the loader's number of samples is not known."""
        if self._sampler is not None:
            return sum(1 for _ in self._sampler.windows(0))
        if self._gauge is not None:
            raise TypeError("windows of tokens cannot be counted before the samples are read: use plan.batch_sampler(dataset, tokens=...)")
        full_windows, rest = divmod(samples_in(self._loader), self._share)
        return full_windows + (1 if rest and not self._drop_last else 0)

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


def counted(batch: Any, samples: Callable[[Any], int] | None = None, *, cut_by_user: bool = False) -> int:
    """The number of samples in a batch: `samples(batch)`, or the length of the first dimension.

    cut_by_user: True if the user gave a function that cuts batches; only the number is missing then.
    Raises `PlanError` if the first dimension does not give the number.
    """
    if samples is not None:
        return int(samples(batch))
    try:
        return batches.count(batch)
    except PlanError as error:
        if isinstance(batch, (DataLoader, Windows)) or hasattr(batch, "__next__"):
            raise PlanError(f"a {type(batch).__name__} is not one batch: for window in plan.windows(loader): loop.step(window, loss)") from None
        if cut_by_user:
            why = str(error).partition(";")[0]
            raise PlanError(f"how many samples a batch holds is not known ({why}): give samples=, a function that says it for a batch") from None
        if isinstance(batch, (torch.Tensor, list, tuple)) or hasattr(batch, "keys"):
            raise
        raise PlanError(f"{error}; for batches that cannot be cut, plan.windows(loader, samples=...) with a function that says how many they hold") from None


def _checksum(batch: Any) -> int:
    """A checksum of the first 1024 values of each tensor in the batch."""
    checksum = 0
    for _, tensor in batches.tensors(batch):
        start_bytes = tensor.detach().flatten()[:1024].cpu().contiguous().view(torch.uint8).tolist()
        checksum = zlib.crc32(bytes(start_bytes), checksum)
    return checksum


def _window_sampler(loader: Any) -> WindowSampler | None:
    sampler = getattr(loader, "batch_sampler", None)
    return sampler if isinstance(sampler, WindowSampler) else None


def _shuffles(loader: Any) -> bool:
    """True for a loader that draws an order of its own."""
    return isinstance(getattr(loader, "sampler", None), RandomSampler)


def _check_unsharded(loader: Any) -> None:
    """Raises `PlanError` for a loader that does not give every rank the same samples in the same order, as far as its type shows."""
    remedy = "use DataLoader(dataset, batch_sampler=plan.batch_sampler(dataset)), which gives every rank its share"
    sampler = getattr(loader, "sampler", None)
    batch_sampler = getattr(loader, "batch_sampler", None)
    if type(loader).__name__ in ("DataLoaderShard", "DataLoaderDispatcher") or type(batch_sampler).__name__ == "BatchSamplerShard":
        raise PlanError(f"the loader is shared out among the ranks by Accelerate already, evenly: {remedy}, and do not prepare() it")
    if isinstance(sampler, DistributedSampler):
        raise PlanError(f"the loader is shared out among the ranks by DistributedSampler already, evenly: {remedy}")
    if isinstance(sampler, RandomSampler) and sampler.generator is None:
        raise PlanError(
            f"the loader shuffles, and every rank in an order of its own: {remedy}, or give the loader generator=torch.Generator().manual_seed(...)"
        )


def _is_one_batch(candidate: Any) -> bool:
    """True for a tensor, a mapping, or a sequence of tensors with the same length and different shapes or dtypes (fields of one batch).

    Tensors of the same shape and dtype may be a list of batches, so the result is False for them.
    """
    if isinstance(candidate, (torch.Tensor, str, bytes)) or hasattr(candidate, "keys"):
        return True
    if not isinstance(candidate, (list, tuple)) or not candidate or not all(isinstance(item, torch.Tensor) and item.dim() for item in candidate):
        return False
    if any(item.is_nested for item in candidate):
        return False  # each is a batch of its own
    return len({len(item) for item in candidate}) == 1 and len({(item.shape[1:], item.dtype) for item in candidate}) > 1


def samples_in(loader: Any) -> int:
    """The number of samples that a loader gives in an epoch. Raises `TypeError` if it is not known."""
    if isinstance(loader, DataLoader) and loader.batch_size is not None and isinstance(loader.sampler, Sized):
        return len(loader) * loader.batch_size if loader.drop_last else len(loader.sampler)
    raise TypeError(f"a {type(loader).__name__} does not say how many samples it has, so its windows cannot be counted beforehand")
