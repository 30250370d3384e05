"""A plan as the arguments of training frameworks. These frameworks run equal micro-batches only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from autoaccum.errors import PlanError
from autoaccum.plan.divisors import easier_targets, equal_split, why_unequal
from autoaccum.plan.notation import window_notation
from autoaccum.plan.record import PlanRecord


def huggingface(plan: PlanRecord) -> dict[str, Any]:
    """Arguments of `transformers.TrainingArguments`."""
    micro_batch, steps = _equal(plan, "Transformers' Trainer")
    evaluation = {} if plan.eval_batch is None else {"per_device_eval_batch_size": plan.eval_batch}
    return {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": steps, **evaluation}


def accelerate(plan: PlanRecord) -> dict[str, Any]:
    """Arguments of `accelerate.Accelerator`; the DataLoader's batch size is the plan's micro-batch."""
    return {"gradient_accumulation_steps": _equal(plan, "Accelerate")[1]}


def lightning(plan: PlanRecord) -> dict[str, Any]:
    """Arguments of `lightning.Trainer`; the DataLoader's batch size is the plan's micro-batch."""
    return {"accumulate_grad_batches": _equal(plan, "Lightning's Trainer")[1]}


def deepspeed(plan: PlanRecord) -> dict[str, Any]:
    """The three entries of a DeepSpeed configuration that must agree: https://www.deepspeed.ai/docs/config-json/#batch-size-related-parameters."""
    micro_batch, steps = _equal(plan, "DeepSpeed")
    return {"train_batch_size": plan.target_batch, "train_micro_batch_size_per_gpu": micro_batch, "gradient_accumulation_steps": steps}


FORMATS: dict[str, Callable[[PlanRecord], dict[str, Any]]] = {
    "huggingface": huggingface,
    "accelerate": accelerate,
    "lightning": lightning,
    "deepspeed": deepspeed,
}
# Frameworks whose constructor does not take the micro-batch: they use the DataLoader's batch size.
LOADER_SIZED = ("accelerate", "lightning")


def _equal(plan: PlanRecord, framework: str) -> tuple[int, int]:
    """`(micro_batch, steps)` of every rank. Raises `PlanError` if micro-batches are not equal, or if ranks have different ones."""
    if plan.target_tokens is not None:
        raise PlanError(f"{framework} counts samples, and this plan counts tokens: tune with target_batch, or train with autoaccum.Accumulator")
    sizes = set(plan.micro_batches)
    if plan.fleet is not None:
        sizes = {size for rank in range(plan.world_size) for size in plan.fleet.sizes(rank, plan.target_batch)}
        if len(sizes) > 1 or len(set(plan.shares)) > 1:
            raise PlanError(f"{framework} runs the same micro-batches on every rank, and this plan has shares of its own for each: tune(..., equal=True)")
    if len(sizes) > 1:
        split = equal_split(plan.target_batch, plan.micro_batch)
        gives = f"tune with equal=True (--equal), which gives {split[0]} x {split[1]}" if split is not None and split[0] > 1 else why_unequal(plan.target_batch)
        near = easier_targets(plan.target_batch, plan.micro_batch)
        raise PlanError(
            f"{framework} runs equal micro-batches, and {plan.target_batch} = {window_notation(plan.micro_batches)} are not: {gives}"
            + (f"; near targets that divide: {near}" if near else "")
        )
    return plan.micro_batch, plan.accumulation_steps
