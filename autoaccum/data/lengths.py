"""Samples of unlike lengths: the worst batch that data can give, and micro-batches of as many samples as their length allows."""

from __future__ import annotations

import heapq
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate

from autoaccum.data import batches
from autoaccum.errors import JobError, PlanError

Length = Callable[[Any], float] | Sequence[float]


def worst_case(data: Any, n: int | None = None, *, length: Length | None = None, collate: Callable[[list[Any]], Any] | None = None) -> Any:
    """The largest batch of `n` that the data can give: its longest samples, the longest first, collated together.

    data: a dataset, a stream of samples (read to its end), or a DataLoader, whose dataset and `collate_fn` are taken. Without `n`
    returns `make_batch(n)`, which `tune` takes as its batch; the samples are gone through once. Data of fewer samples than `n` is repeated.
    length: `length(sample)`, or a length for every sample; by default how many numbers and characters a sample holds.
    collate: by default the loader's, or torch's `default_collate`.
    Raises `PlanError` for data without samples, for a stream without `n`, and for a loader that reads whole batches.
    """
    if isinstance(data, DataLoader):
        if data.collate_fn is None or (data.batch_sampler is None and data.batch_size is None):
            raise PlanError("the loader's dataset gives whole batches, so its longest samples cannot be put together: give the samples themselves")
        collate = collate or data.collate_fn
        data = data.dataset
    put_together = collate or _by_default
    if isinstance(data, IterableDataset) or not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        if n is None:
            raise PlanError("a stream has no samples to come back to: say how many the largest window has, worst_case(stream, n=...)")
        measure = _measure(length, None)
        # The number beside it keeps samples from being compared where lengths are equal.
        longest = [
            sample for _, _, sample in heapq.nlargest(n, ((measure(sample, at), -at, sample) for at, sample in enumerate(data)), key=lambda each: each[:2])
        ]
        return put_together(_filled(longest, n))
    order = by_length(data, length)[0]

    def make_batch(n: int) -> Any:
        return put_together([data[each] for each in _filled(order, n)])

    return make_batch if n is None else make_batch(n)


def _by_default(samples: list[Any]) -> Any:
    try:
        return default_collate(samples)
    except (RuntimeError, TypeError) as error:
        raise PlanError(f"the samples cannot be put together as they are ({str(error).splitlines()[0]}): give collate=, as your DataLoader has") from error


def by_length(data: Any, length: Length | None) -> tuple[list[int], list[float]]:
    """Indices of a dataset, the longest sample first, and every sample's length."""
    measure = _measure(length, len(data))
    of = [measure(None if isinstance(length, Sequence) else data[index], index) for index in range(len(data))]
    return sorted(range(len(of)), key=lambda index: -of[index]), of


def _measure(length: Length | None, samples: int | None) -> Callable[[Any, int], float]:
    if length is None:
        return lambda sample, _: _extent(sample)
    if callable(length):
        return lambda sample, _: float(length(sample))
    if samples is not None and len(length) != samples:
        raise PlanError(f"{len(length)} lengths were given for {samples} samples: one for each is needed, in the order of the dataset")
    return lambda _, index: float(length[index])


def _filled(samples: Sequence[Any], n: int) -> list[Any]:
    if not samples:
        raise PlanError("the data has no samples to make a batch of")
    return [samples[index % len(samples)] for index in range(n)]


def _extent(sample: Any) -> float:
    """How many numbers and characters a sample holds."""
    if isinstance(sample, Mapping):
        return sum(map(_extent, sample.values()))
    if isinstance(sample, (list, tuple)):
        plain = not sample or isinstance(sample[0], (int, float))
        return float(len(sample)) if plain else sum(map(_extent, sample))
    if isinstance(sample, (str, bytes)):
        return float(len(sample))
    size = getattr(sample, "shape", None)
    return float(torch.Size(size).numel()) if size is not None else 1.0


class AtLength:
    """A job's batches at one length after another: `make_batch(n)` for `tune`, of the length that is set.

    batch: `make_batch(n, length)`, or a batch whose tensors all have the length as their second dimension, which is cut or repeated.
    """

    def __init__(self, batch: Any) -> None:
        self._batch, self.length = batch, 0

    def __call__(self, n: int) -> Any:
        if callable(self._batch):
            try:
                inspect.signature(self._batch).bind(n, self.length)
            except TypeError:
                raise JobError(
                    "with lengths= a batch that is a function is make_batch(n, length), and this one does not take the two: "
                    "give such a function, or tensors (worst_case knows one length, the longest: leave lengths= out with it)"
                ) from None
            return self._batch(n, self.length)
        return _stretched(batches.resize(self._batch, n), self.length)


def _stretched(batch: Any, length: int) -> Any:
    deep = {path: tensor.shape[1] for path, tensor in batches.tensors(batch) if tensor.dim() > 1}
    if len(set(deep.values())) != 1:
        told = ", ".join(f"{path} has {extent}" for path, extent in deep.items()) or "none has a second dimension"
        raise JobError(
            f"lengths= cuts the second dimension of the batch's tensors, which must be the same ({told}): give batch as a function make_batch(n, length)"
        )

    def to_length(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if tensor.dim() < 2 else tensor[:, torch.arange(length, device=tensor.device) % tensor.shape[1]]

    return batches.changed(batch, to_length)


def arrange(indices: Sequence[int], of: Sequence[float], most: Sequence[tuple[int, int]]) -> Iterator[list[int]]:
    """A window's samples as micro-batches, the longest samples together: each holds as many as its longest allows.

    of: every sample's length. most: (length, largest micro-batch), ascending. Raises `PlanError` for a sample that is longer than all.
    """
    left = sorted(indices, key=lambda index: -of[index])
    at = 0
    while at < len(left):
        longest = of[left[at]]
        room = next((size for length, size in most if length >= longest), None)
        if room is None:
            raise PlanError(
                f"sample {left[at]} has a length of {longest:g}, and the longest that was planned is {most[-1][0]}: tune(..., lengths=[..., {longest:g}]), or cut it"
            )
        yield left[at : at + room]
        at += room
