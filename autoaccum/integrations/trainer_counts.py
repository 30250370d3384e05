"""The counts of a Trainer's batches: what the loss of a batch is a mean over, and the weights that follow from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from autoaccum.data import IGNORED, batches
from autoaccum.errors import PlanError
from autoaccum.window import predicts_next


@dataclass(frozen=True)
class Weight:
    """One micro-batch's part of its window.

    count: what the mean loss of this micro-batch is a mean over. share: the part of the window's count, times the ranks that are averaged.
    token_share: the same for tokens, for a preference loss that adds a mean over tokens to means over pairs; None for any other.
    """

    count: int | float
    share: float
    token_share: float | None = None


def weights(trainer: Any, micro_batches: Sequence[Any]) -> list[Weight]:
    """The weights of the micro-batches in the window over all ranks."""
    counts = [counted(trainer, batch) for batch in micro_batches]
    chosen = [chosen_tokens(batch) for batch in micro_batches] if adds_tokens_to_pairs(trainer) else []
    totals, averaged = [float(sum(counts)), float(sum(chosen))], 1
    if trainer.args.world_size > 1:
        # DistributedDataParallel averages the gradients over the ranks.
        averaged = trainer.args.world_size
        summed = trainer.accelerator.gather(torch.tensor([totals], dtype=torch.float64, device=trainer.args.device)).sum(0)
        totals = [float(total) for total in summed]
    shares = [averaged * count / totals[0] if totals[0] else 0.0 for count in counts]
    if not chosen:
        return [Weight(count, share) for count, share in zip(counts, shares)]
    return [Weight(count, share, averaged * tokens / totals[1] if totals[1] else 0.0) for count, share, tokens in zip(counts, shares, chosen)]


def weighted(trainer: Any, model: torch.nn.Module, inputs: Any, weight: Weight, compute_loss: Callable[..., Any]) -> torch.Tensor:
    """The loss of one micro-batch times its weight in the window."""
    if weight.token_share is None:
        loss = mean(trainer, model, inputs, weight.count, compute_loss)
        return loss * weight.share if weight.count else loss.nan_to_num() * 0.0
    given = trainer.loss_weights
    trainer.loss_weights = [each * (weight.token_share if kind == "sft" else weight.share) for kind, each in zip(trainer.loss_types, given)]
    try:
        return mean(trainer, model, inputs, weight.count, compute_loss)
    finally:
        trainer.loss_weights = given


def mean(trainer: Any, model: torch.nn.Module, inputs: Any, count: float, compute_loss: Callable[..., Any]) -> torch.Tensor:
    """The mean loss of one micro-batch, over what is counted in it.

    Transformers' own `compute_loss` gets no `num_items_in_batch`, so the model takes its own mean. A function of the user's gets this
    micro-batch's count: if it divides a sum by it, and if it takes a mean of its own, the result is the mean over this micro-batch.
    """
    if trainer.compute_loss_func is None and is_of_transformers(compute_loss):
        return compute_loss(model, inputs)  # type: ignore[no-any-return]
    args = trainer.args
    # With it, Transformers and TRL multiply a loss that they divided by the items of all ranks. This one is divided by its own.
    averages, args.average_tokens_across_devices = args.average_tokens_across_devices, False
    try:
        return compute_loss(model, inputs, num_items_in_batch=torch.tensor(count, device=args.device))  # type: ignore[no-any-return]
    finally:
        args.average_tokens_across_devices = averages


def is_of_transformers(method: Any) -> bool:
    """True if a method of a Trainer is Transformers' own, and not the user's."""
    return str(getattr(getattr(method, "__func__", method), "__module__", "")).partition(".")[0] == "transformers"


def shifts_labels(trainer: Any) -> bool:
    """True if the model leaves out each sequence's first label."""
    return predicts_next(trainer.model) or bool(getattr(trainer, "_loss_shifts_labels", False))


def has_counted_labels(batch: Any) -> bool:
    """True if labels are whole numbers, over which models take their mean, without those that are -100."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    return isinstance(labels, torch.Tensor) and labels.dim() >= 1 and not labels.is_floating_point() and labels.dtype is not torch.bool


def is_over_samples(trainer: Any, batch: Any) -> bool:
    """True if the loss of a batch is a mean over its samples."""
    if getattr(trainer, "_autoaccum_count", None) is not None:
        return False
    return list(trainer.loss_types) != ["sft"] if holds_pairs(trainer, batch) else not has_counted_labels(batch)


def holds_pairs(trainer: Any, batch: Any) -> bool:
    """True for a batch of TRL's DPOTrainer: its rows are the chosen completions, and then the rejected ones."""
    return hasattr(trainer, "loss_types") and isinstance(batch, Mapping) and "completion_mask" in batch and "input_ids" in batch


def chosen_tokens(batch: Any) -> int:
    """The tokens of the chosen completions, over which DPO's loss "sft" takes its mean; like the model, it leaves out the first position."""
    return int(batch["completion_mask"].chunk(2)[0][:, 1:].sum())


def adds_tokens_to_pairs(trainer: Any) -> bool:
    """True for a DPOTrainer with the loss "sft", a mean over tokens, beside others, which are means over pairs."""
    kinds = list(getattr(trainer, "loss_types", ()) or ())
    return len(kinds) > 1 and "sft" in kinds and getattr(trainer, "_autoaccum_count", None) is None


def counted(trainer: Any, batch: Any) -> int | float:
    """What the mean loss of a batch is a mean over: `count` of the user's, labels other than -100, pairs, or samples.

    A loss function of the user's is given, and judged by, what the Trainer counts for it.
    Raises `PlanError` if nothing of it can be counted.
    """
    count = getattr(trainer, "_autoaccum_count", None)
    if count is not None:
        return float(count(batch))
    if holds_pairs(trainer, batch):
        return chosen_tokens(batch) if list(trainer.loss_types) == ["sft"] else len(batch["input_ids"]) // 2
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
