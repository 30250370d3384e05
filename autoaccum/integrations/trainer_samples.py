"""The samples of a Trainer that a trial runs on: the longest of its data set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset

from autoaccum.data import batches, lengths
from autoaccum.errors import JobError, PlanError, UsageError
from autoaccum.integrations.trainer_counts import holds_pairs
from autoaccum.integrations.trainer_loader import forget
from autoaccum.window import RngState


def samples_of(batch: Any) -> int | None:
    """The number of samples in a batch; None if its first dimension does not count them."""
    try:
        return batches.count(batch)
    except PlanError:
        return None


def counts_samples(trainer: Any) -> bool:
    """True if the first dimension of a batch counts its samples, as far as two samples of the dataset show. Not so for pairs, patches, nodes of graphs."""
    data = trainer.train_dataset
    if isinstance(data, IterableDataset) or not hasattr(data, "__getitem__") or len(data) < 2:
        return False
    rng = RngState(trainer.args.device)  # a dataset may draw its augmentations
    rng.note()
    try:
        batch = trainer.data_collator([data[0], data[1]])
        return samples_of(batch) == 2 and not holds_pairs(trainer, batch)
    except Exception:
        return False  # the Trainer's own loader may prepare samples for its collator
    finally:
        rng.put_back()


def longest(trainer: Any, max_length: int | None, length: lengths.Length | None) -> tuple[Callable[[int], Any], Callable[[list[Any]], Any] | None]:
    """`make_batch(n)` with the longest samples of the training set, and the collator if a batch cannot be cut once it is put together."""
    if trainer.train_dataset is None:
        raise UsageError("the Trainer has no train_dataset to measure with: give batch=")
    loader = trainer.get_train_dataloader()
    forget(trainer, loader)
    data = loader.dataset
    if isinstance(data, IterableDataset):
        raise UsageError("the Trainer's dataset is a stream, whose longest sample nobody knows: give batch=, or a function make_batch(n)")
    if max_length is not None:
        data = _AtLength(data, max_length)
    return cuttable(data, length, loader.collate_fn)


def cuttable(data: Any, length: lengths.Length | None, collate: Callable[[list[Any]], Any]) -> tuple[Callable[[int], Any], Callable[[list[Any]], Any] | None]:
    """`make_batch(n)` with the longest samples of a dataset, and the collator if a batch cannot be cut once it is put together."""
    made: Callable[[int], Any] = lengths.worst_case(data, length=length, collate=collate)
    if samples_of(made(2)) == 2:
        return made, None
    # Batches of patches or of flattened texts: samples are cut before they are put together.
    return lengths.worst_case(data, length=length, collate=list), collate


class _AtLength(Dataset[Any]):
    """A dataset whose samples are cut or repeated to a length.

    This changes every field that is as long as the sample's longest field.
    """

    def __init__(self, data: Any, length: int) -> None:
        if length < 1:
            raise UsageError(f"max_length must be at least 1, not {length}")
        self._data, self._length = data, length

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Any:
        sample = self._data[index]
        if not isinstance(sample, Mapping):
            raise JobError(f"max_length= needs samples with named fields, and these are {type(sample).__name__}: give batch=")
        field_lengths = {name: len(field) for name, field in sample.items() if isinstance(field, (list, torch.Tensor)) and getattr(field, "ndim", 1) > 0}
        longest = max(field_lengths.values(), default=0)
        return {name: _repeated(field, self._length) if longest and field_lengths.get(name) == longest else field for name, field in sample.items()}


def _repeated(field: Any, length: int) -> Any:
    indices = [index % len(field) for index in range(length)]
    return field[torch.tensor(indices)] if isinstance(field, torch.Tensor) else [field[index] for index in indices]
