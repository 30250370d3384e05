"""Memory that kernels take from the allocator unseen, and give back when they return.

No operator shows it, so each row here says from a call's shapes how much it is. `MEASURED` rows were compared with a
card; `ESTIMATED` ones follow from the kernel's source or its documentation, and nobody has compared them yet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch


@dataclass(frozen=True)
class Card:
    """What of a card the rows need. capability: 75 for sm_75. cublas_workspace_bytes: per handle, that is per thread."""

    capability: int
    cublas_workspace_bytes: int
    benchmark: bool = False


Bytes = Sequence[int]


@dataclass(frozen=True)
class Row:
    """operators: names in `torch.ops.aten`. bytes_of: `(arguments, result, card)` -> what is taken at once, in bytes."""

    operators: tuple[str, ...]
    bytes_of: Callable[[Sequence[Any], Any, Card], Bytes]
    formula: str
    source: str
    mark: Literal["measured", "estimated"] = "estimated"


def taken(operator: str, arguments: Sequence[Any], result: Any, card: Card) -> Bytes:
    """Bytes that this call takes beside its results, block by block."""
    row = _BY_OPERATOR.get(operator)
    return () if row is None else [nbytes for nbytes in row.bytes_of(arguments, result, card) if nbytes > 0]


def takes_cublas(operator: str) -> bool:
    """True for what runs on cuBLAS, whose handle of the thread then has its workspace, for good."""
    return operator in _CUBLAS


_CUBLAS = {"mm", "addmm", "bmm", "baddbmm", "addmv", "mv", "dot", "_scaled_mm", "linear", "matmul"}


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def _flash_backward(arguments: Sequence[Any], result: Any, card: Card) -> Bytes:
    query, key = arguments[1], arguments[2]
    batch, heads, length, width = query.shape
    padded = _up(width, 32) if width <= 128 else _up(width, 64)
    groups = heads // key.shape[1]
    expanded = 2 * batch * heads * key.shape[2] * key.shape[3] * key.element_size() if groups > 1 else 0
    return [4 * batch * heads * _up(length, 128), 4 * batch * _up(length, 128) * heads * padded, expanded]


def _efficient_backward(arguments: Sequence[Any], result: Any, card: Card) -> Bytes:
    query = arguments[1]
    batch, heads, length, width = query.shape
    # The accumulator of the queries' gradient in single precision is needed where that gradient is a half.
    accumulator = 4 * batch * heads * length * width if query.element_size() == 2 else 0
    return [4 * batch * heads * _up(length, 16), accumulator]


def _cudnn_attention_backward(arguments: Sequence[Any], result: Any, card: Card) -> Bytes:
    batch, heads, length, width = arguments[1].shape
    return [4 * batch * heads * length * (width + 1)]


def _embedding_backward(arguments: Sequence[Any], result: Any, card: Card) -> Bytes:
    gradient, indices, weights = arguments[0], arguments[1], arguments[2]
    count = indices.numel()
    if count <= 3072:
        return []
    return [8 * count, 8 * count, 8 * count, 4 * min(count, count // 10 + int(weights)) * gradient.shape[-1]]


def _index_backward(arguments: Sequence[Any], result: Any, card: Card) -> Bytes:
    indices = [each for each in arguments[1] if isinstance(each, torch.Tensor)]
    return [8 * each.numel() for each in indices for _ in range(4) if each.dtype is not torch.bool]


def _group_norm_backward(arguments: Sequence[Any], result: Any, card: Card) -> Bytes:
    samples, channels = arguments[1].shape[:2]
    return [4 * samples * channels, 4 * samples * channels]


def _layer_norm_backward(arguments: Sequence[Any], result: Any, card: Card) -> Bytes:
    width = math.prod(arguments[2])
    rows = arguments[1].numel() // max(width, 1)
    # Partial sums of both parameters' gradients, a block of rows each.
    return [4 * min(rows // 32 + 1, 512) * width] * 2


def _scan(arguments: Sequence[Any], result: Any, card: Card) -> Bytes:
    first = arguments[0]
    return [first.nbytes + 8 * first.numel()] if isinstance(first, torch.Tensor) else []


def _rnn(arguments: Sequence[Any], result: Any, card: Card) -> Bytes:
    first = arguments[0]
    return [4 * first.numel() * 4]


def _convolution(arguments: Sequence[Any], result: Any, card: Card) -> Bytes:
    # Without benchmark mode, nothing agreed better with published peaks than something.
    return [result.nbytes] if card.benchmark and _is_dense(arguments[0], arguments[1]) else []


def _convolution_backward(arguments: Sequence[Any], result: Any, card: Card) -> Bytes:
    images, weight = arguments[1], arguments[2]
    return [images.nbytes] if card.benchmark and _is_dense(images, weight) else []


def _is_dense(images: torch.Tensor, weight: torch.Tensor) -> bool:
    """False for depthwise convolutions, which run on kernels of torch's own, without a workspace."""
    return bool(weight.shape[1] > 1 or images.shape[1] == 1)


