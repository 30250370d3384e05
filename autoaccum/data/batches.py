"""Count, split, join, resize, move and describe nested batches.

A batch is any nesting of mappings, tuples, named tuples, dataclasses and lists around leaves. Tensors,
NumPy arrays and lists of samples (strings, numbers, dicts, ragged tensors) are cut along their first
dimension; numbers, strings, None and 0-d tensors belong to the batch as a whole and go along unchanged.
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

_WHOLE = (str, bytes, int, float, complex, type(None), torch.dtype, torch.device)


def count(batch: Any) -> int:
    """Samples in `batch`: the common length of everything that can be cut.

    Raises `PlanError` where two fields disagree, naming both, and where nothing can be cut.
    """
    if type(batch) is tuple and batch and all(type(item) is torch.Tensor and item.dim() for item in batch):  # the plain case first
        lengths = {len(item) for item in batch}
        if len(lengths) == 1:
            return lengths.pop()
    batch = _told_by_siblings(batch)
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
    """`batch` cut into consecutive pieces of `sizes` samples; tensors are views, not copies.

    samples: how many it has, where that was counted before.
    Raises `PlanError` if the sizes do not sum to the batch's samples.
    """
    samples = count(batch) if samples is None else samples
    if sum(sizes) != samples:
        raise PlanError(f"cannot cut {samples} samples into {list(sizes)}: that is {sum(sizes)}")
    return _pieces(_told_by_siblings(batch), list(sizes))


def resize(batch: Any, samples: int) -> Any:
    """The first `samples` samples of `batch`; a batch that has fewer is repeated."""
    batch = _told_by_siblings(batch)
    have = count(batch)
    if have == 0:
        raise PlanError("the batch is empty: give one with at least one sample")
    if samples <= have:
        return _mapped(batch, lambda leaf: _cut(leaf, 0, samples))
    return _mapped(batch, lambda leaf: _repeated(leaf, have, samples))


def move(batch: Any, device: torch.device, *, non_blocking: bool = False) -> Any:
    """`batch` with its tensors on `device`; the very same object where they all are there already, and it was not cut from a list."""
    # The plain cases first: this runs for every micro-batch.
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
    # Our mark on lists is nobody else's business.
    return _mapped(batch, lambda leaf: list(leaf) if type(leaf) is _Samples else leaf)


def tensors(batch: Any) -> list[tuple[str, torch.Tensor]]:
    """Every tensor that can be cut along its first dimension, by its path as in `shapes`."""
    return [(path, leaf) for path, leaf in _leaves(batch) if isinstance(leaf, torch.Tensor) and leaf.dim()]


def changed(batch: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`batch` with `change` applied to every tensor, those in lists of samples too."""
    return _mapped(batch, lambda leaf: _changed(leaf, change))


def join(parts: Sequence[Any]) -> Any:
    """Batches of one structure as one batch, or None where they cannot be: samples of unlike shapes (each
    loader batch padded to its own longest), or values of the whole batch that differ."""
    try:
        return _joined([_told_by_siblings(part) for part in parts])
    except _CannotJoin:
        return None


def nbytes(batch: Any) -> int:
    """Bytes of all tensors and arrays in `batch`."""
    return sum(int(leaf.nbytes) for _, leaf in _leaves(batch) if hasattr(leaf, "nbytes"))


