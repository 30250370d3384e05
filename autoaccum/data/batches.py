"""Functions that count, split, join, resize, move and describe nested batches.

A batch is any nesting of mappings, tuples, named tuples, dataclasses and lists around leaves. Tensors, NumPy arrays and
lists of samples (strings, numbers, dicts, ragged tensors) are cut along their first dimension. Numbers, strings, None and
0-d tensors belong to the batch as a whole, and every piece gets them unchanged.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from autoaccum.errors import PlanError

_WHOLE_BATCH_TYPES = (str, bytes, int, float, complex, type(None), torch.dtype, torch.device)


def count(batch: Any) -> int:
    """The number of samples in `batch`: the common length of all leaves that can be cut.

    Raises `PlanError` if two fields differ in length (the message names both), and if no leaf can be cut.
    """
    if type(batch) is tuple and batch and all(type(item) is torch.Tensor and item.dim() for item in batch):  # fast path
        lengths = {item.size(0) for item in batch}  # len() of a tensor is a Python function, ten times as slow
        if len(lengths) == 1:
            return int(lengths.pop())
    batch = _with_samples_marked(batch)
    first: tuple[str, int] | None = None
    for path, leaf in _leaves(batch):
        length = _length(leaf)
        if length is None:
            continue
        if first is None:
            first = (path, length)
        elif length != first[1]:
            raise PlanError(
                f"the batch's fields disagree in length: {first[0]} has {first[1]} samples, {path} has {length}; "
                "give `split=` if that is meant, or a batch whose fields are cut alike along the first dimension"
            )
    if first is None:
        raise PlanError(f"a batch of type {type(batch).__name__} has nothing that can be cut into samples; give `make_batch(n)`, or `split=`")
    return first[1]


def split(batch: Any, sizes: Sequence[int], *, samples: int | None = None) -> list[Any]:
    """Cuts `batch` into consecutive pieces of `sizes` samples. The tensors of the pieces are views, not copies.

    samples: the number of samples in `batch`, if it is known; None counts them.
    Raises `PlanError` if the sizes do not sum to the batch's samples.
    """
    samples = count(batch) if samples is None else samples
    if sum(sizes) != samples:
        raise PlanError(f"cannot cut {samples} samples into {list(sizes)}: that is {sum(sizes)}")
    return _pieces(_with_samples_marked(batch), list(sizes))


def resize(batch: Any, samples: int) -> Any:
    """The first `samples` samples of `batch`. A batch with fewer samples is repeated. Raises `PlanError` for an empty batch."""
    batch = _with_samples_marked(batch)
    length = count(batch)
    if length == 0:
        raise PlanError("the batch is empty: give one with at least one sample")
    if samples <= length:
        return _mapped(batch, lambda leaf: _cut(leaf, 0, samples))
    return _mapped(batch, lambda leaf: _repeated(leaf, length, samples))


def move(batch: Any, device: torch.device, *, non_blocking: bool = False) -> Any:
    """`batch` with its tensors on `device`.

    Returns the same object if all tensors are on `device` already and the batch was not cut from a list of samples.
    """
    # Fast paths: this runs for every micro-batch.
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=non_blocking)
    if type(batch) is tuple:
        for item in batch:
            if not isinstance(item, torch.Tensor) or item.device != device:
                break
        else:
            return batch
    leaves = [leaf for _, leaf in _leaves(batch)]
    if any(tensor.device != device for leaf in leaves for tensor in _tensors(leaf)):
        batch = changed(batch, lambda tensor: tensor.to(device, non_blocking=non_blocking))
    elif not any(type(leaf) is _Samples for leaf in leaves):
        return batch
    # User code gets plain lists, not `_Samples`.
    return _mapped(batch, lambda leaf: list(leaf) if type(leaf) is _Samples else leaf)


def copied(batch: Any) -> Any:
    """A shallow copy of a mapping, so that a loss may take fields out of it (`batch.pop("labels")`); any other batch itself."""
    kind = type(batch)
    if kind is dict:
        return dict(batch)
    return copy.copy(batch) if kind is not tuple and kind is not torch.Tensor and isinstance(batch, Mapping) else batch


def tensors(batch: Any) -> list[tuple[str, torch.Tensor]]:
    """Pairs of (path, tensor) for every tensor that can be cut along its first dimension. Paths are as in `shapes`."""
    return [(path, leaf) for path, leaf in _leaves(batch) if isinstance(leaf, torch.Tensor) and leaf.dim()]


def changed(batch: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`batch` with `change` applied to every tensor, also to tensors in lists of samples."""
    return _mapped(batch, lambda leaf: _changed(leaf, change))


