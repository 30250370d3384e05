"""Weights that bitsandbytes packs into four bits: their substitutes without memory, with what its kernels need beside them.

The layers stay the library's own. Its operators have rules for shapes, so a trace sees each dequantised weight where the library makes it.
Source: bitsandbytes 0.50, `functional.py` and `nn/modules.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

_STATE = ("absmax", "code", "offset")


def is_packed(tensor: torch.Tensor) -> bool:
    """True for a parameter of bitsandbytes in four bits, also one that is packed only when it moves to a card."""
    return type(tensor).__name__ == "Params4bit" and type(tensor).__module__.startswith("bitsandbytes")


def without_values(parameter: Any, blank: Callable[[torch.Tensor], torch.Tensor], kind: str) -> tuple[Any, list[torch.Tensor]]:
    """The parameter on device type `kind`, packed, and all tensors that it holds there. blank: makes the substitute of a plain tensor."""
    import bitsandbytes

    if parameter.bnb_quantized:
        packed, state = blank(parameter.data), _state(parameter.quant_state, blank)
    else:
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=kind)
        packed, state = bitsandbytes.functional.quantize_4bit(
            whole,
            blocksize=parameter.blocksize,
            compress_statistics=parameter.compress_statistics,
            quant_type=parameter.quant_type,
            quant_storage=parameter.quant_storage,
        )
    made = torch.nn.Parameter(packed, requires_grad=False)  # a fake tensor cannot be of the library's class, and its layers only read these attributes
    vars(made).update(vars(parameter), quant_state=state, bnb_quantized=True)
    if parameter.module is not None:
        parameter.module.quant_state = state
    return made, [made, *_held(state)]


def _state(state: Any, blank: Callable[[torch.Tensor], torch.Tensor]) -> Any:
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
