"""Accelerate: a plan from prepared objects, and micro-batches that are exact under `accelerator.accumulate`.

model, optimizer = accelerator.prepare(model, optimizer)
plan = tune(accelerator, model, optimizer, loss, batch, target_batch=512)
for micro in micro_batches(accelerator, plan, loader):
    with accelerator.accumulate(model):
        accelerator.backward(loss(model, micro.batch) * micro.weight)
        optimizer.step()
        optimizer.zero_grad()
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from autoaccum.data import Window
from autoaccum.errors import PlanError, UsageError
from autoaccum.integrations import needed, not_remembered
from autoaccum.plan import MicroBatch, Plan, framework_arguments
from autoaccum.tuner import tune as tune_in_place
from autoaccum.window import Job, RngState


def tune(accelerator: Any, model: Any, optimizer: Any, loss: Callable[[Any, Any], Any], batch: Any, *, target_batch: int, **given: Any) -> Plan:
    """The plan for objects that `accelerator.prepare` has returned, which come back as they were; it is set in the accelerator, too.

    Rehearsed with the accelerator's precision and its scaler. given: keywords of `autoaccum.tune` and of `Job`. Under
    `accelerate launch` every rank calls it, and micro-batches are equal. Raises `UsageError` for models that are sharded, and what
    `autoaccum.tune` raises.
    """
    needed("accelerate", "accelerate")
    not_remembered(given)
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise UsageError(f"with {kind} the model is sharded, and one rank cannot rehearse it alone: tune the plain model with autoaccum.tune before prepare()")
    if accelerator.num_processes > 1:
        given = {**given, "equal": True}
    plain: list[Any] = [getattr(each, "optimizer", each) for each in (optimizer if isinstance(optimizer, (list, tuple)) else [optimizer])]
    drawn = RngState(accelerator.device)
    drawn.note()
    try:
        job_only = {name: given.pop(name) for name in ("data", "scheduler", "autocast", "max_grad_norm", "count", "split", "keep") if name in given}
        # A prepared model autocasts in its own forward, so the job need not.
        job = Job(model, plain if len(plain) > 1 else plain[0], loss, batch, scaler=accelerator.scaler, **job_only)
        plan = replace(tune_in_place(job, target_batch=target_batch, **given), hints=())
    finally:
        drawn.put_back()
    apply(plan, accelerator)
    return plan


def apply(plan: Plan, accelerator: Any) -> None:
    """Sets the window's number of micro-batches, by which `accelerator.backward` divides. Raises `PlanError` for a plan of other ranks."""
    if accelerator.num_processes != plan.world_size:
        raise PlanError(
            f"the plan is for {plan.world_size} rank{'s' if plan.world_size != 1 else ''}, and the accelerator has {accelerator.num_processes}: tune again"
        )
    if plan.world_size > 1:
        framework_arguments.accelerate(plan)
    accelerator.gradient_accumulation_steps = plan.accumulation_steps


def micro_batches(accelerator: Any, plan: Plan, loader: Iterable[Any], *, count: Callable[[Any], float] | None = None) -> Iterator[MicroBatch]:
    """Every micro-batch of an epoch, window by window, with what its mean loss is multiplied with before `accelerator.backward`.

    loader: as `Plan.windows` takes it, not prepared: over ranks with `plan.batch_sampler`. count: as in `Plan.split`. Micro-batches are moved to the device.
    Raises `PlanError` for a prepared loader, whose end Accelerate would take for the window's.
    """
    if type(loader).__name__ in ("DataLoaderShard", "DataLoaderDispatcher"):
        raise PlanError(
            "the loader was prepared by Accelerate, which reads ahead and takes its end for the window's: give the DataLoader as it was before prepare()"
        )
    apply(plan, accelerator)
    inside = False
    try:
        for window in plan.windows(loader):
            accelerator.step, inside = 0, True
            # By this number Accelerate divides every loss, and after it gradients cross.
            accelerator.gradient_accumulation_steps = steps = _steps(plan, window)
            for micro in plan.split(window, count):
                yield replace(micro, weight=micro.weight * steps)
            inside = False
    finally:
        if inside:  # left before its end: what it has gathered is no part of the next window
            for optimizer in accelerator._optimizers:
                getattr(optimizer, "optimizer", optimizer).zero_grad(set_to_none=True)
        accelerator.gradient_accumulation_steps = plan.accumulation_steps


def _steps(plan: Plan, window: Window) -> int:
    """A smaller last window has fewer micro-batches, and one of parts that cannot be joined more: they are cut on the host to see."""
    if window.samples == plan.share and len(window.parts) == 1:
        return plan.accumulation_steps
    return sum(1 for _ in window.cut(plan.sizes_of(window), most=plan.micro_batch)) if window.samples else 1
