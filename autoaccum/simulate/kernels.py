"""The table of temporary memory that kernels take from the allocator inside an operator, and free before it returns.

A trace of operators does not contain this memory. Each row computes it from the shapes of a call: how many bytes, and when.
Rows marked "measured" agree with an H200 (torch 2.11, cuDNN 9.19; `benchmarks/gpu/virtual.py`, part B). Rows marked "estimated" follow
from the kernel's source or its documentation; they have not been compared with a card.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from autoaccum.simulate import convolutions
from autoaccum.simulate.kernel_choice import Card
from autoaccum.simulate.reductions import staging
from autoaccum.simulate.tape import Staging
from autoaccum.units import MIB


class Taken(NamedTuple):
    """Bytes that are allocated from `begin` to `end` of a call.

    begin, end: the number of results that exist: 1.0 after the first result, 2.0 after the second. end: None if the bytes are freed
    when the call returns.
    staging: used instead of `nbytes` for a sum whose memory depends on the size of the card.
    """

    nbytes: int
    begin: float = 0.0
    end: float | None = None
    staging: Staging | None = None


@dataclass(frozen=True)
class Row:
    """The rule for some operators.

    operators: names in `torch.ops.aten`. taken: a function `(arguments, results, card)` that returns the temporary memory.
    order: a function of the arguments. It returns the order in which a card makes the result tensors, by their numbers; None if that
    is the order of the results. A result that is left out is not made on the card.
    """

    operators: tuple[str, ...]
    taken: Callable[[Sequence[Any], Sequence[Any], Card], Sequence[Taken]]
    formula: str
    source: str
    mark: Literal["measured", "estimated"] = "estimated"
    order: Callable[[Sequence[Any]], tuple[int, ...] | None] = lambda _: None


def taken(operator: str, arguments: Sequence[Any], results: Sequence[Any], card: Card) -> Sequence[Taken]:
    """The temporary memory of this call, without its results."""
    row = _BY_OPERATOR.get(operator)
    return () if row is None else [piece for piece in row.taken(arguments, results, card) if piece.nbytes > 0 or piece.staging is not None]


def order(operator: str, arguments: Sequence[Any]) -> tuple[int, ...] | None:
    """The order in which a card makes the results of this call; None if that is the order of the results."""
    row = _BY_OPERATOR.get(operator)
    return None if row is None else row.order(arguments)


def handles(operator: str) -> tuple[str, ...]:
    """The libraries that this operator makes a handle of, if the thread has none yet. The workspace of a handle is never freed."""
    if operator not in _CUBLAS:
        return ()
    return ("cublas", "cublaslt") if operator == "addmm" else ("cublas",)


LT_BYTES = MIB  # at::cuda::getCUDABlasLtWorkspaceSize (CUBLASLT_WORKSPACE_SIZE); measured on an H200 (torch 2.11) and a T4 (2.10, 2.14): one of its own beside cuBLAS's
_CUBLAS = {"mm", "addmm", "bmm", "baddbmm", "addmv", "mv", "dot", "_scaled_mm", "linear", "matmul"}


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


# -- sums --


def _sum(arguments: Sequence[Any], results: Sequence[Any], card: Card) -> Sequence[Taken]:
    value = arguments[0]
    dims = arguments[1] if len(arguments) > 1 and isinstance(arguments[1], (list, tuple)) else ()
    if not value.is_floating_point():  # the sum is computed in int64
        return [Taken(8 * value.numel(), 1)] if value.element_size() < 8 else []
    return _staged(value, dims, 1)


def _staged(value: torch.Tensor, dims: Sequence[int], begin: float, end: float | None = None) -> list[Taken]:
    rule = staging(value, dims)
    return [] if rule is None else [Taken(0, begin, end, rule)]


# -- attention --


def _flash_backward(arguments: Sequence[Any], results: Sequence[Any], card: Card) -> Sequence[Taken]:
    query, key = arguments[1], arguments[2]
    batch, heads, length, width = query.shape
    padded = _up(width, 32) if width <= 128 else _up(width, 64)
    copies = [Taken(tensor.nbytes) for tensor in (arguments[0], arguments[4]) if not tensor.transpose(1, 2).is_contiguous()]
    sums = [Taken(4 * batch * heads * _up(length, 128), 3), Taken(4 * batch * _up(length, 128) * heads * padded, 3)]
    return [*copies, *sums, *(Taken(_expanded(query, key), 3) for _ in range(2))]


def _expanded(query: torch.Tensor, key: torch.Tensor) -> int:
    """The bytes of a gradient of the keys, or of the values, with one head for every query head; 0 if the heads are not grouped."""
    heads = query.shape[1]
    return key.nbytes // key.shape[1] * heads if heads > key.shape[1] else 0


def _efficient_backward(arguments: Sequence[Any], results: Sequence[Any], card: Card) -> Sequence[Taken]:
    gradient, query = arguments[0], arguments[1]
    batch, heads, length, width = query.shape
    last = len(results)
    copied = [] if gradient.transpose(1, 2).is_contiguous() else [Taken(gradient.nbytes)]
    tiles = -(-length // 64) * -(-width // 64)
    # torch sums the product of the output and its gradient, and copies the sum to another layout. The kernel for half types does it itself.
    sums = 4 * batch * heads * length
    by_kernel = query.dtype is not torch.float32 and card.capability > 70
    delta = [Taken(sums, last)] if by_kernel else [Taken(4 * query.numel(), last, last + 0.3), Taken(sums, last + 0.1, last + 0.3), Taken(sums, last + 0.2)]
    return [*copied, *delta, Taken(batch * heads * tiles * (64 * 64 * 4 + 16), last + 0.4)]


def _cudnn_attention(arguments: Sequence[Any], results: Sequence[Any], card: Card) -> Sequence[Taken]:
    return [Taken(256, 4)]


def _cudnn_attention_backward(arguments: Sequence[Any], results: Sequence[Any], card: Card) -> Sequence[Taken]:
    batch, heads, length, width = arguments[1].shape
    return [Taken(4 * batch * heads * length * (width + 1) + 2 * _expanded(arguments[1], arguments[2]) + 256, 3)]


# -- norms --


def _copies(*places: int) -> Callable[[Sequence[Any], Sequence[Any], Card], Sequence[Taken]]:
    """A rule: contiguous copies of those arguments at `places` that are not contiguous."""

    def taken(arguments: Sequence[Any], results: Sequence[Any], card: Card) -> Sequence[Taken]:
        given = [arguments[place] for place in places if place < len(arguments)]
        return [Taken(value.numel() * value.element_size()) for value in given if isinstance(value, torch.Tensor) and not value.is_contiguous()]

    return taken


def _layer_norm_backward(arguments: Sequence[Any], results: Sequence[Any], card: Card) -> Sequence[Taken]:
    width = math.prod(arguments[2])
    rows = arguments[1].numel() // max(width, 1)
    pieces = [*_copied(arguments[1], 0.0), *_copied(arguments[0], 3.0)]
    if rows > 64 * 1024 and width // 32 < 64:  # fewer columns than half the multiprocessors of a large card
        partial = 4 * -(-rows // 32) * width
        pieces += [Taken(partial, 3), Taken(partial, 3)]
    return pieces


def _batch_norm(arguments: Sequence[Any], results: Sequence[Any], card: Card) -> Sequence[Taken]:
    return _meeting(arguments[0], 4, 3.0)


def _batch_norm_backward(arguments: Sequence[Any], results: Sequence[Any], card: Card) -> Sequence[Taken]:
    value = arguments[1]
    sums = [Taken(4 * value.shape[1])] * 2 if _channels_last(value) else []
    return [*sums, *_meeting(value, 2, 2.0)]


def _meeting(value: torch.Tensor, floats: int, begin: float) -> list[Taken]:
    """The staging buffer and semaphores of the thread blocks that compute channels-last statistics together."""
    if not _channels_last(value):
        return []
    channels = value.shape[1]
    rows = value.numel() // channels
    width = min(_power(channels), 32)
    height = min(_power(-(-rows // 16)), 512 // width)
    width = min(_power(channels), 512 // height)
    blocks = min(-(-rows // (height * 16)), 128)
    return [] if blocks < 8 else [Taken(4 * floats * channels * blocks, begin, begin + 0.2), Taken(4 * -(-channels // width), begin + 0.1, begin + 0.2)]


def _channels_last(value: torch.Tensor) -> bool:
    return value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last) and not value.is_contiguous()


def _power(value: int) -> int:
    return 1 << (max(value, 1).bit_length() - 1)


def _group_norm(arguments: Sequence[Any], results: Sequence[Any], card: Card) -> Sequence[Taken]:
    samples, channels = arguments[0].shape[:2]
    return [Taken(4 * samples * channels, 3), Taken(4 * samples * channels, 3)]


def _group_norm_backward(arguments: Sequence[Any], results: Sequence[Any], card: Card) -> Sequence[Taken]:
    samples, channels = arguments[1].shape[:2]
    groups = arguments[2].numel() // samples
    of_channels, of_groups = 4 * samples * channels, 4 * samples * groups
    return [Taken(size, 3) for size in (of_channels, of_channels, of_groups, of_groups, of_channels)]


# -- the rest --


def _embedding_backward(arguments: Sequence[Any], results: Sequence[Any], card: Card) -> Sequence[Taken]:
    gradient, indices, weights = arguments[0], arguments[1], int(arguments[2])
    count, width = indices.numel(), gradient.shape[-1]
    copies = [*_copied(indices, 0.0), *_copied(gradient, 0.0)]
    if count <= 3072:
        return copies
    cub = [Taken(8 * count, 0.0, 0.2), Taken(16 * count + 16895 + 1024 * -(-count // 4608), 0.1, 0.2)]
    segments = min(count, weights)  # an upper bound: the exact number depends on the values of the indices
    partial = count // 10 + segments
    blocks = -(-segments * _up(width, 32) // min(_up(width, 32), 1024))
    # torch adds up a small number of rows with atomic operations. The limit depends on the card; this is the limit of a small card.
    by_atomics = partial > 4 * blocks and blocks < 4 * 40 and not torch.are_deterministic_algorithms_enabled()
    segment_offsets = [Taken(8 * count, 1.0), Taken(8, 1.0), Taken(8 * count, 1.0, 1.1)]
    after = [8 * segments, 8 * segments, 8, 8 * partial, 8 * partial if by_atomics else 4 * partial * width]
    return [*copies, *(Taken(8 * count) for _ in range(2)), *cub, *segment_offsets, *(Taken(nbytes, 1.2) for nbytes in after)]


def _index_backward(arguments: Sequence[Any], results: Sequence[Any], card: Card) -> Sequence[Taken]:
    indices = [index for index in arguments[1] if isinstance(index, torch.Tensor) and index.dtype is not torch.bool]
    if not indices or not (len(arguments) > 3 and arguments[3]):
        return []
    count = max(index.numel() for index in indices)
    last = len(results)
    return [*(Taken(8 * count, last) for _ in range(5)), *_copied(arguments[2], last), Taken(16 * count, last)]


def _copied(value: Any, begin: float) -> list[Taken]:
    return [Taken(value.numel() * value.element_size(), begin)] if isinstance(value, torch.Tensor) and not value.is_contiguous() else []


def _softmax_backward(arguments: Sequence[Any], results: Sequence[Any], card: Card) -> Sequence[Taken]:
    gradient, output = arguments[0], arguments[1]
    return [Taken(gradient.numel() * torch.promote_types(gradient.dtype, output.dtype).itemsize, 1)]


def _safe_softmax(arguments: Sequence[Any], results: Sequence[Any], card: Card) -> Sequence[Taken]:
    count = arguments[0].numel()
    return [Taken(count, 1), Taken(count // max(arguments[0].shape[-1], 1), 1), Taken(4, 1)]


def _scan(arguments: Sequence[Any], results: Sequence[Any], card: Card) -> Sequence[Taken]:
    first = arguments[0]
    return [Taken(first.nbytes + 8 * first.numel(), len(results))] if isinstance(first, torch.Tensor) else []


def _cumulative(arguments: Sequence[Any], results: Sequence[Any], card: Card) -> Sequence[Taken]:
    return [Taken(results[0].nbytes, 1)] if arguments[0].dtype is not results[0].dtype else []


def _norms(arguments: Sequence[Any], results: Sequence[Any], card: Card) -> Sequence[Taken]:
    chunks = max((-(-tensor.numel() // 65536) for tensor in arguments[0]), default=0)
    return [Taken(4 * len(arguments[0]) * chunks)]


def _four_bit_product(arguments: Sequence[Any], results: Sequence[Any], card: Card) -> Sequence[Taken]:
    value, _, shape, *_ = arguments
    rows, columns = shape
    scales = 4 * -(-rows * columns // arguments[4]) if len(arguments) > 7 and arguments[7] is not None else 0  # packed themselves
    return [Taken(scales), Taken(value.element_size() * rows * columns)]


def _eight_bit_rows(arguments: Sequence[Any], results: Sequence[Any], card: Card) -> Sequence[Taken]:
    has_threshold = len(arguments) > 1 and arguments[1]
    return [Taken(arguments[0].nbytes, 2, 2.5), Taken(arguments[0].numel(), 2)] if has_threshold else []


def _eight_bit_product(arguments: Sequence[Any], results: Sequence[Any], card: Card) -> Sequence[Taken]:
    return [Taken(4 * results[0].numel())]


def _rnn(arguments: Sequence[Any], results: Sequence[Any], card: Card) -> Sequence[Taken]:
    return [Taken(16 * arguments[0].numel(), len(results))]


def _convolution(arguments: Sequence[Any], results: Sequence[Any], card: Card) -> Sequence[Taken]:
    if card.benchmark:  # cuDNN uses the fastest algorithm. The size of one more output agrees best with the published peaks of timm's models
        return [Taken(results[0].nbytes, 1)] if convolutions.Shape.of(arguments[0], arguments[1], results[0], arguments[8]).dense else []
    shape = convolutions.Shape.of(arguments[0], arguments[1], results[0], arguments[8])
    return [Taken(convolutions.forward(shape, card.capability), 1)]


def _convolution_backward(arguments: Sequence[Any], results: Sequence[Any], card: Card) -> Sequence[Taken]:
    gradient, images, weight = arguments[:3]
    if card.benchmark:
        return [Taken(images.nbytes, len(results))] if convolutions.Shape.of(images, weight, gradient, arguments[9]).dense else []
    shape = convolutions.Shape.of(images, weight, gradient, arguments[9])
    output_mask = arguments[10]
    same_format = gradient.is_contiguous() or (_channels_last(gradient) and _channels_last(images))
    pieces = [] if same_format else [Taken(gradient.numel() * gradient.element_size())]
    made = 0
    for needed, rule in zip(output_mask, (convolutions.of_images, convolutions.of_weights, None)):
        if not needed:
            continue
        made += 1
        pieces += [Taken(rule(shape, card.capability), made, made + 0.1)] if rule else _staged(gradient, (0, *range(2, gradient.dim())), made)
    return pieces


def _is_depthwise(arguments: Sequence[Any]) -> bool:
    return bool(arguments[9] > 1 and arguments[9] == arguments[1].shape[1] and not _channels_last(arguments[1]))


def is_benchmarked(operator: str) -> bool:
    """True for the operators that cuDNN's benchmark mode times."""
    return operator in ("convolution", "convolution_backward")


