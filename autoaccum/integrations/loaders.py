"""Copies of a `DataLoader` with other batches."""

from __future__ import annotations

from typing import Any

from torch.utils.data import BatchSampler, DataLoader


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
