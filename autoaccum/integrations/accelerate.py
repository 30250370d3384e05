"""Accelerate: a plan for prepared objects, and micro-batches with exact weights for `accelerator.accumulate`.

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

import torch

from autoaccum import devices
from autoaccum.data import Window, Windows, batches
from autoaccum.errors import PlanError, UsageError
from autoaccum.integrations import needed, not_remembered
from autoaccum.loop import FirstWindows, Learner, Progress, fed
from autoaccum.plan import MicroBatch, Plan, framework_arguments
from autoaccum.probe import Request
from autoaccum.tuner import tune as tune_in_place
from autoaccum.window import Job, RngState


def tune(accelerator: Any, model: Any, optimizer: Any, loss: Callable[[Any, Any], Any], batch: Any, *, target_batch: int, **request: Any) -> Plan:
    """The plan for objects that `accelerator.prepare` returned. It also applies the plan to the accelerator.

    The trials use the accelerator's precision and scaler, and restore the objects afterwards. Under `accelerate launch` every rank
    calls this function, and micro-batches are equal.
    request: keywords of `autoaccum.tune` and of `Job`.
    Raises `UsageError` for sharded models, and the errors of `autoaccum.tune`.
    """
    needed("accelerate", "accelerate")
    not_remembered(request)
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise UsageError(f"with {kind} the model is sharded, and one rank cannot rehearse it alone: tune the plain model with autoaccum.tune before prepare()")
    if accelerator.num_processes > 1:
        request = {**request, "equal": True}
    plain: list[Any] = [getattr(wrapped, "optimizer", wrapped) for wrapped in (optimizer if isinstance(optimizer, (list, tuple)) else [optimizer])]
    rng = RngState(accelerator.device)
    rng.note()
    try:
        job_only = {
            name: request.pop(name) for name in ("data", "scheduler", "autocast", "max_grad_norm", "count", "split", "samples", "keep") if name in request
        }
        # A prepared model has autocast in its forward, so the job does not need it.
        job = Job(model, plain if len(plain) > 1 else plain[0], _measured(loss), batch, scaler=accelerator.scaler, **job_only)
        plan = replace(tune_in_place(job, target_batch=target_batch, **request), hints=())
    finally:
        rng.put_back()
    accelerator._autoaccum_job = job  # whose loss `micro_batches` looks at once more
    apply(plan, accelerator)
    return plan


def _measured(loss: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """The loss, with the cure for one that is no mean over samples: the user's loop multiplies a mean by a weight."""

    def measured(model: Any, batch: Any) -> Any:
        returned = loss(model, batch)
        if isinstance(returned, (tuple, list, dict)):
            raise UsageError(
                f"the loss returned a {type(returned).__name__}, and accelerator.backward takes one number: return the mean, and give count= for a mean over "
                "something else than samples"
            )
        return returned

    cure = "give tune and micro_batches count=, a function of a batch that says what its loss is a mean over"
    measured.cure = cure  # type: ignore[attr-defined]
    return measured


def apply(plan: Plan, accelerator: Any) -> None:
    """Sets the accelerator's gradient accumulation steps, by which `accelerator.backward` divides.

    Raises `PlanError` if the plan is for another world size.
    """
    if accelerator.num_processes != plan.world_size:
        raise PlanError(
            f"the plan is for {plan.world_size} rank{'s' if plan.world_size != 1 else ''}, and the accelerator has {accelerator.num_processes}: tune again"
        )
    if plan.world_size > 1:
        framework_arguments.accelerate(plan)
    accelerator.gradient_accumulation_steps = plan.accumulation_steps


class Position:
    """The place in the data behind the last finished window, which goes into Accelerate's checkpoints.

    position = Position()
    accelerator.register_for_checkpointing(position)
    accelerator.load_state(folder)  # where there is one
    for epoch in range(position.epoch, epochs):
        for micro in micro_batches(accelerator, plan, loader, position=position):
            ...
            if accelerator.sync_gradients:
                accelerator.save_state(folder)  # after optimizer.step() and zero_grad()

    The state knows neither ranks nor micro-batches: the run goes on with other ones, in the same windows of samples.
    """

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._state: dict[str, Any] = {}

    @property
    def epoch(self) -> int:
        """The epoch in which the last finished window lies."""
        place = self.state_dict().get("place") if self._progress is None else None
        return self._progress.epoch if self._progress is not None else place["epoch"] if place else 0

    def state_dict(self) -> dict[str, Any]:
        """Raises `PlanError` if the place cannot be found again, because the loader shuffles by itself."""
        return self._state if self._progress is None else self._progress.state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state, self._progress = state, None

    def _through(self, plan: Plan, windows: Windows) -> Windows:
        """These windows, from the place on. Raises `PlanError` for a place in windows of another target."""
        if self._progress is None:
            progress = Progress(plan.target_tokens or plan.target_batch, alone=True)
            if self._state:
                progress.load(self._state)
            self._progress = progress
        return self._progress.through(windows)

    def _finished(self, window: Window) -> None:
        assert self._progress is not None
        self._progress.finished(window, stops=False)