def benchmark_bytes(operator: str, arguments: Sequence[Any], result: Any) -> int:
    """The largest workspace that the benchmark of a convolution tries if little memory is free.

    It may try one as large as the free memory.
    """
    if operator == "convolution":
        return int(arguments[0].nbytes + result.nbytes)
    return int(arguments[0].nbytes + arguments[1].nbytes)


_ATEN = "aten/src/ATen/native"
ROWS = (
    Row(("sum", "mean"), _sum, "a meeting place of thread blocks, see tape.Staging; whole numbers as 64 bits", f"{_ATEN}/cuda/Reduce.cuh", "measured"),
    Row(
        ("_scaled_dot_product_flash_attention_backward",),
        _flash_backward,
        "copies of what lies otherwise; fp32: B H up(S,128) and B up(S,128) H up(D,32|64); two expanded gradients where heads are grouped",
        "flash-attention 2, csrc/flash_attn/flash_api.cpp, mha_bwd: softmax_d, dq_accum, dk_expanded",
        "measured",
    ),
    Row(
        ("_scaled_dot_product_efficient_attention",),
        lambda *_: (),
        "nothing; the generator's seed and offset stay on the host",
        f"{_ATEN}/transformers/cuda/attention.cu",
        "measured",
        order=lambda _: (0, 1),
    ),
    Row(
        ("_scaled_dot_product_efficient_attention_backward",),
        _efficient_backward,
        "a copy of a gradient that lies otherwise; fp32: B H S, of fp32 also B H S D and B H S again; tiles of 64 x 64 with 16 bytes each for the queries' gradient",
        f"{_ATEN}/transformers/cuda/attention_backward.cu",
        "measured",
    ),
    Row(
        ("_scaled_dot_product_cudnn_attention",),
        _cudnn_attention,
        "256 bytes",
        "what cuDNN 9.19 took",
        "measured",
        order=lambda _: (2, 3, 0, 1),
    ),
    Row(
        ("_scaled_dot_product_cudnn_attention_backward",), _cudnn_attention_backward, "fp32: B H S (D + 1), and 256 bytes; two expanded gradients where heads are grouped", "what cuDNN 9.19 took", "measured"
    ),
    Row(
        ("native_layer_norm", "avg_pool2d", "_log_softmax", "_softmax"),
        _copies(0),
        "a copy of an input that is not contiguous",
        f"{_ATEN}/cuda/layer_norm_kernel.cu and others: contiguous()",
        "measured",
    ),
    Row(
        ("native_layer_norm_backward",),
        _layer_norm_backward,
        "copies of what is not contiguous; above 65,536 rows and below 2,048 columns twice rows/32 x columns in fp32",
        f"{_ATEN}/cuda/layer_norm_kernel.cu: LaunchGammaBetaBackwardCUDAKernel",
        "measured",
    ),
    Row(
        ("avg_pool2d_backward",), _copies(1, 0), "copies of what is not contiguous", f"{_ATEN}/cuda/AveragePool2d.cu", "measured"
    ),
    Row(("max_pool2d_with_indices_backward",), _copies(0), "a copy of a gradient that is not contiguous", f"{_ATEN}/cuda/DilatedMaxPool2d.cu", "measured"),
    Row(
        ("native_batch_norm", "cudnn_batch_norm"),
        _batch_norm,
        "channels last: four floats a channel and block of threads, semaphores",
        f"{_ATEN}/cuda/Normalization.cuh: batch_norm_stats_channels_last_cuda_template",
        "measured",
    ),
    Row(
        ("native_batch_norm_backward", "cudnn_batch_norm_backward"),
        _batch_norm_backward,
        "channels last: two sums a channel; two floats a channel and block of threads, semaphores",
        f"{_ATEN}/cuda/Normalization.cuh: batch_norm_backward_reduce_cuda_channels_last_template",
        "measured",
        order=lambda arguments: (1, 2, 0) if _channels_last(arguments[1]) else None,
    ),
    Row(("native_group_norm",), _group_norm, "fp32: 2 x N x C", f"{_ATEN}/cuda/group_norm_kernel.cu", "measured"),
    Row(
        ("native_group_norm_backward",),
        _group_norm_backward,
        "fp32: 3 x N x C and 2 x N x groups",
        f"{_ATEN}/cuda/group_norm_kernel.cu: ds, db and their coefficients",
        "measured",
    ),
    Row(("native_dropout",), lambda *_: (), "nothing; the mask is made first", f"{_ATEN}/cuda/Dropout.cu", "measured", order=lambda _: (1, 0)),
    Row(("_softmax_backward_data",), _softmax_backward, "the product of both arguments, in the wider of their types", f"{_ATEN}/cuda/SoftMax.cu: host_softmax_backward", "measured"),
    Row(("_safe_softmax",), _safe_softmax, "a mask of the input, one of its rows, a number", f"{_ATEN}/transformers/attention.cpp", "measured"),
    Row(
        ("embedding_dense_backward",),
        _embedding_backward,
        "copies; above 3072 indices N of V rows, M = min(N, V): five times 8 N, cub's 16 N, 24 M, 8 (N/10 + M), and as many partial sums of a row",
        f"{_ATEN}/cuda/Embedding.cu and EmbeddingBackwardKernel.cu",
        "measured",
    ),
    Row(
        ("index_put", "index_put_", "_index_put_impl_"),
        _index_backward,
        "where values are added up: five times 8 bytes an index, a copy of values that are not contiguous, cub's 16 bytes an index",
        f"{_ATEN}/cuda/Indexing.cu",
        "measured",
    ),
    Row(("embedding",), _copies(1), "a copy of indices that are not contiguous", f"{_ATEN}/Embedding.cpp", "measured"),
    Row(("sort", "topk", "multinomial"), _scan, "the input and 8 bytes an element", "cub: DeviceRadixSort and DeviceScan storage"),
    Row(("cumsum", "cumprod"), _cumulative, "a copy of an input of another type", f"{_ATEN}/cuda/ScanKernels.cpp", "measured"),
    Row(("_foreach_norm",), _norms, "4 bytes for each tensor and each 65,536 elements of the largest", f"{_ATEN}/cuda/ForeachReduceOp.cu", "measured"),
    Row(("gemm_4bit",), _four_bit_product, "the weight in the type of the input, and its scales in fp32 where they are packed", "bitsandbytes 0.50, backends/cuda/ops.py"),
    Row(("int8_vectorwise_quant",), _eight_bit_rows, "with a threshold: absolute values, and a mask", "bitsandbytes 0.50, backends/cuda/ops.py"),
    Row(("int8_scaled_mm", "int8_mixed_scaled_mm"), _eight_bit_product, "the product in int32", "bitsandbytes 0.50, backends/default/ops.py"),
    Row(("_cudnn_rnn", "_cudnn_rnn_backward"), _rnn, "16 bytes an element of the input", "no public formula: a guess"),
    Row(
        ("convolution", "cudnn_convolution"),
        _convolution,
        "see convolutions.py; in benchmark mode the output once more, unless depthwise",
        "what cuDNN 9.19 took in 640 shapes without benchmark mode",
        "measured",
    ),
    Row(
        ("convolution_backward",),
        _convolution_backward,
        "as forward, for each gradient; the bias's is a sum; depthwise the weights' gradient comes first",
        "as forward",
        "measured",
        order=lambda arguments: (1, 0) if _is_depthwise(arguments) and list(arguments[10]) == [True, True, False] else None,
    ),
)  # fmt: skip
_BY_OPERATOR = {operator: row for row in ROWS for operator in row.operators}
