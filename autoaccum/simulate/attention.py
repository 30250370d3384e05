"""The rules by which torch selects the kernel of scaled dot-product attention for a card.

A machine without this card selects the slow "math" path, so the simulation must select the kernel itself.
Source of the order and the conditions: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, torch 2.11 to 2.13. The rules give all
600 choices of an H200 that `benchmarks/gpu/virtual.py` recorded (types, widths, masks, dropout, grouped heads).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

aten = torch.ops.aten
_HALVES = (torch.float16, torch.bfloat16)


class AttentionCall(NamedTuple):
    """The properties of one attention call that decide the kernel, together with the card.

    dims: the number of dimensions of the queries, 4 for (batch, heads, length, width).
    width, value_width: the size of a head in queries and keys, and in values.
    grouped: True if there are fewer key heads than query heads.
    """

    dims: int
    dtype: torch.dtype
    width: int
    value_width: int
    masked: bool
    grouped: bool
    biased: bool = False  # the mask needs a gradient, as T5's position bias does
    slanted: bool = False  # causal, and the numbers of keys and queries differ
    trained: bool = True
    dropout: bool = False
    dense: bool = True  # query, key, value and mask have stride 1 in the last dimension
    allowed: tuple[str, ...] = ("cudnn", "flash", "efficient", "math")  # the kernels that torch.backends.cuda's switches enable


def backend(capability: int, call: AttentionCall) -> str:
    """The selected kernel: `"cudnn"`, `"flash"`, `"efficient"` or `"math"`.

    capability: the compute capability, 75 for sm_75. Raises RuntimeError if the switches allow no usable kernel.
    """
    chosen = _chosen(capability, call)
    if chosen is None:
        raise RuntimeError("No available kernel. Aborting execution.")  # torch's words
    return chosen


def alike(first: int, second: int, call: AttentionCall) -> bool:
    """True if cards of these two compute capabilities run the call with the same kernel and the same extra memory."""
    chosen = _chosen(first, call)
    by_kernel = chosen == "efficient" and call.dtype in _HALVES  # above sm_70 this kernel computes one more sum itself
    return chosen == _chosen(second, call) and (not by_kernel or (first > 70) == (second > 70))


def _chosen(capability: int, call: AttentionCall) -> str | None:
    fit: dict[str, Callable[[int, AttentionCall], bool]] = {"cudnn": _cudnn, "flash": _flash, "efficient": _efficient}
    order = ("cudnn", "flash", "efficient", "math") if capability // 10 in (9, 10) else ("flash", "efficient", "math", "cudnn")
    for name in order:
        if name not in call.allowed:
            continue
        if name == "math" or (call.dims == 4 and call.dense and fit[name](capability, call)):
            return name
    return None


def _cudnn(capability: int, call: AttentionCall) -> bool:
    widest = 256 if capability == 90 else 128
    widths = (call.width, call.value_width)
    fits = max(widths) <= widest or (capability // 10 == 10 and widths == (192, 128))
    return call.dtype in _HALVES and capability >= 80 and fits and not any(width % 8 for width in widths) and not call.biased and not call.slanted


def _flash(capability: int, call: AttentionCall) -> bool:
    fits = call.width == call.value_width <= 256 and call.dtype in _HALVES and capability >= 80
    if capability in (86, 89, 120, 121) and call.trained and (192 < call.width <= 224 or (call.width > 224 and call.dropout)):
        return False
    return fits and not call.masked and not call.slanted


def _efficient(capability: int, call: AttentionCall) -> bool:
    # Tensor cores read 16 bytes at a time. Before sm_80 they read only half types, so a float32 head may have any width.
    aligned = 8 if call.dtype in _HALVES else 4 if capability >= 80 else 1
    if call.dtype not in (*_HALVES, torch.float32) or (call.dtype is torch.bfloat16 and capability < 80):
        return False
    return not call.grouped and not call.width % aligned and not call.value_width % aligned


def _allowed() -> tuple[str, ...]:
    switches = torch.backends.cuda
    enabled_by_name: dict[str, Callable[[], bool]] = {
        "cudnn": switches.cudnn_sdp_enabled, "flash": switches.flash_sdp_enabled, "efficient": switches.mem_efficient_sdp_enabled, "math": switches.math_sdp_enabled,
    }  # fmt: skip
    return tuple(name for name, enabled in enabled_by_name.items() if enabled())


@contextmanager
def chosen_for(capability: int) -> Iterator[set[AttentionCall]]:
    """Inside, attention on CUDA tensors runs the kernel of a card with this capability. Yields the set of calls seen so far.

    It replaces `torch.nn.functional.scaled_dot_product_attention`. A `TorchFunctionMode` is off inside `backward`, so it would
    miss the calls that activation checkpointing computes again.
    """
    calls: set[AttentionCall] = set()
    original = torch.nn.functional.scaled_dot_product_attention

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if query.device.type != "cuda":
            return original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda")
            if attn_mask is not None and attn_mask.is_floating_point():
                attn_mask = attn_mask.to(dtype)
            value, key, query = value.to(dtype), key.to(dtype), query.to(dtype)  # the order of the casts on an H200
        grouped = enable_gqa and key.shape[1] != query.shape[1]
        biased = attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled()
        call = AttentionCall(
            query.dim(), query.dtype, query.shape[-1], value.shape[-1], attn_mask is not None, grouped, biased,
            slanted=is_causal and query.shape[-2] != key.shape[-2],
            trained=torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)), dropout=dropout_p > 0,
            dense=all(tensor is None or tensor.stride(-1) == 1 for tensor in (query, key, value, attn_mask)), allowed=_allowed(),
        )  # fmt: skip
        calls.add(call)
        kernel = backend(capability, call)
        if kernel == "math":
            return original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        return _run(kernel, query, key, value, attn_mask, dropout_p, is_causal, scale)

    functional: Any = torch.nn.functional
    functional.scaled_dot_product_attention = attend
    try:
        yield calls
    finally:
        functional.scaled_dot_product_attention = original


def _run(
    kernel: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
) -> torch.Tensor:
    needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    if kernel == "flash":
        flash: Callable[..., Any] = aten._scaled_dot_product_flash_attention
        width = query.shape[-1]
        if width % 8:  # torch pads in the same way before it calls the kernel
            scale = width**-0.5 if scale is None else scale
            query, key, value = (torch.nn.functional.pad(tensor, (0, 8 - width % 8)) for tensor in (query, key, value))
        return flash(query, key, value, dropout, causal, scale=scale)[0][..., :width]  # type: ignore[no-any-return]
    if mask is not None and mask.dtype is torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), float("-inf"))
    if mask is not None:
        mask = mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    if kernel == "cudnn":
        return aten._scaled_dot_product_cudnn_attention(query, key, value, mask, needs_gradient, dropout, causal, False, scale=scale)[0]  # type: ignore[no-any-return]
    return aten._scaled_dot_product_efficient_attention(query, key, value, mask, needs_gradient, dropout, causal, scale=scale)[0]  # type: ignore[no-any-return]
