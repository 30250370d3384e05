"""Weights that bitsandbytes packs into four or eight bits, and its paged optimizers: their substitutes without memory.

The layers and optimizers stay the library's own. Its operators have rules for shapes, so a trace sees each dequantised weight where the library
makes it; what kernels take inside is in `simulate.kernels`. Source: bitsandbytes 0.50, `functional.py`, `nn/modules.py` and `optim/optimizer.py`.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast
from unittest import mock

import torch

_STATE = ("absmax", "code", "offset")
Blank = Callable[[torch.Tensor], torch.Tensor]


def is_packed(tensor: Any) -> bool:
    """True for a parameter of bitsandbytes, also one that is packed only when it moves to a card."""
    return type(tensor).__module__.startswith("bitsandbytes") and type(tensor).__name__ in ("Params4bit", "Int8Params")


def without_values(parameter: Any, blank: Blank, kind: str) -> tuple[torch.nn.Parameter, list[torch.Tensor]]:
    """The parameter on device type `kind`, packed, and all tensors that it holds there. blank: makes the substitute of a plain tensor."""
    # A fake tensor cannot be of the library's class, and its layers only read attributes.
    if type(parameter).__name__ == "Int8Params":
        return _in_eight_bits(parameter, blank, kind)
    return _in_four_bits(parameter, blank, kind)


def whole_bytes(parameter: Any) -> int:
    """The bytes of the weight that a packed parameter is made from. It is on the card while it is packed, and what it leaves in the allocator's cache
    is there when training begins."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return 2 * parameter.numel() if parameter.dtype is torch.int8 else 0  # eight bits are made from float16
    return int(math.prod(state.shape) * state.dtype.itemsize)


def state_without_values(module: torch.nn.Module, blank: Blank) -> None:
    """Replaces what a layer in eight bits has put aside in its first forward."""
    state = getattr(module, "state", None)
    for name in ("CB", "SCB"):
        if isinstance(getattr(state, name, None), torch.Tensor):
            setattr(state, name, blank(getattr(state, name)))


@contextmanager
def pages_in_host_memory() -> Iterator[None]:
    """Inside, paged optimizers keep their pages in host memory, where the driver moves them when the card is full.

    They are no part of the allocator's memory: `functional.get_paged` takes them from cudaMallocManaged.
    """
    functional: Any = sys.modules.get("bitsandbytes.functional")
    if functional is None:
        yield
        return

    def get_paged(*shape: int, dtype: torch.dtype = torch.float32, device: Any = None) -> torch.Tensor:
        page: Any = torch.empty(shape, dtype=dtype, device="cpu")
        page.is_paged = True
        return cast(torch.Tensor, page)

    with mock.patch.multiple(functional, get_paged=get_paged, fill=_nothing, prefetch_tensor=_nothing):
        yield


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _in_four_bits(parameter: Any, blank: Blank, kind: str) -> tuple[torch.nn.Parameter, list[torch.Tensor]]:
    if parameter.bnb_quantized:
        packed, state = blank(parameter.data), _state(parameter.quant_state, blank)
    else:
        functional: Any = sys.modules["bitsandbytes.functional"]
        functional.name2qmap.setdefault("dynamic", torch.empty(256, dtype=torch.float32, device=kind))  # the library would compute its 256 values
        packed, state = functional.quantize_4bit(
            torch.empty(parameter.shape, dtype=parameter.dtype, device=kind),
            blocksize=parameter.blocksize,
            compress_statistics=parameter.compress_statistics,
            quant_type=parameter.quant_type,
            quant_storage=parameter.quant_storage,
        )
    made = torch.nn.Parameter(packed, requires_grad=False)
    vars(made).update(vars(parameter), quant_state=state, bnb_quantized=True)
    if parameter.module is not None:
        parameter.module.quant_state = state
    return made, [made, *_held(state)]


def _state(state: Any, blank: Blank) -> Any:
    found = copy.copy(state)
    for name in _STATE:
        value = getattr(found, name)
        if isinstance(value, torch.Tensor):
            setattr(found, name, blank(value))
    if found.state2 is not None:
        found.state2 = _state(found.state2, blank)
    return found


def _held(state: Any) -> list[torch.Tensor]:
    inner = [] if state.state2 is None else _held(state.state2)
    return [value for name in _STATE if isinstance(value := getattr(state, name), torch.Tensor)] + inner


def _in_eight_bits(parameter: Any, blank: Blank, kind: str) -> tuple[torch.nn.Parameter, list[torch.Tensor]]:
    if parameter.has_fp16_weights:  # packed anew in each forward
        made = torch.nn.Parameter(blank(parameter.data), parameter.requires_grad)
        vars(made).update(vars(parameter))
        return made, [made]
    packed = torch.empty(parameter.shape, dtype=torch.int8, device=kind)
    scales = torch.empty(parameter.shape[0], dtype=torch.float32, device=kind)
    made = torch.nn.Parameter(packed, requires_grad=False)
    is_put_aside = parameter.data.dtype is torch.int8 and parameter.CB is None
    vars(made).update(vars(parameter), CB=None if is_put_aside else packed, SCB=None if is_put_aside else scales)
    return made, [made] if is_put_aside else [made, scales]
