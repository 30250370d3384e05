"""The shapes of results of operators for which torch has no rule without a card.

A few operators have a formula here, with its source. Any other is run on the host with zeros, where it is small enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from autoaccum.errors import JobError
from autoaccum.units import MIB, in_words

_MOST_ON_HOST = 256 * MIB  # bytes of the arguments of an operator that is run on the host for its shapes


def of(name: str) -> Callable[..., Any] | None:
    """The function that makes an operator's results, from its arguments; None where torch has a rule of its own."""
    return _RULES.get(name)


def on_host(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The results of an operator without a rule, with the shapes that the host's kernel gives them. Raises `JobError` where that cannot be done."""
    name = str(func)
    given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    nbytes = sum(value.nbytes for value in given)
    if nbytes > _MOST_ON_HOST:
        raise JobError(
            f"{name} has no rule for the shapes of its results, and {in_words(nbytes)} are too many to run it on the host for them: register one with "
            "torch.library.register_fake, or tune on a real card"
        )
    device = next((value.device for value in given if value.device.type != "cpu"), torch.device("cpu"))
    template = next(value for value in given if value.device == device)
    try:
        with _values():
            real = tree_map(lambda value: _zeros(value) if isinstance(value, torch.Tensor) else _host(value), (list(args), kwargs))
            out = func(*real[0], **real[1])
    except Exception as error:
        raise JobError(
            f"{name} cannot be simulated: it has no rule for the shapes of its results and does not run on the host ({_line(error)}): register one with "
            "torch.library.register_fake, leave it out of the loss for the estimate, or tune on a real card"
        ) from error
    same = {id(copy): value for copy, value in zip(tree_leaves(real), tree_leaves((list(args), kwargs)))}

    def faked(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in same:  # an argument that was changed in place
            return same[id(value)]
        if value.layout != torch.strided:
            raise JobError(f"{name} makes a tensor of layout {value.layout}, which cannot be simulated: use dense ones, or tune on a real card")
        return template.new_empty_strided(value.size(), value.stride(), dtype=value.dtype)

    return tree_map(faked, out)


@contextmanager
def ctc_lengths_on_device(kind: str) -> Iterator[None]:
    """Inside, `torch.ctc_loss` takes lengths on the host, too. torch reads such lengths as numbers, and takes simulated ones another way."""
    original: Any = torch.ctc_loss

    def ctc_loss(log_probs: Any, targets: Any, input_lengths: Any, target_lengths: Any, *args: Any, **settings: Any) -> Any:
        if log_probs.device.type == kind and isinstance(target_lengths, torch.Tensor):
            input_lengths, target_lengths = (
                lengths.to(log_probs.device) if isinstance(lengths, torch.Tensor) else lengths for lengths in (input_lengths, target_lengths)
            )
        return original(log_probs, targets, input_lengths, target_lengths, *args, **settings)

    functions: Any = torch
    functions.ctc_loss = ctc_loss
    try:
        yield
    finally:
        functions.ctc_loss = original


def _values() -> Any:
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    return unset_fake_temporarily()


def _zeros(value: torch.Tensor) -> torch.Tensor:
    return torch.zeros(1, dtype=value.dtype).expand(value.shape) if not value.numel() else torch.zeros(value.shape, dtype=value.dtype)


def _host(value: Any) -> Any:
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


# -- recurrent cells --


def _gru_cell(input_gates: Any, hidden_gates: Any, hidden: Any, *_: Any) -> Any:
    """RNN.cu, _thnn_fused_gru_cell_cuda: the workspace has five values for each of the hidden state."""
    return hidden.new_empty(hidden.shape), hidden.new_empty(hidden.shape[0], 5 * hidden.shape[1])


def _gru_cell_backward(grad_hidden: Any, workspace: Any, has_bias: bool) -> Any:
    """RNN.cu, _thnn_fused_gru_cell_backward_cuda."""
    batch, gates = workspace.shape[0], workspace.shape[1] // 5 * 3
    inputs, hidden = workspace.new_empty(batch, gates), workspace.new_empty(batch, gates)
    biases = (workspace.new_empty(gates), workspace.new_empty(gates)) if has_bias else (None, None)
    return inputs, hidden, grad_hidden.new_empty(grad_hidden.shape), *biases


def _lstm_cell(input_gates: Any, hidden_gates: Any, cell: Any, *_: Any) -> Any:
    """RNN.cu, _thnn_fused_lstm_cell_cuda. torch's own rule cannot do without biases."""
    return cell.new_empty(cell.shape), cell.new_empty(cell.shape), input_gates.new_empty(input_gates.shape)


# -- CTC --


def _ctc_loss(log_probs: Any, targets: Any, input_lengths: Any, target_lengths: Any, *_: Any, **__: Any) -> Any:
    """LossCTC.cu, ctc_loss_gpu_template: alpha has 2 x the longest target + 1 values for each sample and time step."""
    batch = log_probs.shape[1] if log_probs.dim() == 3 else 1
    return log_probs.new_empty(batch), log_probs.new_empty(batch, log_probs.shape[0], 2 * _longest_target(targets, target_lengths, batch) + 1)


def _longest_target(targets: Any, lengths: Any, batch: int) -> int:
    """The longest target. Where lengths are not known: the width of the targets, or of targets that lie one after the other, their mean."""
    if isinstance(lengths, (list, tuple)) and lengths:
        return max(int(length) for length in lengths)
    return int(targets.shape[1]) if targets.dim() == 2 else -(-targets.numel() // max(batch, 1))


def _ctc_loss_backward(_: Any, log_probs: Any, *__: Any, **___: Any) -> Any:
    return log_probs.new_empty(log_probs.shape)


def _uses_cudnn(log_probs: Any, targets: Any, input_lengths: Any, target_lengths: Any, blank: int) -> bool:
    """LossCTC.cpp, _use_cudnn_ctc_loss: only for targets in int32 that lie one after the other, which hardly anybody gives."""
    if not torch.backends.cudnn.enabled or blank != 0 or targets.dim() != 1 or targets.dtype is not torch.int32 or log_probs.dtype is not torch.float32:
        return False
    known = isinstance(target_lengths, (list, tuple))
    return not known or all(length <= 256 for length in target_lengths)


def _cudnn_ctc_loss(log_probs: Any, *_: Any, **__: Any) -> Any:
    return log_probs.new_empty(log_probs.shape[1]), log_probs.new_empty(log_probs.shape)


# -- others --


def _like(value: Any, *_: Any, **__: Any) -> Any:
    return value.new_empty(value.shape)


def _reduced(values: Any, reduction: int) -> Any:
    """A loss of each row, or of all."""
    return values.new_empty(values.shape[:-1] if reduction == 0 else ())


def _least_squares(matrix: Any, right: Any, *_: Any, **__: Any) -> Any:
    """BatchLinearAlgebra.cpp, linalg_lstsq: on CUDA it is always the driver "gels", which takes the rank to be full."""
    rows, columns = matrix.shape[-2:]
    is_vector = right.dim() == 1 or (right.dim() == matrix.dim() - 1 and right.shape == matrix.shape[:-1])
    others = () if is_vector else right.shape[-1:]
    solution = right.new_empty(*matrix.shape[:-2], columns, *others)
    residuals = right.new_empty(*matrix.shape[:-2], *others) if rows > columns and not is_vector else right.new_empty(0)
    return solution, residuals, matrix.new_empty(0, dtype=torch.int64), matrix.new_empty(0)


def _grouped_product(first: Any, second: Any, offsets: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
    """GroupedMMUtils.h, create_grouped_gemm_output_tensor: rows of a multiple of 16 bytes. torch's own rule knows bfloat16 only."""
    rows, columns = first.shape[-2], second.shape[-1]
    dtype = out_dtype or first.dtype
    aligned = 16 // dtype.itemsize
    width = -(-columns // aligned) * aligned
    if first.dim() == second.dim():  # groups of the summed dimension, or a plain batch
        groups = offsets.shape[0] if first.dim() == 2 else first.shape[0]
        return first.new_empty_strided((groups, rows, columns), (rows * width, width, 1), dtype=dtype)
    return first.new_empty_strided((rows, columns), (width, 1), dtype=dtype)


def _rows_in_eight_bits(values: Any, threshold: float = 0.0) -> Any:
    """bitsandbytes, _ops.py. Columns with outliers depend on values: few (Dettmers et al. 2022, arXiv 2208.07339, section 3.2), here none."""
    rows = values.numel() // values.shape[-1]
    outliers = values.new_empty(0, dtype=torch.int64) if threshold else None
    return values.new_empty(values.shape, dtype=torch.int8), values.new_empty(rows, dtype=torch.float32), outliers


def _mixed_product(values: Any, packed: Any, weight: Any, *_: Any) -> Any:
    """bitsandbytes, backends/default/ops.py: the product, and the columns with outliers."""
    return values.new_empty(*packed.shape[:-1], weight.shape[0]), values.new_empty(0)


_RULES: dict[str, Callable[..., Any]] = {
    "int8_vectorwise_quant": _rows_in_eight_bits,
    "int8_mixed_scaled_mm": _mixed_product,
    "_thnn_fused_gru_cell": _gru_cell,
    "_thnn_fused_gru_cell_backward": _gru_cell_backward,
    "_thnn_fused_lstm_cell": _lstm_cell,
    "_ctc_loss": _ctc_loss,
    "_ctc_loss_backward": _ctc_loss_backward,
    "_use_cudnn_ctc_loss": _uses_cudnn,
    "_use_miopen_ctc_loss": lambda *_, **__: False,
    "_cudnn_ctc_loss": _cudnn_ctc_loss,
    "linalg_lstsq": _least_squares,
    "_standard_gamma_grad": _like,
    "_dirichlet_grad": _like,
    "multi_margin_loss": lambda values, target, p=1, margin=1, weight=None, reduction=1: _reduced(values, reduction),
    "multi_margin_loss_backward": lambda gradient, values, *_: values.new_empty(values.shape),
    "multilabel_margin_loss_forward": lambda values, target, reduction: (_reduced(values, reduction), values.new_empty(values.shape)),
    "multilabel_margin_loss_backward": lambda gradient, values, *_: values.new_empty(values.shape),
    "_grouped_mm": _grouped_product,
}
