"""The weights of micro-batches: the share of the window's gradient that each micro-batch contributes.

For a window of T samples, micro-batch j contributes `1/T * sum of its sample losses`. A loss that is the mean over its samples
is therefore weighted with `samples / T`, and a loss sum with `1 / count of the window`. The number of steps does not appear,
so an uneven or a smaller window needs no special case.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from autoaccum.errors import JobError


def contribution(
    returned: Any, *, samples: int, of_samples: float, count: float | None = None, of_count: float | None = None
) -> tuple[torch.Tensor, torch.Tensor | float | None]:
    """Turns the loss of one micro-batch into (the term that backward runs on, a count).

    returned: the return value of the loss function: a scalar mean over the samples, or `(loss_sum, count)`.
    samples: samples of the micro-batch. 0 for a batch that stands in for a rank's missing micro-batch: it contributes nothing.
    of_samples: samples of the window. count, of_count: the counts of this micro-batch and of the window, if `count(batch)` gave
        them before the first forward; a scalar is then the mean over the counted items.
    On several ranks, `of_samples` and `of_count` are those of the window on all ranks, divided by the number of ranks that the
    engine averages over: A/D is 1 over D/A.
    The returned count is None if the term has its full weight. Otherwise the term is the sum divided by `of_samples`, and
    `late_factor` rescales it later, because the window's count is unknown before its last forward. A raw sum would overflow in fp16.
    Raises `JobError` for any other return value, for a loss that is not a scalar and for a loss without a graph.
    """
    if isinstance(returned, tuple) and len(returned) == 2:
        loss_sum, counted = returned
        _check(loss_sum)
        if isinstance(counted, torch.Tensor) and counted.numel() == 1:
            counted = counted.reshape(())
        elif getattr(counted, "shape", ()) != () or not hasattr(counted, "__float__") or counted < 0:
            description = f"a tensor of shape {tuple(counted.shape)}" if isinstance(counted, torch.Tensor) else repr(counted)
            raise JobError(
                f"loss(model, batch) returned a pair whose second part is {description}: return (loss_sum, count), the count a number or a scalar tensor"
            )
        if samples == 0:
            loss_sum, counted = loss_sum * 0, counted * 0
        return loss_sum / (of_count or of_samples), None if of_count else counted
    _check(returned)
    if of_count is not None and count is not None:
        # If nothing in the window counts, no micro-batch contributes.
        return returned * (count / of_count if of_count else 0.0), None
    return returned * (samples / of_samples), None


def late_factor(counts: Sequence[torch.Tensor | float], of_samples: float) -> torch.Tensor:
    """The factor for gradients of sums that were divided by samples, once every count is known: 0-d, in double precision."""
    total = torch.as_tensor(sum(counts))
    if total.device.type != "mps":  # MPS has no double precision
        total = total.double()
    # If nothing in the window counts, the gradient is 0; a division by 0 would make it nan.
    return torch.where(total == 0, torch.zeros_like(total), of_samples / total)


def _check(loss: Any) -> None:
    if isinstance(loss, torch.Tensor) and loss.requires_grad and loss.dim() == 0:
        return
    if not isinstance(loss, torch.Tensor):
        raise JobError(f"loss(model, batch) returned a {type(loss).__name__}: return a scalar tensor, the mean over the batch's samples, or (loss_sum, count)")
    if loss.dim() != 0:
        raise JobError(
            f"loss(model, batch) returned a tensor of shape {tuple(loss.shape)}: return a scalar, the mean over the batch's samples (reduction='mean')"
        )
    if not loss.requires_grad:
        raise JobError("loss(model, batch) returned a loss that needs no gradient: compute it from the model's output, without no_grad(), detach() or .item()")
