"""Models built with shapes and without values, so that large weights take no memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def without_memory() -> Iterator[None]:
    """Models built inside have their shapes and no values: large weights are never written, so they take no memory.

    Left out are `torch.nn.init`, and what fills by chance, converts or clones a floating point tensor of more than a million
    elements that was made empty and that no operator has written to. Data keep their values, and so does what a constructor computes from small tensors.
    """
    names = [name for name in dir(torch.nn.init) if name.endswith("_") and not name.startswith("_")]
    kept = {name: getattr(torch.nn.init, name) for name in names}
    try:
        for name in names:
            setattr(torch.nn.init, name, lambda tensor, *_, **__: tensor)
        with _Unwritten():
            yield
    finally:
        for name, function in kept.items():
            setattr(torch.nn.init, name, function)


class _Unwritten(torch.utils._python_dispatch.TorchDispatchMode):
    _MAKES = frozenset(("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided"))
    _FILLS = frozenset(("normal_", "uniform_", "erfinv_", "mul_", "add_", "clamp_", "bernoulli_"))
    _COPIES = frozenset(("_to_copy", "clone"))
    _LARGE = 1_000_000

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._blank: dict[int, Any] = {}  # storages that nobody has written to; by address, which the dead give up

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._overloadpacket.__name__, kwargs or {}
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if first is not None and self._is_blank(first):
            if name in self._FILLS or (name == "copy_" and self._is_blank(args[1])):
                return first
            if name in self._COPIES:
                return self._noted(torch.empty_like(first, dtype=kwargs.get("dtype") or first.dtype, device=kwargs.get("device") or first.device))
        if self._blank and func._schema.is_mutable:  # whatever is written to has values now, also by a view of a part
            for each in (*args, *kwargs.values()):
                for tensor in each if isinstance(each, (list, tuple)) else (each,):
                    if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                        self._blank.pop(tensor.untyped_storage()._cdata, None)
        out = func(*args, **kwargs)
        return self._noted(out) if name in self._MAKES else out

    def _noted(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type == "cpu" and tensor.numel() > self._LARGE and tensor.is_floating_point():
            storage = tensor.untyped_storage()
            self._blank[storage._cdata] = weakref.ref(storage)
        return tensor

    def _is_blank(self, tensor: Any) -> bool:
        if not isinstance(tensor, torch.Tensor) or tensor.numel() <= self._LARGE or tensor.layout != torch.strided:
            return False
        storage = tensor.untyped_storage()
        found = self._blank.get(storage._cdata)
        return found is not None and found() is storage
