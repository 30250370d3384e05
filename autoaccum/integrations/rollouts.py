"""Trainers of TRL that generate their own samples (GRPO, RLOO): they cut what they generated into micro-batches by themselves.

So autoaccum measures their loss on samples that they generated, and sets their sizes. Their methods stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from autoaccum.errors import PlanError, UsageError
from autoaccum.integrations import trainer_loader
from autoaccum.plan import Plan

# Losses that are a mean over the tokens of all samples; the others are means over samples, of each one's mean over its tokens.
_OVER_TOKENS = ("dapo", "bnpo", "cispo", "vespo")


def generates(trainer: Any) -> bool:
    """True for a Trainer that generates a batch of completions and cuts it into micro-batches."""
    return hasattr(trainer.args, "steps_per_generation") and hasattr(trainer, "_generate_and_score_completions")


def check(trainer: Any, steps: int | None = None) -> None:
    """Raises `UsageError` for a loss that cannot be cut exactly. steps: the accumulation steps; None if they are not known yet."""
    if steps == 1:
        return
    if getattr(trainer, "loss_type", "") == "bnpo":
        raise UsageError("loss_type='bnpo' is a mean over the tokens of each micro-batch: take 'dapo', which is the same mean over the whole window")
    if getattr(trainer, "_entropy_bonus_enabled", False):
        raise UsageError("the entropy bonus is a mean over the tokens of each micro-batch, so it depends on their sizes: leave entropy_coef at 0")
    if getattr(trainer, "aux_loss_enabled", False):
        raise UsageError("the router's balance loss looks at a whole micro-batch, so it depends on their sizes: set router_aux_loss_coef=0.0")


def made(trainer: Any, target: int) -> Any:
    """Samples that the Trainer generated and scored, their completions padded to the longest that it allows.

    target: the target batch; at most 16 samples are generated, and repeated in larger trials.
    """
    groups = max(1, min(target, 16) // trainer.num_generations)
    loader = trainer.get_train_dataloader()
    trainer_loader.forget(trainer, loader)
    data = loader.dataset
    rows = trainer._generate_and_score_completions([data[index // trainer.num_generations % len(data)] for index in range(groups * trainer.num_generations)])
    rest = trainer.max_completion_length - rows["completion_ids"].size(1)

    def longest(name: str, value: Any) -> Any:
        if not name.startswith("completion") or not isinstance(value, torch.Tensor) or value.dim() != 2:
            return value
        return torch.nn.functional.pad(value, (0, rest), value=1 if name.endswith("mask") else 0)

    return {name: longest(name, value) for name, value in rows.items() if name != "num_items_in_batch"}


def loss_of(trainer: Any) -> Callable[[Any, Any], Any]:
    """The Trainer's loss of generated samples: a sum and a count for a loss over tokens, else a mean over samples."""

    def loss(model: torch.nn.Module, batch: Any) -> Any:
        tokens = batch["completion_mask"].sum()
        steps, trainer.args.steps_per_generation = trainer.args.steps_per_generation, 1
        try:
            with trainer.compute_loss_context_manager():
                value = trainer.compute_loss(model, {**batch, "num_items_in_batch": tokens})
        finally:
            trainer.args.steps_per_generation = steps
        return (value * tokens, tokens) if getattr(trainer, "loss_type", "") in _OVER_TOKENS else value

    return loss


def apply(plan: Plan, trainer: Any) -> None:
    """Sets the Trainer's sizes. As many windows are generated at a time as before.

    Raises `PlanError` for unequal micro-batches, and for a target that the groups of `num_generations` do not divide; `UsageError` as `check`.
    """
    args, kind = trainer.args, type(trainer).__name__
    if len(set(plan.micro_batches)) > 1:
        raise PlanError(f"{kind} cuts what it generates into equal micro-batches: huggingface.tune(trainer, ...) makes such a plan, or tune(..., equal=True)")
    check(trainer, plan.accumulation_steps)
    window = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
    windows = args.generation_batch_size / window
    generated, size = round(windows * plan.target_batch), plan.micro_batch * plan.world_size
    if generated != windows * plan.target_batch or generated % size or generated % trainer.num_generations:
        raise PlanError(
            f"{kind} generates {windows:g} windows of {plan.target_batch} samples at a time, which are not whole groups of num_generations="
            f"{trainer.num_generations} in micro-batches of {size}: give a target_batch that {trainer.num_generations} divides"
        )
    args.per_device_train_batch_size, args.gradient_accumulation_steps = plan.micro_batch, plan.accumulation_steps
    args.generation_batch_size, args.steps_per_generation = generated, generated // size
    args.auto_find_batch_size = False
    if plan.eval_batch is not None:
        raise PlanError(f"{kind} evaluates in groups of num_generations_eval: tune without evaluate=True")
    trainer._train_batch_size = args.train_batch_size
