"""Shapes of results that an operator gave before, for the same shapes of arguments.

A model's blocks repeat, so nearly every call of a trace has been made before. torch's own fake tensors remember their results too, but take a tenth of
a millisecond to find one, which was two thirds of a trace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

aten = torch.ops.aten

_SCALARS = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
_NEVER = {aten.lift.default, aten.lift_fresh.default, aten.lift_fresh_copy.default}  # they make constants
_NO_KEY: tuple[Any, ...] = ()


@dataclass(frozen=True)
class _Shape:
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device


class KnownShapes:
    """The calls of one trace, with what they returned."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], tuple[_Shape | None, ...] | _Shape | None] = {}
        self._ways: dict[Any, Callable[[Any, Sequence[Any]], Any] | None] = {}

    def result(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """What `func(*args, **kwargs)` returns, on fake tensors. Calls it where its result is not known, or has to do with more than shapes."""
        way = self._ways[func] if func in self._ways else self._ways.setdefault(func, _way(func))
        key = _NO_KEY if way is None or _mode(args) is None else _key(func, args, kwargs)
        if not key:
            return func(*args, **kwargs)
        assert way is not None
        if key in self._known:
            return way(self._known[key], args)
        out = func(*args, **kwargs)
        if way is _itself:
            if out is args[0]:
                self._known[key] = None
            return out
        shapes = _shapes(out, None if way is _view else [value for value in args if isinstance(value, torch.Tensor)])
        if shapes is None:
            self._ways[func] = None
        else:
            self._known[key] = shapes
        return out


def _way(func: Any) -> Callable[[Any, Sequence[Any]], Any] | None:
    """How an operator's result follows from its shapes; None for an operator that is called each time."""
    if not isinstance(func, torch._ops.OpOverload) or func.namespace != "aten" or func in _NEVER:
        return None
    if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view} & set(func.tags):
        return None
    if func is aten._unsafe_view.default:
        return _view  # it shares its argument's storage, and its schema does not say so
    schema = func._schema
    aliased = [number for number, argument in enumerate(schema.arguments) if argument.alias_info is not None]
    one = len(schema.returns) == 1 and str(schema.returns[0].type) == "Tensor"
    if not aliased:
        return _new
    if aliased != [0] or not one:
        return None
    if schema.is_mutable:
        returned = schema.returns[0].alias_info
        return _itself if returned is not None and returned.is_write else None
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), torch._C.DispatchKey.CompositeImplicitAutograd)
    return _view if func.is_view and not composite else None


def _key(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What a call's result depends on; empty if that is more than shapes and plain values."""
    found: list[Any] = [func, torch.get_default_dtype()]
    if not _describe(found, args):
        return _NO_KEY
    for name, value in kwargs.items():
        found.append(name)
        if not _describe(found, (value,)):
            return _NO_KEY
    return tuple(found)


def _describe(found: list[Any], values: Sequence[Any]) -> bool:
    for value in values:
        kind = type(value)
        if kind is FakeTensor:
            size = value.shape
            # Those without dimensions may be Python numbers that torch has wrapped, which take part in type promotion in another way.
            if not size or value.constant is not None or value.dtype.is_complex or value.layout is not torch.strided:
                return False
            found += (size, value.stride(), value.storage_offset(), value.dtype, value.fake_device)
        elif kind in (list, tuple):
            found += (kind, len(value))
            if not _describe(found, value):
                return False
        elif kind in _SCALARS:
            found += (kind, value)  # 1, 1.0 and True are equal keys, and not the same arguments
        else:
            return False
    return True


def _shapes(out: Any, given: Sequence[torch.Tensor] | None) -> tuple[_Shape | None, ...] | _Shape | None:
    """The shapes of results; None if they are not fake tensors, or if one shares the storage of an argument in `given`."""
    if type(out) is FakeTensor:
        if out.constant is not None or out.dtype.is_complex or out.layout is not torch.strided or out.is_neg():
            return None
        storages = () if given is None else {value.untyped_storage()._cdata for value in given}
        if out.untyped_storage()._cdata in storages or (given is not None and out.untyped_storage().nbytes() != _nbytes(out)):
            return None
        return _Shape(out.shape, out.stride(), int(out.storage_offset()), out.dtype, out.fake_device)
    if not isinstance(out, tuple):
        return None
    found = [None if value is None else _shapes(value, given) for value in out]
    if any(shape is None and value is not None for shape, value in zip(found, out)):
        return None
    return tuple(found)  # type: ignore[arg-type] # tuples in tuples are no results of an operator


def _nbytes(tensor: torch.Tensor) -> int:
    """The bytes of a storage that is just as large as the tensor needs."""
    if not tensor.numel():
        return 0
    return (1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))) * tensor.element_size()


def _new(shapes: Any, args: Sequence[Any]) -> Any:
    mode = _mode(args)
    if isinstance(shapes, _Shape):
        return _made(mode, shapes)
    return tuple(None if shape is None else _made(mode, shape) for shape in shapes)


def _view(shape: Any, args: Sequence[Any]) -> Any:
    viewed = args[0]
    storage = viewed.untyped_storage()
    with torch._C._DisableTorchDispatch():
        meta = torch.empty(0, dtype=shape.dtype, device="meta")
        meta.set_(storage, shape.offset, shape.size, shape.stride)
    return FakeTensor(viewed.fake_mode, meta, shape.device)


def _itself(_: Any, args: Sequence[Any]) -> Any:
    return args[0]


def _made(mode: Any, shape: _Shape) -> FakeTensor:
    with torch._C._DisableTorchDispatch():
        meta = torch.empty_strided(shape.size, shape.stride, dtype=shape.dtype, device="meta")
    return FakeTensor(mode, meta, shape.device)


def _mode(args: Sequence[Any]) -> Any:
    for value in args:
        if type(value) is FakeTensor:
            return value.fake_mode
        if isinstance(value, (list, tuple)) and (found := _mode(value)) is not None:
            return found
    return None
