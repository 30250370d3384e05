"""Windows that a Lightning Trainer learns from: each comes to the Trainer whole, on the host, and is cut inside its training step.

The Trainer sees one batch a step. A window that runs out of memory runs again, before the optimizer steps.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from autoaccum import devices
from autoaccum.data import Cut, Window
from autoaccum.devices import malloc_for_training
from autoaccum.integrations.lightning_loader import Whole
from autoaccum.loop import Contents, Learner, Rescuer, seem_no_mean, warn_of_nothing
from autoaccum.plan import Plan
from autoaccum.probe import Request
from autoaccum.window import Job, PhaseCallback, WindowLoss, WindowResult


class LearnedWindows:
    """Runs the windows of one `fit` in micro-batches whose size is learned.

    job: the module and its optimizer. count: `count(batch)`, what the loss of a batch is a mean over; None for its samples. weigh: called with the weight
    of each micro-batch before its backward. plan: what is known so far.
    look: called before each window.
    compare: called after a window whose losses grow with the size of its micro-batches, as those of a sum do.
    """

    def __init__(
        self,
        job: Job,
        request: Request,
        count: Callable[[Any], float] | None,
        weigh: Callable[[float], None],
        look: Callable[[Window], None],
        compare: Callable[[Window], None],
    ) -> None:
        self._job, self._count, self._weigh, self._look, self._compare = job, count, weigh, look, compare
        device = devices.get(str(job.device))
        self._learner: Learner | None = Learner([job], device, request)
        self.plan: Plan = self._learner.plan
        self._rescuer = Rescuer([job], device, self.plan, enabled=True, grow_after=None)
        self._scale, self._seems_summed = 0.0, False

    @property
    def fed(self) -> Plan:
        """The plan that the loader has: every window in one piece."""
        target = self.plan.target_batch
        return replace(self.plan, micro_batches=(target,), micro_batch=target, accumulation_steps=1)

    def attach(self, trainer: Any, module: Any) -> list[Callable[[], object]]:
        """Lets windows through to the training step as they are, and cuts them there. Returns functions that undo it."""
        strategy, loop = trainer.strategy, trainer.fit_loop.epoch_loop.automatic_optimization
        to_device, make_closure = strategy.batch_to_device, loop._make_closure
        lightnings = sys.modules[type(loop).__module__]
        stays = _StaysOnHost(module)

        def moved(batch: Any, *args: Any, **settings: Any) -> Any:
            if stays.let_through:  # the loop's own call, between reading a window and the training step
                stays.let_through = False
                return batch
            return to_device(batch, *args, **settings)

        def closure(kwargs: OrderedDict[str, Any], optimizer: Any, batch_idx: int) -> Any:
            own = make_closure(kwargs, optimizer, batch_idx)

            def ran(batch: Any) -> Any:
                batch = to_device(stays.hooked(trainer.precision_plugin.convert_input(batch)), dataloader_idx=0)
                trainer._results.batch, trainer._results.batch_size = batch, None  # means over an epoch are weighted by it
                return loop._training_step(OrderedDict(kwargs, batch=batch))

            return lightnings.Closure(step_fn=partial(self._window, kwargs["batch"], ran, own, optimizer, trainer._results))

        self._module = module
        module._on_before_batch_transfer, strategy.batch_to_device, loop._make_closure = stays, moved, closure
        return [
            lambda: vars(module).pop("_on_before_batch_transfer", None),
            lambda: vars(strategy).pop("batch_to_device", None),
            lambda: vars(loop).pop("_make_closure", None),
        ]

    def _window(self, batch: Any, ran: Callable[[Any], Any], own: Any, optimizer: Any, logged: Any) -> Any:
        """Forward and backward of a window. own: Lightning's closure, whose parts run for each micro-batch. Returns the result of the last one, with the loss of all."""
        learner, window = self._learner, batch.window if isinstance(batch, Whole) else Window.of([batch])
        total = float(window.samples) if self._count is None else sum(float(self._count(part)) for part in window.parts)
        metrics = Metrics(self._module, logged)
        last: list[Any] = []
        of_step: dict[str, Any] = {}  # what was logged for the step, summed over the micro-batches with their weights
        attempts, any_loss = 0, False

        def attempt(cut: Cut, *, on_phase: PhaseCallback) -> WindowResult:
            nonlocal attempts, any_loss
            attempts += 1
            last.clear()
            of_step.clear()
            if attempts > 1:
                metrics.put_back()
                optimizer.zero_grad()
            elif own._zero_grad_fn is not None:
                own._zero_grad_fn()
            losses, index = [], -1
            for index, (piece, size) in enumerate(cut):
                weight = (float(size) if self._count is None else float(self._count(piece))) / total
                if not weight:  # the mean over nothing is nan
                    continue
                on_phase("forward", index)
                steps_before = {name: metric._forward_cache for name, metric in logged.items()}
                result = ran(piece)
                for name, metric in logged.items():
                    is_mean = metric.is_tensor and metric.meta.on_step and metric.meta.is_mean_reduction
                    if is_mean and metric._forward_cache is not steps_before.get(name):
                        of_step[name] = of_step.get(name, 0.0) + metric._forward_cache * (size / window.samples)
                loss, result.closure_loss = result.closure_loss, None  # nothing but `loss` holds the graph
                if loss is None:  # the training step left this micro-batch out
                    on_phase("left out", index)
                else:
                    on_phase("backward", index)
                    losses.append(result.loss * weight)
                    self._weigh(weight)
                    if own._backward_fn is not None:
                        own._backward_fn(loss)
                    del loss
                last[:] = [result]
            on_phase("clip", index)
            any_loss = bool(losses)
            return WindowResult(WindowLoss(losses, None), window.samples, index + 1, None, None, (), {})

        def watched(cut: Cut, *, on_phase: PhaseCallback) -> WindowResult:
            assert learner is not None
            with learner.watching(on_phase) as reading:
                return attempt(cut, on_phase=reading)

        self._look(window)
        self._rescuer.begin()
        if learner is not None:
            learner.begin(beforehand=False, given=False)
            self._scale = _scale(self._job)
        result, _ = self._rescuer.run(window, lambda most: self.plan.sizes(window.samples, most), attempt if learner is None else watched, learner=learner)
        if learner is not None and self._count is None:
            warn_of_nothing(result, learner.sizes, self._job.loss)
            self._seems_summed = seem_no_mean(result, learner.sizes)
        for name, value in of_step.items():
            logged[name]._forward_cache = value
        returned = last[0]
        if any_loss:
            returned.closure_loss = returned.loss = result.loss
        return returned

    def end(self, window: Window) -> None:
        """Takes what a window has shown, once the optimizer has stepped after it."""
        if self._seems_summed:
            self._seems_summed = False
            self._compare(window)
        if self._learner is None:
            return
        self._learner.end(window.samples, stepped=_scale(self._job) >= self._scale)
        self.plan = self._learner.plan
        self._rescuer.follow(self.plan)
        if not self.plan.learning:
            self._learner = None
            if self.plan.device.kind == "cpu":
                malloc_for_training(self.plan.peak_bytes, self.plan.budget_bytes)