def micro_batches(
    accelerator: Any,
    plan: Plan | None = None,
    loader: Iterable[Any] = (),
    *,
    count: Callable[[Any], float] | None = None,
    target_batch: int | None = None,
    position: Position | None = None,
    **limits: Any,
) -> Iterator[MicroBatch]:
    """Every micro-batch of an epoch, window by window. Multiply its mean loss by its `weight` before `accelerator.backward`.

    Micro-batches are moved to the device.
    loader: a loader for `Plan.windows`, not prepared. With several ranks it needs `plan.batch_sampler`. count: as in `Plan.split`.
    target_batch: instead of a plan, which is then learned in the first windows and goes on to be used in later epochs (`learned_plan`). limits:
    memory_limit, headroom, max_micro_batch, equal, as in `autoaccum.tune`. The loop is yours, so an out-of-memory comes through. One rank only.
    position: a `Position`, behind which the epoch begins and which notes each window that ends.
    Raises `PlanError` for a prepared loader: Accelerate would take the end of that loader for the end of the window.
    """
    if (plan is None) == (target_batch is None):
        raise UsageError("micro_batches takes a plan, or target_batch= and it is learned: give one of the two")
    if limits and plan is not None:
        raise UsageError(f"the plan says already how a step is made up: leave {' and '.join(limits)} out, or give target_batch= instead of the plan")
    if type(loader).__name__ in ("DataLoaderShard", "DataLoaderDispatcher"):
        raise PlanError(
            "the loader was prepared by Accelerate, which reads ahead and takes its end for the window's: give the DataLoader as it was before prepare()"
        )
    if plan is None:
        learner = _learner(accelerator, target_batch, limits)
        plan = learner.plan
        if plan.learning:
            yield from _learning(accelerator, learner, loader, count, position)
            return
    apply(plan, accelerator)
    inside, job = False, getattr(accelerator, "_autoaccum_job", None)
    if count is None and job is not None:
        count = job.count
    first = None if job is None else FirstWindows.of(plan, [replace(job, count=count)])
    try:
        windows = plan.windows(loader)
        for window in windows if position is None else position._through(plan, windows):
            if first is not None and not first.is_over:
                first.look(window, None, plan.micro_batch)
            accelerator.step, inside = 0, True
            # Accelerate divides every loss by this number, and synchronizes gradients after this many micro-batches.
            accelerator.gradient_accumulation_steps = steps = _steps(plan, window, count)
            for micro in plan.split(window, count):
                if micro.last and position is not None:
                    position._finished(window)
                yield replace(micro, weight=micro.weight * steps)
            inside = False
    finally:
        if inside:  # the caller stopped inside a window: its gradients must not enter the next one
            for optimizer in accelerator._optimizers:
                getattr(optimizer, "optimizer", optimizer).zero_grad(set_to_none=True)
        accelerator.gradient_accumulation_steps = plan.accumulation_steps


def learned_plan(accelerator: Any) -> Plan:
    """The plan that `micro_batches(accelerator, target_batch=...)` has learned so far. Raises `UsageError` if nothing was learned."""
    known: tuple[Request, Learner] | None = getattr(accelerator, "_autoaccum_learned", None)
    if known is None:
        raise UsageError("no plan was learned with this accelerator: loop over micro_batches(accelerator, target_batch=..., loader=...) first")
    return known[1].plan


def _learner(accelerator: Any, target_batch: int | None, limits: dict[str, Any]) -> Learner:
    request = Request(target_batch, **limits)
    if accelerator.num_processes > 1:
        raise UsageError(f"over {accelerator.num_processes} ranks a plan is needed: every rank calls accelerate.tune")
    known: tuple[Request, Learner] | None = getattr(accelerator, "_autoaccum_learned", None)
    if known is not None and known[0] == request:
        return known[1]
    models, optimizers = accelerator._models, [getattr(wrapped, "optimizer", wrapped) for wrapped in accelerator._optimizers]
    if not models or not optimizers:
        raise UsageError("the accelerator has prepared no model or no optimizer yet: model, optimizer = accelerator.prepare(model, optimizer)")
    model = models[0] if len(models) == 1 else torch.nn.ModuleList(models)
    job = Job(model, optimizers if len(optimizers) > 1 else optimizers[0], _no_loss, (), scaler=accelerator.scaler)
    learner = Learner([job], devices.get(str(job.device)), request)
    accelerator._autoaccum_learned = request, learner
    return learner


def _no_loss(model: Any, batch: Any) -> Any:
    raise UsageError("the loss is in the caller's own loop")


def _learning(
    accelerator: Any, learner: Learner, loader: Iterable[Any], count: Callable[[Any], float] | None, position: Position | None
) -> Iterator[MicroBatch]:
    """The micro-batches of an epoch in which the plan is learned."""
    inside = False
    try:
        windows = learner.plan.windows(loader)
        for window in windows if position is None else position._through(learner.plan, windows):
            accelerator.step, inside = 0, True
            for piece, samples, weight, last in fed(learner, window, count, stepped=lambda: not accelerator.optimizer_step_was_skipped):
                # Accelerate divides every loss by this number, and steps where so many micro-batches have run.
                accelerator.gradient_accumulation_steps = steps = 1 if last else _MANY
                if last and position is not None:
                    position._finished(window)
                moved = batches.move(piece, accelerator.device, non_blocking=True)
                yield MicroBatch(moved, weight * steps, samples, last=last)
            inside = False
    finally:
        if inside:
            for optimizer in accelerator._optimizers:
                getattr(optimizer, "optimizer", optimizer).zero_grad(set_to_none=True)
        accelerator.gradient_accumulation_steps = learner.plan.accumulation_steps


_MANY = 2**20  # micro-batches, more than a window has; a power of two, by which a loss is divided without rounding


def _steps(plan: Plan, window: Window, count: Callable[[Any], float] | None) -> int:
    """The number of micro-batches of a window. A smaller last window has fewer; a window of parts that cannot be joined has more.

    The window is cut on the host to count them; those that count nothing are left out, as `Plan.split` leaves them out.
    """
    if count is None and window.samples == plan.share and len(window.parts) == 1:
        return plan.accumulation_steps
    pieces = window.cut(plan.sizes_of(window), most=plan.micro_batch, elsewhere=plan.micro_tokens is None) if window.samples else ()
    return max(sum(1 for piece, _ in pieces if count is None or count(piece)), 1)
