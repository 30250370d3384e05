"""The loader of a Trainer: micro-batches in whole windows, in the order of samples that the Trainer or its user decides."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from autoaccum.errors import PlanError
from autoaccum.integrations.trainer_counts import is_of_transformers
from autoaccum.plan import Plan, window_notation


def check_ragged(plan: Plan, trainer: Any) -> None:
    """Raises `PlanError` if a loader of unequal micro-batches cannot be made for this Trainer."""
    micro_batches = window_notation(plan.micro_batches)
    if isinstance(trainer.train_dataset, IterableDataset) or not hasattr(trainer.train_dataset, "__len__"):
        raise PlanError(f"{micro_batches} need a dataset with a length, and this one is a stream: tune(trainer, ..., equal=True)")
    strategy = getattr(trainer.args, "train_sampling_strategy", "random")
    if strategy not in ("random", "sequential") or getattr(trainer.args, "group_by_length", False):
        raise PlanError(f"{micro_batches} come from a sampler of ours, and this Trainer has one of its own ({strategy}): tune(trainer, ..., equal=True)")


class _Epochs(DataLoader[Any]):
    """A loader with `set_epoch`, which the Trainer calls to change the order."""

    def set_epoch(self, epoch: int) -> None:
        set_epoch = getattr(self.batch_sampler, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)


class _InOrder:
    """A batch sampler: the user's own order of samples, cut into the micro-batches of the plan's windows."""

    def __init__(self, plan: Plan, sampler: Any, *, drop_last: bool) -> None:
        self._plan, self._sampler, self._drop_last = plan, sampler, drop_last

    def __iter__(self) -> Iterator[list[int]]:
        window: list[int] = []
        for index in self._sampler:
            window.append(index)
            if len(window) == self._plan.target_batch:
                yield from self._cut(window)
                window = []
        if window and not self._drop_last:
            yield from self._cut(window)

    def __len__(self) -> int:
        whole, rest = divmod(len(self._sampler), self._plan.target_batch)
        return whole * self._plan.accumulation_steps + (len(self._plan.sizes(rest)) if rest and not self._drop_last else 0)

    def set_epoch(self, epoch: int) -> None:
        set_epoch = getattr(self._sampler, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)

    def _cut(self, window: list[int]) -> Iterator[list[int]]:
        start = 0
        for size in self._plan.sizes(len(window)):
            yield window[start : start + size]
            start += size


# Methods that decide which samples come when. https://huggingface.co/docs/transformers/main_classes/trainer
_ORDER_METHODS = ("get_train_dataloader", "_get_train_sampler", "_get_dataloader")


def _orders_by_itself(trainer: Any, get_train_dataloader: Any) -> str:
    """The name of a method of the user's that decides the order of samples, overridden in any class or on the instance; "" if none is."""
    for name in _ORDER_METHODS:
        method = get_train_dataloader if name == "get_train_dataloader" else getattr(trainer, name, None)
        if method is not None and not is_of_transformers(method):
            return name
    return ""


def window_loader(trainer: Any, plan: Plan, get_train_dataloader: Callable[[], Any]) -> DataLoader[Any]:
    """A loader of whole windows, one micro-batch at a time.

    Batches stay on the host until they are used: the Trainer reads a window ahead.
    """
    own = get_train_dataloader()
    forget(trainer, own)
    args = trainer.args
    # The order is the Trainer's own also where nobody overrode it, so that a checkpoint goes on in it with equal micro-batches, or on other ranks.
    method = _orders_by_itself(trainer, get_train_dataloader) or "get_train_dataloader"
    sampler = _InOrder(plan, _sampler_of(own, method, plan), drop_last=args.dataloader_drop_last)
    _check_a_window_is_left(sampler, plan)
    workers = (
        {"persistent_workers": args.dataloader_persistent_workers, "prefetch_factor": args.dataloader_prefetch_factor} if args.dataloader_num_workers else {}
    )
    return _Epochs(
        own.dataset,
        batch_sampler=sampler,
        collate_fn=own.collate_fn,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory and trainer.args.device.type == "cuda",
        worker_init_fn=own.worker_init_fn,
        **workers,
    )


