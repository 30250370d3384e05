"""Which kernel a card would take for scaled dot-product attention; a machine without it would take the slow one.

Order and conditions: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, torch 2.11 to 2.13; not yet seen on a card.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

aten = torch.ops.aten
_HALVES = (torch.float16, torch.bfloat16)


class Asked(NamedTuple):
    """What the choice depends on, beside the card. dims: of the queries, 4 for (batch, heads, length, width).
    width: of a head. grouped: fewer heads of keys than of queries."""

    dims: int
    dtype: torch.dtype
    width: int
    alike: bool  # queries and values are of one width
    masked: bool
    grouped: bool
    biased: bool = False  # the mask gets a gradient, as T5's position bias does


def backend(capability: int, asked: Asked) -> str:
    """`"cudnn"`, `"flash"`, `"efficient"` or `"math"`. capability: 75 for sm_75."""
    if asked.dims != 4:
        return "math"
    half = asked.dtype in _HALVES
    if half and asked.alike and asked.width % 8 == 0:
        if capability // 10 in (9, 10) and asked.width <= 128 and not asked.biased:
            return "cudnn"
        if asked.width <= 256 and not asked.masked and capability >= 80:
            return "flash"
    if not asked.grouped and asked.width % (8 if half else 4) == 0 and (capability >= 80 or asked.dtype is not torch.bfloat16):
        return "efficient"
    return "math"


@contextmanager
def chosen_for(capability: int) -> Iterator[set[Asked]]:
    """Inside, attention on CUDA tensors runs the kernel of such a card; yields what was asked.

    Replaced by name: a mode for functions is off inside `backward`, so what checkpointing computes again would miss it.
    """
    seen: set[Asked] = set()
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
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        grouped = enable_gqa and key.shape[1] != query.shape[1]
        biased = attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled()
        asked = Asked(query.dim(), query.dtype, query.shape[-1], query.shape[-1] == value.shape[-1], attn_mask is not None, grouped, biased)
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
        return out(query, key, value, dropout, causal, scale=scale)[0]  # type: ignore[no-any-return]
    if mask is not None and mask.dtype is torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), float("-inf"))
    if mask is not None:
        mask = mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    if taken == "cudnn":
        return aten._scaled_dot_product_cudnn_attention(query, key, value, mask, needs_gradient, dropout, causal, False, scale=scale)[0]  # type: ignore[no-any-return]
    return aten._scaled_dot_product_efficient_attention(query, key, value, mask, needs_gradient, dropout, causal, scale=scale)[0]  # type: ignore[no-any-return]