def _scale(job: Job) -> float:
    """The scale of the job's GradScaler, which becomes smaller where a step is left out; 0 without one."""
    return 0.0 if job.scaler is None else float(job.scaler.get_scale())


class _StaysOnHost:
    """In the place of a module's hook before the transfer: a window stays as it is while it is read, and the hook runs on each micro-batch.

    A copy of the module, or one that was written to a file, has the hook of its class.
    """

    def __init__(self, module: Any) -> None:
        self._module, self._is_copy, self.let_through = module, False, False

    def __call__(self, batch: Any, *args: Any, **settings: Any) -> Any:
        trainer = None if self._is_copy else self._module._trainer
        if trainer is not None and trainer.training:
            self.let_through = True
            return batch
        return self.hooked(batch, *args, **settings)

    def hooked(self, batch: Any, *args: Any, **settings: Any) -> Any:
        """What the module's own hook makes of a batch."""
        return type(self._module)._on_before_batch_transfer(self._module, batch, *args, **settings)

    def __getstate__(self) -> dict[str, Any]:
        return {"_module": self._module, "_is_copy": True, "let_through": False}


class Metrics:
    """The states of a module's torchmetrics, of what it has logged, and of lists that it fills, to be put back. They change in place."""

    def __init__(self, module: torch.nn.Module, logged: Any = None) -> None:
        self._logged = {} if logged is None else dict(logged)
        metrics = [each for each in module.modules() if _is_metric(each)]
        self._before = [(each, _states(each)) for each in (*metrics, *self._logged.values())]
        self._results, self._contents = logged, Contents(module)

    def put_back(self) -> None:
        self._contents.put_back()
        for metric, states in self._before:
            vars(metric).update({name: _copied(value) for name, value in states.items()})
        for name, metric in dict(self._results or {}).items():
            if name not in self._logged:
                metric.reset()


def _is_metric(module: Any) -> bool:
    """True for a `torchmetrics.Metric`, which need not be installed to ask."""
    return hasattr(module, "_defaults") and hasattr(module, "_update_count")


def _states(metric: Any) -> dict[str, Any]:
    return {name: _copied(value) for name, value in vars(metric).items() if isinstance(value, (torch.Tensor, list, int, bool, type(None)))}


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else list(value) if isinstance(value, list) else value