def _sampler_of(loader: Any, method: str, plan: Plan) -> Any:
    """The sampler of the user's loader. Raises `PlanError` if its batches are not simply slices of one."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    # `loader.sampler` is another one, and in the order of the dataset, if the loader was given a batch sampler.
    sampler = getattr(batch_sampler, "sampler", None)
    slices = getattr(type(batch_sampler), "__iter__", None) is BatchSampler.__iter__
    if not isinstance(loader, DataLoader) or batch_sampler is None or not slices or not hasattr(sampler, "__len__"):
        raise PlanError(
            f"{window_notation(plan.micro_batches)} cannot keep the order of samples that {method}() of this Trainer decides, because its batches are put "
            "together by code of its own: tune(trainer, ..., equal=True)"
        )
    return _Order(batch_sampler)


class _Order:
    """The order of samples of a batch sampler."""

    def __init__(self, batch_sampler: BatchSampler) -> None:
        self._batch_sampler = batch_sampler

    def __iter__(self) -> Iterator[int]:
        return iter(self._batch_sampler.sampler)

    def __len__(self) -> int:
        return len(self._batch_sampler.sampler)  # type: ignore[arg-type] # checked by `_sampler_of`

    def set_epoch(self, epoch: int) -> None:
        for each in (self._batch_sampler, self._batch_sampler.sampler):
            set_epoch = getattr(each, "set_epoch", None)
            if set_epoch is not None:
                set_epoch(epoch)


class _WholeWindows:
    """A batch sampler that ends after the last whole window of another one.

    Otherwise `dataloader_drop_last=True` would leave out a micro-batch, and so other samples for each size of micro-batch.
    """

    def __init__(self, batch_sampler: Any, accumulation_steps: int) -> None:
        self._batch_sampler, self._steps = batch_sampler, accumulation_steps
        self._inner = getattr(batch_sampler, "batch_sampler", None)  # of one that gives a rank its part
        self.sampler = getattr(batch_sampler, "sampler", None) or getattr(self._inner, "sampler", None)

    def __iter__(self) -> Iterator[list[int]]:
        return itertools.islice(self._batch_sampler, len(self))

    def __len__(self) -> int:
        return len(self._batch_sampler) // self._steps * self._steps

    def set_epoch(self, epoch: int) -> None:
        for each in (self._batch_sampler, self._inner, self.sampler):
            set_epoch = getattr(each, "set_epoch", None)
            if set_epoch is not None:
                set_epoch(epoch)


def in_whole_windows(loader: Any, plan: Plan) -> Any:
    """A loader of equal micro-batches that ends after the last whole window of another; a stream, whose end is not known, is left as it is.

    Raises `PlanError` if no window is left.
    """
    if not hasattr(getattr(loader, "batch_sampler", None), "__len__") or type(loader).__name__ == "DataLoaderDispatcher":
        return loader
    from accelerate import skip_first_batches  # which Transformers needs

    # A loader takes no other batch sampler once it is made. This makes the same one again, around a batch sampler that skips nothing.
    loader = skip_first_batches(loader, 0)
    skipping = loader.batch_sampler if hasattr(loader.batch_sampler, "skip_batches") else loader.sampler
    whole = skipping.batch_sampler = _WholeWindows(skipping.batch_sampler, plan.accumulation_steps)
    # Where it goes on from a checkpoint, the Trainer skips batches of this loader, and looks no further than here for what has epochs.
    skipping.sampler, skipping.set_epoch = whole.sampler, whole.set_epoch
    _check_a_window_is_left(whole, plan)
    return loader


def _check_a_window_is_left(batch_sampler: Any, plan: Plan) -> None:
    if not len(batch_sampler):
        raise PlanError(
            f"the data has fewer samples than the target batch of {plan.target_batch}, and dataloader_drop_last=True leaves that window out: turn it off"
        )


def on_the_host(loader: Any, plan: Plan, *, drop_last: bool) -> Any:
    """Keeps the loader's batches on the host. Raises `PlanError` for a loader of another batch size than the plan's.

    drop_last: the loader ends after its last whole window.

    The Trainer reads a window ahead, which would use device memory that no micro-batch needs. It moves each batch later.
    """
    if type(loader).__name__ == "DataLoaderShard":
        loader.device = None
    size = getattr(loader, "batch_size", None) or getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    if isinstance(size, int) and size != plan.micro_batch:
        raise PlanError(
            f"get_train_dataloader() of this Trainer gives batches of {size}, and the plan's are {plan.micro_batch}: let it use self._train_batch_size"
        )
    return in_whole_windows(loader, plan) if drop_last else loader


def forget(trainer: Any, loader: Any) -> None:
    """Removes an unused loader from the accelerator's list."""
    loaders = trainer.accelerator._dataloaders
    loaders[:] = [known for known in loaders if known is not loader]
