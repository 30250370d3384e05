"""`EffectiveBatch`: a callback with which a `transformers.Trainer` learns its micro-batches while it trains.

trainer = Trainer(model, args, train_dataset=dataset, callbacks=[EffectiveBatch(512)])
trainer.train()

The Trainer gets whole windows, on the host, and one micro-batch a step; each window is cut here, and run again if it runs out of memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from torch.utils.data import IterableDataset

from autoaccum import devices
from autoaccum.data import Cut, Window
from autoaccum.devices import malloc_for_training
from autoaccum.errors import PlanError, UsageError
from autoaccum.integrations import LIMITS, needed, of, rollouts, trainer_counts, trainer_samples
from autoaccum.loop import Learner, Rescuer
from autoaccum.plan import Plan
from autoaccum.probe import Request
from autoaccum.tuner import refuse_unknown_keywords
from autoaccum.tuner import tune as tune_in_place
from autoaccum.window import Job, PhaseCallback, WindowLoss, WindowResult

_transformers: Any = needed("transformers", "huggingface")
_OF_TRAINERS = ("max_length", "length", "batch", "evaluate")  # keywords that `huggingface.tune` has beside those of `autoaccum.tune`


class EffectiveBatch(_transformers.TrainerCallback):  # type: ignore[misc] # Transformers is not typed here
    """Every optimizer step of the Trainer is over `target_batch` samples, and how many fit at once is learned in its first steps.

    Give it to the Trainer when it is made: `Trainer(..., callbacks=[EffectiveBatch(512)])`. The batch size and the gradient accumulation steps
    in the Trainer's arguments are then not used. A window is collated as one batch, so all its samples are padded to its longest.
    plan: what is known so far; None before training.
    tune: True measures before training instead, with `huggingface.tune`. This is also what happens where nothing can be learned: on several ranks, for
    trainers that generate, for batches that cannot be cut into samples (preference pairs, packed texts), and with keywords that only
    `huggingface.tune` has. None: as needed. False: never.
    count: as in `huggingface.tune`. request: its other keywords, of which memory_limit, headroom, max_micro_batch and equal also hold while it learns.
    Raises `UsageError` for what `huggingface.tune` refuses.
    """

    def __init__(self, target_batch: int, *, tune: bool | None = None, count: Callable[[Any], float] | None = None, **request: Any) -> None:
        Request(target_batch)  # raises at once what is wrong
        refuse_unknown_keywords({name: value for name, value in request.items() if name not in _OF_TRAINERS}, tune_in_place)
        self._target, self._tune, self._count, self._request = target_batch, tune, count, request
        self._trainer: Any = None
        self.plan: Plan | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Takes hold of the Trainer, which passes itself to no callback: it is the caller's caller."""
        frame = inspect.currentframe()
        while frame is not None and not isinstance(frame.f_locals.get("self"), _transformers.Trainer):
            frame = frame.f_back
        if frame is None:
            return
        self._trainer = trainer = frame.f_locals["self"]
        own = trainer.train

        def train(*args: Any, **settings: Any) -> Any:
            self._begin(trainer)
            return own(*args, **settings)

        trainer.train = train

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Raises `UsageError` if the Trainer was made without this callback."""
        if self._trainer is None:
            raise UsageError("EffectiveBatch must be there when the Trainer is made: Trainer(..., callbacks=[EffectiveBatch(512)]), not add_callback")

    def _begin(self, trainer: Any) -> None:
        of(trainer).check_trainer(trainer)
        reason = self._why_not(trainer)
        if reason and self._tune is False:
            raise UsageError(f"EffectiveBatch measures before training {reason}: leave tune=False out")
        if reason or self._tune:
            self.plan = of(trainer).tune(trainer, target_batch=self._target, count=self._count, **self._request)
            self.plan.apply(trainer)
            return
        _Windows(trainer, self, Request(self._target, **self._request)).attach(self._count)

    def _why_not(self, trainer: Any) -> str:
        """Why nothing can be learned while training; "" if it can."""
        only_tune = [name for name in self._request if name not in LIMITS]
        if trainer.args.world_size > 1:
            return f"on {trainer.args.world_size} ranks"
        if rollouts.generates(trainer):
            return f"with {type(trainer).__name__}, which generates"
        if only_tune:
            return f"with {' and '.join(only_tune)}"
        if not isinstance(trainer.train_dataset, IterableDataset) and not trainer_samples.counts_samples(trainer):
            return "where batches cannot be cut into samples (pairs, packed texts)"
        return ""


class _Windows:
    """Runs the Trainer's windows in micro-batches."""

    def __init__(self, trainer: Any, callback: EffectiveBatch, request: Request) -> None:
        self._trainer, self._callback = trainer, callback
        if trainer.optimizer is None:
            trainer.create_optimizer()  # as `train` does
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        job = Job(trainer.model, optimizer, _no_loss, (), scaler=getattr(trainer.accelerator, "scaler", None))
        device = devices.get(str(job.device))
        self._learner: Learner | None = Learner([job], device, request)
        self._plan = callback.plan = self._learner.plan
        self._rescuer = Rescuer([job], device, self._plan, enabled=True, grow_after=None)
        self._ended: int | None = None  # the samples of a window, after which the Trainer has stepped since

    def attach(self, count: Callable[[Any], float] | None) -> None:
        """Puts whole windows into the Trainer, and this into its training step."""
        trainer, target = self._trainer, self._plan.target_batch
        of(trainer).apply(replace(self._plan, micro_batches=(target,), micro_batch=target, accumulation_steps=1), trainer, count=count)
        trainer.training_step = MethodType(lambda _, model, inputs, num_items_in_batch=None: self._step(model, inputs), trainer)

    def _step(self, model: torch.nn.Module, inputs: Any) -> torch.Tensor:
        """Forward and backward of a window, in micro-batches. Returns its loss."""
        self._take_what_was_learned()
        learner, window = self._learner, Window.of([inputs])
        total = float(trainer_counts.counted(self._trainer, inputs))

        def attempt(cut: Cut, *, on_phase: PhaseCallback) -> WindowResult:
            losses, index = [], -1
            for index, (piece, _) in enumerate(cut):
                counted = trainer_counts.counted(self._trainer, piece)
                if counted:  # else it does not run
                    on_phase("forward", index)
                weight = trainer_counts.Weight(counted, counted / total if total else 0.0)
                losses.append(self._trainer._autoaccum_weighted_step(model, piece, weight).detach())
            on_phase("clip", index)
            return WindowResult(WindowLoss(losses, None), window.samples, index + 1, None, None, (), {})

        def watched(cut: Cut, *, on_phase: PhaseCallback) -> WindowResult:
            assert learner is not None
            with learner.watching(on_phase) as reading:
                return attempt(cut, on_phase=reading)

        self._rescuer.begin()
        if learner is not None:
            learner.begin(beforehand=False, given=False)
        result, _ = self._rescuer.run(window, lambda most: self._plan.sizes(window.samples, most), attempt if learner is None else watched, learner=learner)
        self._ended = window.samples
        return result.loss

    def _take_what_was_learned(self) -> None:
        """Takes into the plan what the last window has shown, now that the Trainer has stepped after it."""
        if self._learner is None or self._ended is None:
            return
        self._learner.end(self._ended, stepped=not self._trainer.accelerator.optimizer_step_was_skipped)
        self._plan = self._callback.plan = self._learner.plan
        self._rescuer.follow(self._plan)
        if not self._plan.learning:
            self._learner = None
            if self._plan.device.kind == "cpu":
                malloc_for_training(self._plan.peak_bytes, self._plan.budget_bytes)


def _no_loss(model: Any, batch: Any) -> Any:
    raise PlanError("the loss is the Trainer's own")
