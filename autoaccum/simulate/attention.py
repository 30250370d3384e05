"""Which kernel a card would take for scaled dot-product attention; a machine without it would take the slow one.

Order and conditions: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, torch 2.11 to 2.13. All 600 choices of an H200 that
`benchmarks/gpu/virtual.py` asked for (types, widths, masks, dropout, grouped heads) are these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

aten = torch.ops.aten
_HALVES = (torch.float16, torch.bfloat16)


class AttentionCall(NamedTuple):
    """What the choice depends on, beside the card. dims: of the queries, 4 for (batch, heads, length, width).
    width, value_width: of a head. grouped: fewer heads of keys than of queries."""

    dims: int
    dtype: torch.dtype
    width: int
    value_width: int
    masked: bool
    grouped: bool
    biased: bool = False  # the mask gets a gradient, as T5's position bias does
    slanted: bool = False  # causal, with more keys than queries or fewer
    trained: bool = True
    dropout: bool = False
    dense: bool = True  # the last dimension of all four lies together, in the memory of each
    allowed: tuple[str, ...] = ("cudnn", "flash", "efficient", "math")  # by torch.backends.cuda's switches


def backend(capability: int, asked: AttentionCall) -> str:
    """`"cudnn"`, `"flash"`, `"efficient"` or `"math"`. capability: 75 for sm_75. Raises RuntimeError where the switches leave nothing."""
    chosen = _chosen(capability, asked)
    if chosen is None:
        raise RuntimeError("No available kernel. Aborting execution.")  # torch's words
    return chosen


def alike(one: int, other: int, asked: AttentionCall) -> bool:
    """Whether cards of these capabilities go about it in the same way."""
    chosen = _chosen(one, asked)
    by_kernel = chosen == "efficient" and asked.dtype in _HALVES  # which then adds up more itself on all but the oldest
    return chosen == _chosen(other, asked) and (not by_kernel or (one > 70) == (other > 70))


def _chosen(capability: int, asked: AttentionCall) -> str | None:
    fit: dict[str, Callable[[int, AttentionCall], bool]] = {"cudnn": _cudnn, "flash": _flash, "efficient": _efficient}
    order = ("cudnn", "flash", "efficient", "math") if capability // 10 in (9, 10) else ("flash", "efficient", "math", "cudnn")
    for name in order:
        if name not in asked.allowed:
            continue
        if name == "math" or (asked.dims == 4 and asked.dense and fit[name](capability, asked)):
            return name
    return None


def _cudnn(capability: int, asked: AttentionCall) -> bool:
    widest = 256 if capability == 90 else 128
    widths = (asked.width, asked.value_width)
    fits = max(widths) <= widest or (capability // 10 == 10 and widths == (192, 128))
    return asked.dtype in _HALVES and capability >= 80 and fits and not any(each % 8 for each in widths) and not asked.biased and not asked.slanted


def _flash(capability: int, asked: AttentionCall) -> bool:
    fits = asked.width == asked.value_width <= 256 and asked.dtype in _HALVES and capability >= 80
    if capability in (86, 89, 120, 121) and asked.trained and (192 < asked.width <= 224 or (asked.width > 224 and asked.dropout)):
        return False
    return fits and not asked.masked and not asked.slanted


def _efficient(capability: int, asked: AttentionCall) -> bool:
    # Tensor cores read 16 bytes at a time, before sm_80 only of halves: elsewhere a head may be of any width.
    aligned = 8 if asked.dtype in _HALVES else 4 if capability >= 80 else 1
    if asked.dtype not in (*_HALVES, torch.float32) or (asked.dtype is torch.bfloat16 and capability < 80):
        return False
    return not asked.grouped and not asked.width % aligned and not asked.value_width % aligned


def _allowed() -> tuple[str, ...]:
    switches = torch.backends.cuda
    told: dict[str, Callable[[], bool]] = {
        "cudnn": switches.cudnn_sdp_enabled, "flash": switches.flash_sdp_enabled, "efficient": switches.mem_efficient_sdp_enabled, "math": switches.math_sdp_enabled,
    }  # fmt: skip
    return tuple(name for name, enabled in told.items() if enabled())


@contextmanager
def chosen_for(capability: int) -> Iterator[set[AttentionCall]]:
    """Inside, attention on CUDA tensors runs the kernel of such a card; yields what was asked.

    Replaced by name: a mode for functions is off inside `backward`, so what checkpointing computes again would miss it.
    """
    seen: set[AttentionCall] = set()
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
            value, key, query = value.to(dtype), key.to(dtype), query.to(dtype)  # in the order in which an H200's process casts them
        grouped = enable_gqa and key.shape[1] != query.shape[1]
        biased = attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled()
        asked = AttentionCall(
            query.dim(), query.dtype, query.shape[-1], value.shape[-1], attn_mask is not None, grouped, biased,
            slanted=is_causal and query.shape[-2] != key.shape[-2],
            trained=torch.is_grad_enabled() and any(each.requires_grad for each in (query, key, value)), dropout=dropout_p > 0,
            dense=all(each is None or each.stride(-1) == 1 for each in (query, key, value, attn_mask)), allowed=_allowed(),
        )  # fmt: skip
        seen.add(asked)
        taken = backend(capability, asked)
        if taken == "math":
            return original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        return _run(taken, query, key, value, attn_mask, dropout_p, is_causal, scale)

    functional: Any = torch.nn.functional
    functional.scaled_dot_product_attention = attend
    try:
        yield seen
    finally:
        functional.scaled_dot_product_attention = original


def _run(
    taken: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
) -> torch.Tensor:
    needs_gradient = torch.is_grad_enabled() and any(each.requires_grad for each in (query, key, value))
    if taken == "flash":
        out: Callable[..., Any] = aten._scaled_dot_product_flash_attention
        width = query.shape[-1]
        if width % 8:  # as torch does before it calls the kernel
            scale = width**-0.5 if scale is None else scale
            query, key, value = (torch.nn.functional.pad(each, (0, 8 - width % 8)) for each in (query, key, value))
        return out(query, key, value, dropout, causal, scale=scale)[0][..., :width]  # type: ignore[no-any-return]
    if mask is not None and mask.dtype is torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), float("-inf"))
    if mask is not None:
        mask = mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    if taken == "cudnn":
        return aten._scaled_dot_product_cudnn_attention(query, key, value, mask, needs_gradient, dropout, causal, False, scale=scale)[0]  # type: ignore[no-any-return]
    return aten._scaled_dot_product_efficient_attention(query, key, value, mask, needs_gradient, dropout, causal, scale=scale)[0]  # type: ignore[no-any-return]