def join(parts: Sequence[Any]) -> Any:
    """Joins batches of the same structure into one batch.

    Returns None if they cannot be joined: the samples differ in shape (for example, each loader batch is padded to its own
    longest sample), or values that belong to the batch as a whole differ.
    """
    try:
        return _joined([_with_samples_marked(part) for part in parts])
    except _CannotJoin:
        return None


def nbytes(batch: Any) -> int:
    """The size of all tensors and arrays in `batch`, in bytes."""
    return sum(sum(row.nbytes for row in leaf.unbind()) if _is_nested(leaf) else int(leaf.nbytes) for _, leaf in _leaves(batch) if hasattr(leaf, "nbytes"))


def shapes(batch: Any) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, array and list of samples, by its path: `{"input_ids": (40, 512)}`.

    The path of a batch that is a single tensor is `"batch"`. Items of tuples and lists are named by their index. A nested tensor has the shape
    of its rows padded to the longest.
    """
    result: dict[str, tuple[int, ...]] = {}
    for path, leaf in _leaves(_with_samples_marked(batch)):
        if _is_nested(leaf):
            rows = leaf.unbind()
            result[path] = (len(rows), *(max(int(row.shape[dim]) for row in rows) for dim in range(rows[0].dim())))
        elif hasattr(leaf, "shape"):
            result[path] = tuple(int(extent) for extent in leaf.shape)
        elif isinstance(leaf, list):
            result[path] = (len(leaf),)
    return result


def of_one(batch: Any) -> Any:
    """What the samples of a batch look like: equal for batches whose tensors differ only in the number of samples. Quick for plain batches."""
    if isinstance(batch, torch.Tensor) and not batch.is_nested:
        return batch.shape[1:]
    if type(batch) in (tuple, list) and all(type(item) is torch.Tensor and not item.is_nested for item in batch):
        return [item.shape[1:] for item in batch] if not is_list_of_samples(batch) else None
    if type(batch) is dict and all(type(item) is torch.Tensor and not item.is_nested for item in batch.values()):
        return {name: item.shape[1:] for name, item in batch.items()}
    # Nested tensors and lists of samples take samples of any length.
    return {
        path: (str(leaf.layout), leaf.dtype) if _is_nested(leaf) else tuple(leaf.shape[1:]) if hasattr(leaf, "shape") else None
        for path, leaf in _leaves(_with_samples_marked(batch))
    }


def _tensors(leaf: Any) -> Iterator[torch.Tensor]:
    """The tensors of a leaf: the leaf itself, or the tensors in a list of samples."""
    if isinstance(leaf, torch.Tensor):
        yield leaf
    elif isinstance(leaf, list):
        for item in leaf:
            for inner in item.values() if isinstance(item, Mapping) else (item,):
                yield from _tensors(inner)


def ragged_lengths(batch: Any) -> Iterator[list[int]]:
    """For each nested tensor and each list of tensors in `batch`: the lengths of its samples."""
    for _, leaf in _leaves(_with_samples_marked(batch)):
        rows = leaf.unbind() if _is_nested(leaf) else leaf if isinstance(leaf, list) else ()
        if len(rows) and all(isinstance(row, torch.Tensor) and row.dim() for row in rows):
            yield [len(row) for row in rows]


class _Samples(list):  # type: ignore[type-arg]
    """A list whose items are known to be samples. A slice of such a list is marked again, because its items may look like fields."""


def _with_samples_marked(batch: Any) -> Any:
    """Marks a list of tensors as samples if a list of as many dicts or strings is next to it (for example images and their boxes).

    The shapes of the tensors do not matter then.
    """
    if isinstance(batch, Mapping):
        fields: list[Any] = list(batch.values())
    elif isinstance(batch, (tuple, list)) and not isinstance(batch, _Samples):
        fields = list(batch)
    else:
        return batch
    lists = [field for field in fields if isinstance(field, list) and field and not isinstance(field, _Samples)]
    lengths = {len(field) for field in lists if all(isinstance(item, (Mapping, str)) for item in field)}
    sample_list_ids = {id(field) for field in lists if len(field) in lengths and all(isinstance(item, torch.Tensor) for item in field)}
    if not sample_list_ids:
        return batch
    marked = [_Samples(field) if id(field) in sample_list_ids else field for field in fields]
    if isinstance(batch, Mapping):
        rebuilt: Any = copy.copy(batch)
        for key, field in zip(batch, marked):
            rebuilt[key] = field
        return rebuilt
    return type(batch)(*marked) if hasattr(batch, "_fields") else type(batch)(marked)


def is_list_of_samples(batch: Any) -> bool:
    """True for a list of tensors of different lengths, and for a slice of such a list."""
    return isinstance(batch, list) and bool(batch) and all(isinstance(item, torch.Tensor) for item in batch) and _is_samples(batch)


def as_samples(batch: Any) -> Any:
    """A list, marked as a list of samples; any other value unchanged."""
    return _Samples(batch) if isinstance(batch, list) else batch


def _is_samples(items: list[Any]) -> bool:
    """True for a list whose items are samples, False for a list whose items are the batch's fields.

    Default collation returns `[inputs, labels]`, so a list of tensors of the same length holds fields.
    """
    if isinstance(items, _Samples):
        return True
    if any(isinstance(item, _Samples) for item in items):
        return False
    tensors = [item for item in items if isinstance(item, torch.Tensor)]
    if tensors:
        return len(tensors) == len(items) and len({item.shape[:1] for item in items}) > 1
    if items and all(type(item) is tuple for item in items):
        # Not collated: a list of (input, label) pairs. In a collated batch, the parts of a tuple are tensors or lists.
        return any(isinstance(part, (int, float, str)) or (isinstance(part, torch.Tensor) and part.dim() == 0) for part in items[0])
    if any(hasattr(item, "shape") or isinstance(item, tuple) or _is_fields(item) for item in items):
        return all(isinstance(item, Mapping) for item in items)
    nested = [item for item in items if isinstance(item, list)]
    # A list of lists of strings holds fields, as in [["a", "b"], ["c", "d"]]. Token lists, [[1, 2, 3], [4, 5]], are samples.
    return not nested or not all(isinstance(inner, str) for item in nested for inner in item)


def _is_fields(item: Any) -> bool:
    return isinstance(item, Mapping) or (dataclasses.is_dataclass(item) and not isinstance(item, type))


def _mapped(batch: Any, change: Callable[[Any], Any]) -> Any:
    """A copy of `batch` with `change` applied to every leaf. Containers keep their types."""
    if isinstance(batch, Mapping):
        rebuilt: Any = copy.copy(batch)
        for key in batch:
            rebuilt[key] = _mapped(batch[key], change)
        return rebuilt
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        rebuilt = copy.copy(batch)
        for field in dataclasses.fields(batch):
            object.__setattr__(rebuilt, field.name, _mapped(getattr(batch, field.name), change))
        return rebuilt
    if isinstance(batch, tuple):
        items = [_mapped(item, change) for item in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else tuple(items)
    if isinstance(batch, list) and not _is_samples(batch):
        return [_mapped(item, change) for item in batch]
    return change(batch)


def _pieces(batch: Any, sizes: list[int]) -> list[Any]:
    """One piece of `batch` per size. Tuples are traversed once, not once per piece."""
    if isinstance(batch, torch.Tensor) and not batch.is_nested:
        return list(batch.split(sizes)) if batch.dim() else [batch] * len(sizes)
    if isinstance(batch, tuple):
        fields = [_pieces(item, sizes) for item in batch]
        if not fields:
            return [batch] * len(sizes)
        return [type(batch)(*items) for items in zip(*fields)] if hasattr(batch, "_fields") else list(zip(*fields))
    if isinstance(batch, Mapping) or (isinstance(batch, list) and not _is_samples(batch)) or _is_fields(batch):
        stops = list(itertools.accumulate(sizes))
        return [_mapped(batch, partial(_cut, start=stop - size, stop=stop)) for stop, size in zip(stops, sizes)]
    stops = list(itertools.accumulate(sizes))
    return [_cut(batch, stop - size, stop) for stop, size in zip(stops, sizes)]


def _leaves(batch: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(batch, Mapping):
        for key in batch:
            yield from _leaves(batch[key], f"{path}.{key}" if path else str(key))
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        for field in dataclasses.fields(batch):
            yield from _leaves(getattr(batch, field.name), f"{path}.{field.name}" if path else field.name)
    elif isinstance(batch, tuple) or (isinstance(batch, list) and not _is_samples(batch)):
        names = getattr(batch, "_fields", range(len(batch)))
        for name, item in zip(names, batch):
            yield from _leaves(item, f"{path}.{name}" if path else f"batch[{name}]" if isinstance(name, int) else name)
    else:
        yield path or "batch", batch


def _length(leaf: Any) -> int | None:
    """The number of samples in a leaf; None for a leaf that belongs to the batch as a whole."""
    if _is_nested(leaf):
        return int(leaf.size(0))
    if hasattr(leaf, "shape"):
        return int(leaf.shape[0]) if len(leaf.shape) else None
    if isinstance(leaf, list):
        return len(leaf)
    if isinstance(leaf, _WHOLE_BATCH_TYPES):
        return None
    if hasattr(leaf, "__iter__") or hasattr(leaf, "__next__"):
        raise PlanError(f"a {type(leaf).__name__} is not a batch: give one batch of it, next(iter(loader))")
    raise PlanError(f"a batch with a {type(leaf).__name__} cannot be cut into samples; give `make_batch(n)`, or `split=` with a function that cuts it")


def _is_nested(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_nested


def _nest(rows: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """Rows as a nested tensor of the same layout. https://docs.pytorch.org/docs/stable/nested.html"""
    return torch.nested.nested_tensor(list(rows), layout=like.layout)


