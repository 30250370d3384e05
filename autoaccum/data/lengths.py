"""Batches of samples with different lengths.

`worst_case` makes the largest batch that the data can give. `arrange` makes micro-batches whose number of samples depends on
the length of their longest sample.
"""

from __future__ import annotations

import heapq
import inspect
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate

from autoaccum.data import batches, variety
from autoaccum.errors import JobError, PlanError

Length = Callable[[Any], Any] | Sequence[Any]  # numbers, or tuples of numbers


def worst_case(
    data: Any,
    n: int | None = None,
    *,
    length: Length | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    bucket: Callable[[Any], Hashable] | None = None,
) -> Any:
    """The largest batch of `n` samples that the data can give, collated together.

    These are its longest samples. If samples vary in several dimensions (pictures that are padded to the tallest and to the widest of their
    batch), the batch with the largest sample of every dimension is put together, too, and the larger one of the two is taken.

    data: a dataset, a stream of samples (read to its end), or a DataLoader (its dataset and `collate_fn` are used). Data with
    fewer than `n` samples is repeated.
    n: the number of samples. Without it, the result is a function `make_batch(n)`, which `tune` takes as its batch. The lengths
    are then measured once.
    length: `length(sample)`, or a length for every sample. A tuple of numbers stands for several dimensions. By default, the length is the
    number of numbers and characters in a sample, and its dimensions are those of its tensors, arrays and pictures.
    collate: by default the loader's `collate_fn`, or torch's `default_collate`.
    bucket: `bucket(sample)`, if a batch of the loader holds samples of one bucket only (one resolution, one number of frames).
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
        data = _kept_of_stream(data, n, length, bucket)
        length = None if length is None or not callable(length) else length
    measured = [_Measured.of(None if isinstance(length, Sequence) else data[index], index, length, len(data)) for index in range(len(data))]
    groups: dict[Hashable, list[int]] = {}
    for index in range(len(data)):
        groups.setdefault(None if bucket is None else bucket(data[index]), []).append(index)
    orders = [sorted(group, key=lambda index: -measured[index].size) for group in groups.values()]
    largest_groups = sorted(orders, key=lambda order: -measured[order[0]].size)[:_BUCKETS]
    extremes = [_extremes(order, measured) for order in largest_groups]

    def make_batch(n: int) -> Any:
        chosen = [_filled(order, n) for order in largest_groups]
        chosen += [_filled([*of_all[:n], *order], n) for order, of_all in zip(largest_groups, extremes) if of_all]
        if not chosen:
            _filled([], n)
        made = [collate_samples([data[index] for index in indices]) for indices in chosen]
        return made[0] if len(made) == 1 else max(made, key=batches.nbytes)

    order = sorted(range(len(data)), key=lambda index: -measured[index].size)

    def varied(n: int) -> Any:
        """`n` samples of which the first half are the longest and the others the shortest."""
        few = min(n, len(order))
        ends = [*order[: few - few // 2], *order[len(order) - few // 2 :]]
        spread = list(dict.fromkeys([*ends, *(order[place * len(order) // _SPREAD] for place in range(min(_SPREAD, len(order))))]))
        if len(spread) == few:
            return collate_samples([data[index] for index in ends])
        try:  # lengths may say nothing about labels
            considered = collate_samples([data[index] for index in spread])
            return variety.most_unlike(considered, len(spread), few)
        except Exception:
            return collate_samples([data[index] for index in ends])

    make_batch.varied = varied  # type: ignore[attr-defined] # for the comparison of a split batch, which needs samples that differ
    return make_batch if n is None else make_batch(n)


_SPREAD = 48  # samples, over all lengths, of which those are compared that hold the most unlike numbers of labels
_BUCKETS = 8  # of which the batches are compared, those with the longest samples


class _Measured(NamedTuple):
    """The size of a sample, and its extents in all dimensions."""

    size: float
    extents: tuple[float, ...]

    @classmethod
    def of(cls, sample: Any, index: int, length: Length | None, samples: int | None) -> _Measured:
        if length is None:
            return cls(_extent(sample), tuple(_dimensions(sample)))
        if samples is not None and isinstance(length, Sequence) and len(length) != samples:
            raise PlanError(f"{len(length)} lengths were given for {samples} samples: one for each is needed, in the order of the dataset")
        given: Any = length(sample) if callable(length) else length[index]
        if isinstance(given, tuple):
            return cls(float(math.prod(given)), tuple(map(float, given)))
        return cls(float(given), (float(given),))


def _extremes(order: Sequence[int], measured: Sequence[_Measured]) -> list[int]:
    """The sample with the largest extent of every dimension that varies; empty if only one does, because the longest samples have it."""
    dimensions = len(measured[order[0]].extents)
    if any(len(measured[index].extents) != dimensions for index in order):
        return []  # samples of unlike kinds
    varying = [place for place in range(dimensions) if len({measured[index].extents[place] for index in order}) > 1]
    # Fields of one length vary together: tokens, their labels and their mask.
    columns = {tuple(measured[index].extents[place] for index in order): place for place in varying}
    if len(columns) < 2:
        return []
    return list(dict.fromkeys(max(order, key=lambda index: measured[index].extents[place]) for place in columns.values()))


def _kept_of_stream(stream: Any, n: int, length: Length | None, bucket: Callable[[Any], Hashable] | None) -> list[Any]:
    """The samples of a stream that a worst batch of `n` may hold: the `n` longest of every bucket, and those with the largest extents."""
    longest: dict[Hashable, list[tuple[float, int, Any]]] = {}
    widest: dict[tuple[Hashable, int], tuple[float, Any]] = {}
    for index, sample in enumerate(stream):
        key = None if bucket is None else bucket(sample)
        found = _Measured.of(sample, index, length, None)
        heap = longest.setdefault(key, [])
        # The index breaks ties between equal lengths, so that samples are never compared.
        (heapq.heappush if len(heap) < n else heapq.heappushpop)(heap, (found.size, -index, sample))
        for place, extent in enumerate(found.extents):
            if extent > widest.get((key, place), (-1.0, None))[0]:
                widest[key, place] = (extent, sample)
    kept = [sample for heap in longest.values() for _, _, sample in sorted(heap, reverse=True, key=lambda entry: entry[:2])]
    known = {id(sample) for sample in kept}
    return kept + list({id(sample): sample for _, sample in widest.values() if id(sample) not in known}.values())


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
    return float(math.prod(_shape(sample)))


def _shape(sample: Any) -> tuple[int, ...]:
    """The shape of a tensor or an array, or the size of a picture; `()` for anything else."""
    shape = getattr(sample, "shape", None)
    if shape is None and isinstance(size := getattr(sample, "size", None), tuple):  # PIL
        shape = size
    return tuple(shape) if shape is not None else ()


def _dimensions(sample: Any) -> Iterator[float]:
    """The extents of everything in a sample, in its order: the dimensions of tensors, arrays and pictures, the lengths of lists and texts."""
    if isinstance(sample, Mapping):
        for value in sample.values():
            yield from _dimensions(value)
    elif isinstance(sample, (list, tuple)) and sample and not isinstance(sample[0], (int, float)):
        for value in sample:
            yield from _dimensions(value)
    elif isinstance(sample, (list, tuple, str, bytes)):
        yield float(len(sample))
    else:
        yield from map(float, _shape(sample))


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