def is_benchmarked(operator: str) -> bool:
    """True for what cuDNN's benchmark mode tries out."""
    return operator in ("convolution", "convolution_backward")


def benchmark_bytes(operator: str, arguments: Sequence[Any], result: Any) -> int:
    """The largest workspace that the benchmark of a convolution tries."""
    if operator == "convolution":
        return int(arguments[0].nbytes + result.nbytes)
    return int(arguments[0].nbytes + arguments[1].nbytes)


ROWS = (
    Row(
        ("_scaled_dot_product_flash_attention_backward",),
        _flash_backward,
        "fp32: B H up(S,128) and B up(S,128) H up(D,32|64); expanded keys and values where heads are grouped",
        "flash-attention 2, csrc/flash_attn/flash_api.cpp, mha_bwd: softmax_d, dq_accum, dk_expanded",
    ),
    Row(
        ("_scaled_dot_product_efficient_attention_backward",),
        _efficient_backward,
        "fp32: B H up(S,16), and B H S D for halves",
        "aten/native/transformers/cuda/attention_backward.cu: delta, workspace of the queries' gradient",
    ),
    Row(
        ("_scaled_dot_product_cudnn_attention_backward",),
        _cudnn_attention_backward,
        "fp32: B H S (D + 1)",
        "by analogy with flash-attention: an accumulator of the queries' gradient and a sum per row",
    ),
    Row(
        ("embedding_dense_backward",),
        _embedding_backward,
        "above 3072 indices N: three times 8 N, and fp32 partial sums of min(N, N/10 + V) rows",
        "aten/native/cuda/Embedding.cu and EmbeddingBackwardKernel.cu",
    ),
    Row(
        ("index_put", "index_put_", "_index_put_impl_"),
        _index_backward,
        "4 x the indices' bytes",
        "aten/native/cuda/Indexing.cu: sorted copies and cub's storage",
    ),
    Row(("native_group_norm_backward",), _group_norm_backward, "fp32: 2 x N x C", "aten/native/cuda/group_norm_kernel.cu: ds and db"),
    Row(
        ("native_layer_norm_backward",), _layer_norm_backward, "fp32: 2 x min(rows/32 + 1, 512) x width", "aten/native/cuda/layer_norm_kernel.cu: partial sums"
    ),
    Row(("sort", "topk", "cumsum", "cumprod", "multinomial"), _scan, "the input and 8 bytes an element", "cub: DeviceRadixSort and DeviceScan storage"),
    Row(("_cudnn_rnn", "_cudnn_rnn_backward"), _rnn, "16 bytes an element of the input", "no public formula: a guess"),
    Row(
        ("convolution", "cudnn_convolution"),
        _convolution,
        "in benchmark mode the output once more, unless depthwise",
        "cuDNN's plans for tensor cores convert layouts; no formula is public, and one tensor agrees best with the published peaks of timm's models",
    ),
    Row(("convolution_backward",), _convolution_backward, "in benchmark mode the input once more, unless depthwise", "as forward"),
)
_BY_OPERATOR = {operator: row for row in ROWS for operator in row.operators}
