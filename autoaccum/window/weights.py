"""The share of the gradient that each micro-batch owes.

For a window of T samples, micro-batch j contributes `1/T * sum of its sample losses`. A loss that is the
mean over its samples is therefore weighted with `samples / T`, a loss sum with `1 / count of the window`.
Step counts do not appear: an uneven or a smaller window is right without special care.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from autoaccum.errors import JobError


def contribution(
    returned: Any, *, samples: int, of_samples: float, count: float | None = None, of_count: float | None = None
) -> tuple[torch.Tensor, torch.Tensor | float | None]:
    """What the loss function returned for `samples` of the window's `of_samples`: the term that backward runs on, and a count.

    returned: a scalar mean over the samples, or `(loss_sum, count)`. Over ranks, both `of_samples` and `of_count` are those of the
    window on all ranks, divided by the number of ranks that the engine averages over: A/D is 1 over D/A.
    No samples: one that stands in for a rank's missing micro-batch, and owes nothing.
    count, of_count: of this micro-batch and of the whole window, where `count(batch)` told them beforehand; a
    scalar is then taken for the mean over what was counted.
    The count that comes back is None where the term is weighted in full. Else the term is a sum divided by `samples`
    of the window for now, to be rescaled by `late_factor`, because the window's count is unknown before its last
    forward; a raw sum would overflow in fp16.
    Raises `JobError` for anything else, for a loss that is not a scalar and for one without a graph.
    """
    if isinstance(returned, tuple) and len(returned) == 2:
        loss_sum, counted = returned
        _check(loss_sum)
        if isinstance(counted, torch.Tensor) and counted.numel() == 1:
            counted = counted.reshape(())
        elif getattr(counted, "shape", ()) != () or not hasattr(counted, "__float__") or counted < 0:
            what = f"a tensor of shape {tuple(counted.shape)}" if isinstance(counted, torch.Tensor) else repr(counted)
            raise JobError(f"loss(model, batch) returned a pair whose second part is {what}: return (loss_sum, count), the count a number or a scalar tensor")
        if samples == 0:
            loss_sum, counted = loss_sum * 0, counted * 0
        return loss_sum / (of_count or of_samples), None if of_count else counted
    _check(returned)
    if of_count is not None and count is not None:
        # In a window in which nothing counts no micro-batch owes anything.
        return returned * (count / of_count if of_count else 0.0), None
    return returned * (samples / of_samples), None


def late_factor(counts: Sequence[torch.Tensor | float], of_samples: float) -> torch.Tensor:
    """What gradients of sums divided by samples are multiplied with, once every count is known: 0-d, in double precision."""
    total = torch.as_tensor(sum(counts))
    if total.device.type != "mps":  # which has no double precision
        total = total.double()
    # A window in which nothing counts owes nothing; dividing by nothing would make it nan.
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
