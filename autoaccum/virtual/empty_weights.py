"""Models built with shapes but without values, so that large weights take no memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def without_memory() -> Iterator[None]:
    """A context manager: models built inside have shapes but no values. Large weights are never written, so they take no memory.

    Inside, `torch.nn.init` does nothing. Operators that fill, convert or clone a large blank tensor write nothing either. A large
    blank tensor is a floating point tensor of more than a million elements that was created empty and not written since.
    Data keep their values, and so do tensors that a constructor computes from small tensors.
    """
    names = [name for name in dir(torch.nn.init) if name.endswith("_") and not name.startswith("_")]
    originals = {name: getattr(torch.nn.init, name) for name in names}
    try:
        for name in names:
            setattr(torch.nn.init, name, lambda tensor, *_, **__: tensor)
        with _Unwritten():
            yield
    finally:
        for name, function in originals.items():
            setattr(torch.nn.init, name, function)


class _Unwritten(torch.utils._python_dispatch.TorchDispatchMode):
    _MAKES = frozenset(("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided"))
    _FILLS = frozenset(("normal_", "uniform_", "erfinv_", "mul_", "add_", "clamp_", "bernoulli_"))
    _COPIES = frozenset(("_to_copy", "clone"))
    _LARGE = 1_000_000

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._blank: dict[int, Any] = {}  # storages not written yet, by address; weak references, because addresses are reused

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._overloadpacket.__name__, kwargs or {}
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if first is not None and self._is_blank(first):
            if name in self._FILLS or (name == "copy_" and self._is_blank(args[1])):
                return first
            if name in self._COPIES:
                return self._mark_blank(torch.empty_like(first, dtype=kwargs.get("dtype") or first.dtype, device=kwargs.get("device") or first.device))
        if self._blank and func._schema.is_mutable:  # an operator that writes to a tensor, or to a view of it, gives it values
            for argument in (*args, *kwargs.values()):
                for tensor in argument if isinstance(argument, (list, tuple)) else (argument,):
                    if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                        self._blank.pop(tensor.untyped_storage()._cdata, None)
        out = func(*args, **kwargs)
        return self._mark_blank(out) if name in self._MAKES else out

    def _mark_blank(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type == "cpu" and tensor.numel() > self._LARGE and tensor.is_floating_point():
            storage = tensor.untyped_storage()
            self._blank[storage._cdata] = weakref.ref(storage)
        return tensor

    def _is_blank(self, tensor: Any) -> bool:
        if not isinstance(tensor, torch.Tensor) or tensor.numel() <= self._LARGE or tensor.layout != torch.strided:
            return False
        storage = tensor.untyped_storage()
        reference = self._blank.get(storage._cdata)
        return reference is not None and reference() is storage
