"""Batches of samples with different lengths.

`worst_case` makes the largest batch that the data can give. `arrange` makes micro-batches whose number of samples depends on
the length of their longest sample.
"""

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
    """The largest batch of `n` samples that the data can give: its longest samples, the longest first, collated together.

    data: a dataset, a stream of samples (read to its end), or a DataLoader (its dataset and `collate_fn` are used). Data with
    fewer than `n` samples is repeated.
    n: the number of samples. Without it, the result is a function `make_batch(n)`, which `tune` takes as its batch. The lengths
    are then measured once.
    length: `length(sample)`, or a length for every sample. By default, the length is the number of numbers and characters in a sample.
    collate: by default the loader's `collate_fn`, or torch's `default_collate`.
    Raises `PlanError` for data without samples, for a stream without `n`, and for a loader that reads whole batches.
    """
    if isinstance(data, DataLoader):
        if data.collate_fn is None or (data.batch_sampler is None and data.batch_size is None):
            raise PlanError("the loader's dataset gives whole batches, so its longest samples cannot be put together: give the samples themselves")
        collate = collate or data.collate_fn
        data = data.dataset
    collate_samples = collate or _by_default
    if isinstance(data, IterableDataset) or not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        if n is None:
            raise PlanError("a stream has no samples to come back to: say how many the largest window has, worst_case(stream, n=...)")
        measure = _measure(length, None)
        # The index breaks ties between equal lengths, so that samples are never compared.
        longest = [
            sample
            for _, _, sample in heapq.nlargest(n, ((measure(sample, index), -index, sample) for index, sample in enumerate(data)), key=lambda entry: entry[:2])
        ]
        return collate_samples(_filled(longest, n))
    order = by_length(data, length)[0]

    def make_batch(n: int) -> Any:
        return collate_samples([data[index] for index in _filled(order, n)])

    def varied(n: int) -> Any:
        """`n` samples of which the first half are the longest and the others the shortest."""
        few = min(n, len(order))
        return collate_samples([data[index] for index in (*order[: few - few // 2], *order[len(order) - few // 2 :])])

    make_batch.varied = varied  # type: ignore[attr-defined] # for the comparison of a split batch, which needs samples that differ
    return make_batch if n is None else make_batch(n)


def _by_default(samples: list[Any]) -> Any:
    try:
        return default_collate(samples)
    except (RuntimeError, TypeError) as error:
        raise PlanError(f"the samples cannot be put together as they are ({str(error).splitlines()[0]}): give collate=, as your DataLoader has") from error


def by_length(data: Any, length: Length | None) -> tuple[list[int], list[float]]:
    """Two lists: the indices of the dataset, the longest sample first; and the length of every sample, in the dataset's order."""
    measure = _measure(length, len(data))
    sample_lengths = [measure(None if isinstance(length, Sequence) else data[index], index) for index in range(len(data))]
    return sorted(range(len(sample_lengths)), key=lambda index: -sample_lengths[index]), sample_lengths


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
    """The number of numbers and characters in a sample."""
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
    """A `make_batch(n)` for `tune` whose samples have the length `self.length`. Change `length` to measure the job at another length.

    batch: `make_batch(n, length)`, or a batch whose tensors have the length as their second dimension. That dimension is then cut
    or repeated. Calling it raises `JobError` for any other batch.
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
    second_dims = {path: tensor.shape[1] for path, tensor in batches.tensors(batch) if tensor.dim() > 1}
    if len(set(second_dims.values())) != 1:
        message = ", ".join(f"{path} has {extent}" for path, extent in second_dims.items()) or "none has a second dimension"
        raise JobError(
            f"lengths= cuts the second dimension of the batch's tensors, which must be the same ({message}): give batch as a function make_batch(n, length)"
        )

    def to_length(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if tensor.dim() < 2 else tensor[:, torch.arange(length, device=tensor.device) % tensor.shape[1]]

    return batches.changed(batch, to_length)


def arrange(indices: Sequence[int], of: Sequence[float], most: Sequence[tuple[int, int]]) -> Iterator[list[int]]:
    """Yields the micro-batches of a window as lists of indices, the longest samples first.

    Each micro-batch holds as many samples as the length of its longest sample allows.
    of: the length of every sample. most: pairs of (length, largest micro-batch at that length), by ascending length.
    Raises `PlanError` for a sample that is longer than all lengths in `most`.
    """
    ordered = sorted(indices, key=lambda index: -of[index])
    start = 0
    while start < len(ordered):
        longest = of[ordered[start]]
        most_samples = next((size for length, size in most if length >= longest), None)
        if most_samples is None:
            raise PlanError(
                f"sample {ordered[start]} has a length of {longest:g}, and the longest that was planned is {most[-1][0]}: tune(..., lengths=[..., {longest:g}]), or cut it"
            )
        yield ordered[start : start + most_samples]
        start += most_samples
