"""The counts of a Trainer's batches: what the loss of a batch is a mean over, and the weights that follow from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from autoaccum.data import IGNORED, batches
from autoaccum.errors import PlanError
from autoaccum.window import predicts_next


def shifts_labels(trainer: Any) -> bool:
    """True if the model leaves out each sequence's first label."""
    return predicts_next(trainer.model) or bool(getattr(trainer, "_loss_shifts_labels", False))


def weights(trainer: Any, micro_batches: Sequence[Any]) -> list[tuple[int | float, float]]:
    """The count of each micro-batch, and the weight of its mean in the window over all ranks."""
    counts = [counted(trainer, batch) for batch in micro_batches]
    total, averaged = float(sum(counts)), 1
    if trainer.args.world_size > 1:
        # DistributedDataParallel averages the gradients over the ranks.
        averaged = trainer.args.world_size
        total = float(trainer.accelerator.gather(torch.tensor([total], dtype=torch.float64, device=trainer.args.device)).sum())
    return [(count, averaged * count / total if total else 0.0) for count in counts]


def mean(trainer: Any, model: torch.nn.Module, inputs: Any, count: float, compute_loss: Callable[..., Any]) -> torch.Tensor:
    """The mean loss of one micro-batch, over what is counted in it.

    Transformers' own `compute_loss` gets no `num_items_in_batch`, so the model takes its own mean. A function of the user's gets this
    micro-batch's count: if it divides a sum by it, and if it takes a mean of its own, the result is the mean over this micro-batch.
    """
    by_user = trainer.compute_loss_func is not None or not is_of_transformers(compute_loss)
    if not by_user:
        return compute_loss(model, inputs)  # type: ignore[no-any-return]
    loss = compute_loss(model, inputs, num_items_in_batch=torch.tensor(count, device=trainer.args.device))
    args = trainer.args
    if args.average_tokens_across_devices and args.world_size > 1 and (trainer.model_accepts_loss_kwargs or trainer.compute_loss_func):
        loss = loss / args.world_size  # the Trainer has multiplied by it, for a count over all ranks
    return loss  # type: ignore[no-any-return]


def is_of_transformers(method: Any) -> bool:
    """True if a method of a Trainer is Transformers' own, and not the user's."""
    return str(getattr(getattr(method, "__func__", method), "__module__", "")).partition(".")[0] == "transformers"


def has_counted_labels(batch: Any) -> bool:
    """True if labels are whole numbers, over which models take their mean, without those that are -100."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    return isinstance(labels, torch.Tensor) and labels.dim() >= 1 and not labels.is_floating_point() and labels.dtype is not torch.bool


def counted(trainer: Any, batch: Any) -> int | float:
    """What the mean loss of a batch is a mean over: `count` of the user's, labels other than -100, or samples.

    A loss function of the user's is given, and judged by, what the Trainer counts for it.
    Raises `PlanError` if nothing of it can be counted.
    """
    count = getattr(trainer, "_autoaccum_count", None)
    if count is not None:
        return float(count(batch))
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    by_user = trainer.compute_loss_func is not None
    if isinstance(labels, torch.Tensor) and labels.dim() and (by_user or has_counted_labels(batch)):
        shifts = bool(getattr(trainer, "_loss_shifts_labels", False)) if by_user else shifts_labels(trainer)
        if isinstance(shifted := batch.get("shift_labels"), torch.Tensor):
            labels = shifted
        elif shifts and labels.dim() >= 2:
            labels = labels[..., 1:]
        return int((labels != IGNORED).sum())
    if isinstance(labels, torch.Tensor) and labels.dim():
        return len(labels)
    try:
        return batches.count(batch)
    except PlanError as error:
        raise PlanError(
            f"what a batch of this Trainer counts is not known ({str(error).partition(';')[0]}): give count=, a function of a batch, to huggingface.tune"
        ) from None
