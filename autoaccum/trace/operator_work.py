"""What operators compute and move, counted while a job is traced: the figures from which its time on a card follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class OperatorWork:
    """The work of one call of an operator.

    phase: of the window. flops: floating point operations, by torch's own formulas (`torch.utils.flop_counter`); 0 for operators without one.
    nbytes: of all tensors that it reads and writes. dtype: what it computes in, as in a card's data file.
    """

    phase: str
    flops: float
    nbytes: float
    dtype: str


def of(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any, phase: str) -> OperatorWork | None:
    """The work of a call that returned `out`; None for one that only looks at memory in another way, and starts no kernel."""
    results = _tensors(out)
    given = [value for value in _tensors(args) if value.device.type != "cpu"]
    storages = {value.untyped_storage()._cdata for value in given}
    if func._schema.is_mutable:
        written: Sequence[torch.Tensor] = ()  # what is written is among the arguments
    else:
        written = [value for value in results if value.untyped_storage()._cdata not in storages]
        if not written:
            return None
    name = func._overloadpacket.__name__
    if name.startswith(("empty", "new_empty")):
        return None
    formula = flop_registry.get(func._overloadpacket)
    flops = float(formula(*args, **kwargs, out_val=out)) if formula is not None else 0.0
    floating = next((value.dtype for value in (*given, *written) if value.is_floating_point()), torch.float32)
    return OperatorWork(phase, flops, float(sum(map(_nbytes, given)) + sum(map(_nbytes, written))), _dtype(floating, "conv" in name))


def _tensors(values: Any) -> list[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        return [values]
    return [tensor for value in values for tensor in _tensors(value)] if isinstance(values, (tuple, list)) else []


def _nbytes(value: torch.Tensor) -> int:
    """The bytes that are read of a tensor: an expanded one is read from the cache."""
    return min(value.numel() * value.element_size(), value.untyped_storage().nbytes())


def _dtype(dtype: torch.dtype, convolves: bool) -> str:
    if dtype is torch.float16:
        return "fp16"
    if dtype is torch.bfloat16:
        return "bf16"
    allows = torch.backends.cudnn.allow_tf32 if convolves else torch.backends.cuda.matmul.allow_tf32
    return "tf32" if dtype is torch.float32 and allows else "fp32"