def shapes(batch: Any) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor, array and list of samples, by its path: `{"input_ids": (40, 512)}`.

    The path of a lone tensor is `"batch"`; items of tuples and lists have their index.
    """
    found: dict[str, tuple[int, ...]] = {}
    for path, leaf in _leaves(_told_by_siblings(batch)):
        if hasattr(leaf, "shape"):
            found[path] = tuple(int(extent) for extent in leaf.shape)
        elif isinstance(leaf, list):
            found[path] = (len(leaf),)
    return found


def _tensors(leaf: Any) -> Iterator[torch.Tensor]:
    """The tensors of a leaf: itself, or those in a list of samples."""
    if isinstance(leaf, torch.Tensor):
        yield leaf
    elif isinstance(leaf, list):
        for item in leaf:
            for inner in item.values() if isinstance(item, Mapping) else (item,):
                yield from _tensors(inner)


class _Samples(list):  # type: ignore[type-arg]
    """A list whose items are known to be samples: what was cut from one stays one, whatever is left in it."""


def _told_by_siblings(batch: Any) -> Any:
    """A list of tensors beside a list of as many dicts or strings (images and their boxes) holds samples, whatever their shapes."""
    if isinstance(batch, Mapping):
        fields: list[Any] = list(batch.values())
    elif isinstance(batch, (tuple, list)) and not isinstance(batch, _Samples):
        fields = list(batch)
    else:
        return batch
    lists = [field for field in fields if isinstance(field, list) and field and not isinstance(field, _Samples)]
    lengths = {len(field) for field in lists if all(isinstance(item, (Mapping, str)) for item in field)}
    meant = {id(field) for field in lists if len(field) in lengths and all(isinstance(item, torch.Tensor) for item in field)}
    if not meant:
        return batch
    marked = [_Samples(field) if id(field) in meant else field for field in fields]
    if isinstance(batch, Mapping):
        rebuilt: Any = copy.copy(batch)
        for key, field in zip(batch, marked):
            rebuilt[key] = field
        return rebuilt
    return type(batch)(*marked) if hasattr(batch, "_fields") else type(batch)(marked)


def is_list_of_samples(batch: Any) -> bool:
    """True for a list of tensors of unlike lengths, and for what was cut from one."""
    return isinstance(batch, list) and bool(batch) and all(isinstance(item, torch.Tensor) for item in batch) and _is_samples(batch)


def as_samples(batch: Any) -> Any:
    """A list marked as one of samples; anything else as it is."""
    return _Samples(batch) if isinstance(batch, list) else batch


def _is_samples(items: list[Any]) -> bool:
    """True for a list whose items are samples, False for one whose items are the batch's fields.

    Default collation gives `[inputs, labels]`, so a list with tensors of one common length holds fields.
    """
    if isinstance(items, _Samples):
        return True
    if any(isinstance(item, _Samples) for item in items):
        return False
    tensors = [item for item in items if isinstance(item, torch.Tensor)]
    if tensors:
        return len(tensors) == len(items) and len({item.shape[:1] for item in items}) > 1
    if items and all(type(item) is tuple for item in items):
        # Not collated: (input, label) after (input, label). A field among tuples of fields is a tensor or a list.
        return any(isinstance(part, (int, float, str)) or (isinstance(part, torch.Tensor) and part.dim() == 0) for part in items[0])
    if any(hasattr(item, "shape") or isinstance(item, tuple) or _is_fields(item) for item in items):
        return all(isinstance(item, Mapping) for item in items)
    nested = [item for item in items if isinstance(item, list)]
    # Lists of lists: fields if all are as long as each other and hold samples themselves, as in
    # [["a", "b"], ["c", "d"]]; token lists, [[1, 2, 3], [4, 5]], are samples.
    return not nested or not all(isinstance(inner, str) for item in nested for inner in item)


def _is_fields(item: Any) -> bool:
    return isinstance(item, Mapping) or (dataclasses.is_dataclass(item) and not isinstance(item, type))


def _mapped(batch: Any, change: Callable[[Any], Any]) -> Any:
    """`batch` rebuilt with `change` applied to every leaf; containers keep their types."""
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
    """`batch` as one piece for each size; every container is gone through once, not once for every piece."""
    if isinstance(batch, torch.Tensor):
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
    """Samples in a leaf; None for what belongs to the batch as a whole."""
    if hasattr(leaf, "shape"):
        return int(leaf.shape[0]) if len(leaf.shape) else None
    if isinstance(leaf, list):
        return len(leaf)
    if isinstance(leaf, _WHOLE):
        return None
    if hasattr(leaf, "__iter__") or hasattr(leaf, "__next__"):
        raise PlanError(f"a {type(leaf).__name__} is not a batch: give one batch of it, next(iter(loader))")
    raise PlanError(f"a batch with a {type(leaf).__name__} cannot be cut into samples; give `make_batch(n)`, or `split=` with a function that cuts it")


def _cut(leaf: Any, start: int, stop: int) -> Any:
    if _length(leaf) is None:
        return leaf
    return _Samples(leaf[start:stop]) if isinstance(leaf, list) else leaf[start:stop]


def _repeated(leaf: Any, have: int, samples: int) -> Any:
    if _length(leaf) is None:
        return leaf
    if isinstance(leaf, torch.Tensor):
        return leaf[torch.arange(samples, device=leaf.device) % have]
    if isinstance(leaf, list):
        return _Samples(leaf[index % have] for index in range(samples))
    return leaf[[index % have for index in range(samples)]]


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
    import numpy  # only where a batch holds arrays, which means that it is there

    return numpy.concatenate(list(arrays))
