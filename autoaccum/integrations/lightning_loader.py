"""The loader that Lightning reads: micro-batches, window by window, with the weight of each."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any, cast

import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, RandomSampler, SequentialSampler

from autoaccum.data import Window, Windows, WindowSampler, samples_in
from autoaccum.errors import PlanError
from autoaccum.loop import Progress
from autoaccum.plan import Plan


def copied(loader: DataLoader[Any], **batching: Any) -> DataLoader[Any]:
    """A loader of the same data with the same workers. batching: its `batch_sampler`, or its `sampler`, `batch_size` and `drop_last`."""
    workers: dict[str, Any] = {"persistent_workers": loader.persistent_workers, "prefetch_factor": loader.prefetch_factor} if loader.num_workers else {}
    return DataLoader(
        loader.dataset,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        **workers,
        **batching,
    )


def with_batches_of(loader: Any, batch_size: int) -> Any:
    """The same samples in the same order, in batches of `batch_size`; the loader itself if its batches are not slices of a sampler."""
    if type(loader) is not DataLoader or type(loader.batch_sampler) is not BatchSampler:
        return loader
    return copied(loader, sampler=loader.sampler, batch_size=batch_size, drop_last=loader.drop_last)


def is_any_order(loader: DataLoader[Any]) -> bool:
    """True if the loader reads its whole dataset, each sample once, in order or shuffled.

    Then `WindowSampler` can replace its sampler.
    """
    sampler, plain = loader.sampler, (RandomSampler, SequentialSampler, DistributedSampler)
    if isinstance(loader.dataset, IterableDataset) or not isinstance(sampler, plain) or loader.batch_size is None:
        return False
    return not isinstance(sampler, RandomSampler) or (not sampler.replacement and sampler.num_samples == len(cast(Sized, loader.dataset)))


def to_count(loader: DataLoader[Any], target: int, world_size: int, most: int | None) -> DataLoader[Any]:
    """A loader with one batch per window on every rank, of which there are at most `most`. A stream is returned itself, because its windows cannot be counted."""
    try:
        samples = len(cast(Sized, loader.dataset)) if is_any_order(loader) else samples_in(loader)
    except TypeError:
        return loader
    windows = samples // target if is_any_order(loader) and loader.drop_last else -(-samples // target)
    windows = windows if most is None else min(windows, most)
    return DataLoader(range(windows * world_size), batch_size=1)  # type: ignore[arg-type] # Lightning divides it between the ranks


def of_windows(plan: Plan, loader: DataLoader[Any]) -> DataLoader[Any]:
    """A loader of the same data in whole micro-batches. A stream or a loader with its own order is returned unchanged."""
    sampler = loader.sampler
    if not is_any_order(loader):
        return loader
    shuffle = sampler.shuffle if isinstance(sampler, DistributedSampler) else isinstance(sampler, RandomSampler)
    # On one rank the seed comes from torch's generator, so `seed_everything` controls it. Several ranks need the same seed.
    seed = torch.initial_seed() % 2**31 if plan.world_size == 1 else 0
    return copied(loader, batch_sampler=plan.batch_sampler(cast(Sized, loader.dataset), shuffle=shuffle, seed=seed, drop_last=loader.drop_last))


class Whole:
    """A window whose parts cannot be joined into one batch. Lightning passes on what it does not know."""

    def __init__(self, window: Window) -> None:
        self.window = window


Fed = tuple[float, Window | None]  # the weight of a micro-batch, and the window if it is its last one


class MicroBatches:
    """A loader of micro-batches, window by window. It appends to `fed` what belongs to each one.

    keeps_whole: True for a plan of one micro-batch that is cut later: what cannot be joined comes as a `Whole`.
    was_last: `was_last()`, True if the last micro-batch of the run that wrote a checkpoint was the last one of its epoch.

    Its state is the place in the data behind the last window that has ended.
    """

    def __init__(
        self,
        plan: Plan,
        loader: DataLoader[Any],
        fed: deque[Fed],
        count: Callable[[Any], float] | None,
        look: Callable[[Window], None],
        progress: Progress,
        *,
        keeps_whole: bool,
        was_last: Callable[[], bool],
    ) -> None:
        self._plan, self._loader, self._fed, self._count, self._look, self.progress = plan, loader, fed, count, look, progress
        self._keeps_whole, self._was_last = keeps_whole, was_last
        self.read_before: int | None = None  # micro-batches of this plan before the place that a state led to; None if none did
        self.dataset = loader.dataset
        self._drop_last = isinstance(loader.batch_sampler, WindowSampler) and loader.batch_sampler.drop_last

    def __iter__(self) -> Iterator[Any]:
        self._fed.clear()
        for window in self.progress.through(self._windows()):
            self._look(window)
            sizes = self._sizes(window.of_all, window.samples)
            pieces = list(window.cut([size for size in sizes if size], most=self._plan.micro_batch, elsewhere=True)) if window.samples else []
            if len(pieces) > len(sizes) and self._keeps_whole:
                self._check_count(window.parts, window.samples)
                self._fed.append((1.0, window))
                yield Whole(window)
                continue
            if len(pieces) > len(sizes):  # Lightning has counted the micro-batches already and would drop the rest
                raise PlanError(
                    f"a window came in {len(pieces)} micro-batches instead of {len(sizes)}, because its batches cannot be joined (padded to "
                    "unlike lengths): leave the sampler to EffectiveBatch, with shuffle=True or False"
                )
            # The ranks synchronize in every micro-batch. A rank with fewer pieces repeats one with weight 0.
            pieces += [(pieces[-1][0] if pieces else window.parts[0], 0)] * (len(sizes) - len(pieces))
            weighted = self._weighted(pieces, window.of_all)
            for index, (piece, weight) in enumerate(weighted):
                self._fed.append((weight, window if index == len(weighted) - 1 else None))
                yield piece

    def _windows(self) -> Windows:
        return self._plan.windows(self._loader, drop_last=self._drop_last)

    def state_dict(self) -> dict[str, Any]:
        """The place behind the last window that has ended; empty if it could not be found again."""
        try:
            return {**self.progress.state(), "seed": getattr(self._loader.batch_sampler, "seed", None)}
        except PlanError:
            return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there. Raises `PlanError` for another target, or other data."""
        if not state:
            return
        self.progress.load(state)
        sampler = self._loader.batch_sampler
        if isinstance(sampler, WindowSampler) and state["seed"] is not None:
            sampler.seed = state["seed"]
        place = state["place"]
        if place is not None:
            done = place["done"] // self._plan.target_batch + (place["done"] % self._plan.target_batch > 0) if "done" in place else place["windows"]
            windows = self._windows()
            windows.load_state_dict(dict(place))
            self.read_before = done * self._plan.accumulation_steps
            try:
                ended = done >= len(windows)
                if ended:
                    self.read_before = len(self)
            except TypeError:  # its windows cannot be counted
                ended = self._was_last()
            if ended:  # the next window is the first one of the next epoch
                place = {**place, "epoch": place["epoch"] + 1, "done" if "done" in place else "windows": 0}
        self.progress.load({**state, "place": place})

    def _weighted(self, pieces: list[tuple[Any, int]], of_all: int) -> list[tuple[Any, float]]:
        """The pieces of a window of `of_all` samples with the weights of their mean losses. Raises `PlanError` where nothing counts."""
        if self._count is None:
            return [(piece, self._plan.world_size * size / of_all) for piece, size in pieces]
        counts = self._check_count([piece for piece, _ in pieces], of_all)
        counted = next(piece for (piece, _), value in zip(pieces, counts) if value)
        # Lightning runs as many micro-batches as it was told. The mean over nothing is nan, and nan with weight 0 is nan.
        return [(piece if value else counted, value / sum(counts)) for (piece, _), value in zip(pieces, counts)]

    def _check_count(self, pieces: Sequence[Any], samples: int) -> list[float]:
        """What counts in each piece of a window. Raises `PlanError` where nothing does."""
        counts = [] if self._count is None else [float(self._count(piece)) for piece in pieces]
        if self._count is not None and not any(counts):
            raise PlanError(f"count= counts nothing in a window of {samples} samples, so its loss is the mean of nothing: leave such samples out of the data")
        return counts

    def __len__(self) -> int:
        """The number of micro-batches in an epoch, equal on every rank. Raises `TypeError` for a stream."""
        sampler, target = self._loader.batch_sampler, self._plan.target_batch
        if isinstance(sampler, WindowSampler):
            if self._plan.world_size == 1:
                return len(sampler)
            return sum(len(self._sizes(min(target, sampler.length - start))) for start, _, _ in sampler.windows(0))
        windows, rest = divmod(samples_in(self._loader), target)
        return windows * self._plan.accumulation_steps + (len(self._sizes(rest)) if rest else 0)

    def _sizes(self, of_all: int, own: int | None = None) -> tuple[int, ...]:
        """This rank's micro-batch sizes in a window of `of_all` samples over all ranks.

        Every rank has the same number; a size may be 0.
        """
        if self._plan.fleet is None:
            return self._plan.sizes(of_all if own is None else own)
        return self._plan.fleet.sizes(self._plan.rank, of_all)