def _cut(leaf: Any, start: int, stop: int) -> Any:
    if _length(leaf) is None:
        return leaf
    if _is_nested(leaf):
        return _nest(leaf.unbind()[start:stop], leaf)
    return _Samples(leaf[start:stop]) if isinstance(leaf, list) else leaf[start:stop]


def _repeated(leaf: Any, length: int, samples: int) -> Any:
    if _length(leaf) is None:
        return leaf
    if _is_nested(leaf):
        rows = leaf.unbind()
        return _nest([rows[index % length] for index in range(samples)], leaf)
    if isinstance(leaf, torch.Tensor):
        return leaf[torch.arange(samples, device=leaf.device) % length]
    if isinstance(leaf, list):
        return _Samples(leaf[index % length] for index in range(samples))
    return leaf[[index % length for index in range(samples)]]


def _changed(leaf: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(leaf, torch.Tensor):
        return change(leaf)
    if isinstance(leaf, list):
        return _Samples(changed(item, change) for item in leaf)
    return leaf


class _CannotJoin(Exception):
    pass


def _joined(parts: Sequence[Any]) -> Any:
    first = parts[0]
    if any(type(part) is not type(first) and not (isinstance(part, list) and isinstance(first, list)) for part in parts):
        raise _CannotJoin
    if isinstance(first, Mapping):
        if any(list(part) != list(first) for part in parts):
            raise _CannotJoin
        rebuilt: Any = copy.copy(first)
        for key in first:
            rebuilt[key] = _joined([part[key] for part in parts])
        return rebuilt
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        rebuilt = copy.copy(first)
        for field in dataclasses.fields(first):
            object.__setattr__(rebuilt, field.name, _joined([getattr(part, field.name) for part in parts]))
        return rebuilt
    if isinstance(first, tuple) or (isinstance(first, list) and not any(_is_samples(part) for part in parts)):
        if len({len(part) for part in parts}) > 1:
            raise _CannotJoin
        items = [_joined(items) for items in zip(*parts)]
        return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
    return _joined_leaf(parts)


def _joined_leaf(parts: Sequence[Any]) -> Any:
    first = parts[0]
    if isinstance(first, list):
        return _Samples(item for part in parts for item in part)
    if any(_is_nested(part) for part in parts):
        if not all(_is_nested(part) and part.layout == first.layout and part.dtype == first.dtype for part in parts):
            raise _CannotJoin
        return _nest([row for part in parts for row in part.unbind()], first)
    if hasattr(first, "shape"):
        if len({(part.shape[1:], part.dtype) for part in parts}) > 1 or len({len(part.shape) for part in parts}) > 1:
            raise _CannotJoin
        if len(first.shape):
            return torch.cat(list(parts)) if isinstance(first, torch.Tensor) else _concatenate(parts)
    same = all(bool((part == first).all()) if hasattr(first, "shape") else part == first for part in parts)
    if not same:
        raise _CannotJoin
    return first


def _concatenate(arrays: Sequence[Any]) -> Any:
    import numpy  # imported here, because NumPy is optional: a batch with arrays proves that it is installed

    return numpy.concatenate(list(arrays))
