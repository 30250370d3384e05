"""Lightning: a callback with which every optimizer step is over an exact effective batch.

trainer = lightning.Trainer(callbacks=[EffectiveBatch(512)])
trainer.fit(model, loader)  # the loader may have any batch size

How many samples fit at once is learned in the first steps, or measured before training.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader

from autoaccum.data import Window, batches
from autoaccum.errors import PlanError, UsageError
from autoaccum.integrations import LIMITS, needed, not_remembered
from autoaccum.integrations.lightning_loader import Fed, MicroBatches, of_windows, to_count, with_batches_of
from autoaccum.integrations.lightning_windows import LearnedWindows, Metrics
from autoaccum.loop import FirstWindows, Progress, attributes_kept
from autoaccum.plan import Plan, framework_arguments, window_notation
from autoaccum.probe import Evaluation, Request
from autoaccum.tuner import refuse_unknown_keywords
from autoaccum.tuner import tune as tune_in_place
from autoaccum.window import Job, RngState, replays_graphs

# Both packages have the same classes. Use the package that the user has imported already.
_pytorch: Any = sys.modules.get("lightning.pytorch") or sys.modules.get("pytorch_lightning") or needed("lightning.pytorch", "lightning")


class EffectiveBatch(_pytorch.Callback):  # type: ignore[misc] # Lightning is not typed here
    """Feeds windows of exactly `target_batch` samples, and learns in the first ones how many samples fit at once. After `fit` it restores the Trainer.

    Every optimizer step is over one window, also over the smaller last window of an epoch. Its gradient is the gradient of the whole
    window: each micro-batch is weighted by its number of samples. Lightning still does clipping, precision, schedulers and checkpoints.
    The loader may come from `fit`, from a datamodule or from the model.
    The attribute `plan` is the plan after `fit` has begun; while it is learned, what is known so far.

    While training, and afterwards with what was learned, Lightning sees one batch a step: the whole window, on the host. `training_step` and the hooks of backward
    run for each micro-batch of it, `batch_idx` counts windows, and so do `limit_train_batches` and `val_check_interval`. A window that runs out of memory
    runs again in smaller micro-batches.

    tune: True measures before training instead, and then Lightning sees each micro-batch as a batch. This is also what happens on several ranks, where
    micro-batches are equal, with keywords that only `autoaccum.tune` has, and for CUDA graphs. None: as needed. False: never.

    count: `count(batch)`, what the loss of a batch is a mean over, if that is not its samples: the number of its label tokens, or the
    sum of its class weights. Micro-batches are then weighted by it. A micro-batch in which nothing counts is replaced by another one of
    its window, with weight 0. Called on the host; one rank only.
    batch: the batch to measure with before training, as in `autoaccum.tune`; by default the loader's first batch. For samples of different lengths
    give `autoaccum.worst_case(loader)`.
    evaluate: True also searches the batch size of validation (`plan.eval_batch`), with `validation_step` and the validation loader's first
    batch, and sets it: in loaders whose batches are slices of their sampler, and unless `limit_val_batches` counts batches.
    plan: a plan that exists already; its `eval_batch` is set too. request: the other keywords of `autoaccum.tune`, of which memory_limit, headroom,
    max_micro_batch and equal also hold while it learns.
    Raises `UsageError` for manual optimization, several loaders, sharding strategies, and limits that end inside a window.
    """

    def __init__(
        self,
        target_batch: int,
        *,
        tune: bool | None = None,
        batch: Any = None,
        plan: Plan | None = None,
        count: Callable[[Any], float] | None = None,
        **request: Any,
    ) -> None:
        Request(target_batch)  # raise errors before anything is built
        refuse_unknown_keywords(request, tune_in_place)
        if plan is not None and plan.target_batch != target_batch:
            raise UsageError(f"the plan is for a target batch of {plan.target_batch}, not {target_batch}")
        if count is not None and not callable(count):
            raise UsageError(f"count must be a function of a batch, not {type(count).__name__}")
        self.target_batch, self.plan, self._batch, self._request, self._given_plan = target_batch, plan, batch, request, plan
        self._count, self._tune = count, tune
        self._learned: LearnedWindows | None = None
        self._learns = False
        self._fed: deque[Fed] = deque()
        self._weight, self._backwards = 1.0, 0
        self._ends: Window | None = None
        self._feed: MicroBatches | None = None
        self._resumed: dict[str, Any] = {}  # the state of `_feed` in a checkpoint
        self._undo: list[Callable[[], object]] = []
        self._read_loader: Callable[[], Any] = _nothing_to_read
        self._read_validation: Callable[[], Any] = _nothing_to_read
        self._look: Callable[[Window], None] = _look_at_nothing
        self._world_size = 1
        self._limit: int | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Replaces the loader before Lightning makes the optimizers.

        Schedulers need the number of steps, which depends only on the target batch.
        """
        if stage != "fit":
            return
        self._check(trainer, pl_module)
        self.plan, self._learned, self._world_size = None, None, trainer.world_size  # forget the plan of an earlier fit
        self._learns = self._given_plan is None and self._may_learn(trainer)
        self._limit = trainer.limit_train_batches if isinstance(trainer.limit_train_batches, int) and not trainer.fast_dev_run else None
        source = trainer.fit_loop._data_source
        self._read_loader = source.dataloader
        source.dataloader = lambda: self._loader(trainer)  # Lightning calls it again when it reloads
        validation = trainer.fit_loop.epoch_loop.val_loop._data_source
        self._read_validation = validation.dataloader
        validation.dataloader = lambda: self._validation_loaders(trainer)
        self._undo = [
            _putting_back(trainer, "accumulate_grad_batches"),
            *(lambda each=each: vars(each).pop("dataloader", None) for each in (source, validation)),
        ]

    def _loader(self, trainer: Any) -> Any:
        """Replaces the user's loader.

        Without a plan it is a loader with one batch per window, for counting; with a plan, its micro-batches.
        """
        loader = self._user_loader()
        if self.plan is None:
            return to_count(loader, self.target_batch, self._world_size, self._most_windows())
        plan = self.plan if self._learned is None else self._learned.fed
        progress = Progress(plan.target_batch, alone=True) if self._feed is None else self._feed.progress
        batch_progress = trainer.fit_loop.epoch_loop.batch_progress
        self._feed = MicroBatches(
            plan,
            of_windows(plan, loader),
            self._fed,
            self._count,
            self._look if self._learned is None else _look_at_nothing,
            progress,
            keeps_whole=self._learned is not None,
            was_last=lambda: batch_progress.is_last_batch,
        )
        self._feed.load_state_dict(self._resumed)
        self._resumed = {}
        return self._feed

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Adds the place in the data. Lightning keeps a loader's state too, but does not load it where an epoch has ended."""
        checkpoint["autoaccum"] = self._resumed if self._feed is None else self._feed.state_dict()

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Takes the place in the data from it, for the loader, which Lightning asks for later."""
        self._resumed = checkpoint.get("autoaccum", {})

    def _validation_loaders(self, trainer: Any) -> Any:
        """The user's validation loaders, with batches of `plan.eval_batch` if there is one."""
        loaders = self._read_validation()
        size = None if self.plan is None else self.plan.eval_batch
        if size is None:
            return loaders
        if isinstance(trainer.limit_val_batches, int):
            logging.getLogger(_pytorch.__name__).info(
                "EffectiveBatch: limit_val_batches=%s counts batches of the loader's size, so validation keeps that size", trainer.limit_val_batches
            )
            return loaders
        return tree_map(lambda each: with_batches_of(each, size), loaders)

    def _evaluation(self, trainer: Any, pl_module: Any) -> Evaluation:
        """What `validation_step` runs, on the first batch of the first validation loader. Raises `UsageError` without one."""
        source = trainer.fit_loop.epoch_loop.val_loop._data_source
        loader = next(iter(tree_leaves(self._read_validation())), None) if source.is_defined() and source.instance is not None else None
        if loader is None:
            raise UsageError("evaluate=True searches the batch of validation, and there is no validation loader: give one to fit, or leave evaluate out")
        batch = next(iter(loader))
        takes_index = len(inspect.signature(pl_module.validation_step).parameters) > 1

        def run(model: Any, batch: Any) -> Any:
            moved = trainer.precision_plugin.convert_input(batch)
            moved = trainer.strategy.batch_to_device(type(model)._on_before_batch_transfer(model, moved), dataloader_idx=0)
            with trainer.precision_plugin.val_step_context():
                return model.validation_step(moved, 0) if takes_index else model.validation_step(moved)

        samples = len(loader.dataset) if isinstance(loader, DataLoader) and hasattr(loader.dataset, "__len__") else None
        return Evaluation(run, partial(batches.resize, batch), *(() if samples is None else (samples,)))

    def _most_windows(self) -> int | None:
        """The windows of an epoch that `limit_train_batches` lets through; None if it is no number of batches.

        Raises `UsageError` if the number of micro-batches in a window is not known yet.
        """
        limit = self._limit
        if limit is None or self._learns:
            return limit
        if self._given_plan is None:
            raise UsageError(
                f"limit_train_batches={limit} counts micro-batches, and how many make a step is not known before tuning, so nobody can say how many steps "
                "there will be (estimated_stepping_batches): give max_steps instead, or tune before and give EffectiveBatch plan="
            )
        return max(limit // self._given_plan.accumulation_steps, 1)

    def _user_loader(self) -> DataLoader[Any]:
        loader = self._read_loader()
        if not isinstance(loader, DataLoader):
            raise UsageError(
                f"EffectiveBatch regroups one DataLoader, not a {type(loader).__name__}: give one, or use autoaccum.Accumulator in a loop of your own"
            )
        return loader

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Tunes, or begins to learn. The model is on its device and has its optimizer; Lightning has not read the loader yet."""
        if self._learns:
            learned = self._learned = LearnedWindows(
                self._job(trainer, pl_module, ()),
                Request(self.target_batch, **self._request),
                self._count,
                weigh=self._weigh,
                look=lambda window: self._look(window),
                compare=self._comparing(trainer, pl_module),
            )
            self._undo += learned.attach(trainer, pl_module)
            self.plan, plan = learned.plan, learned.fed
        else:
            plan = self._given_plan if self._given_plan is not None else self._tuned(trainer, pl_module, self._user_loader())
        if not self._learns and plan.world_size != trainer.world_size:
            raise PlanError(
                f"the plan is for {plan.world_size} rank{'s' if plan.world_size != 1 else ''}, and the Trainer has {trainer.world_size}: tune again"
            )
        if plan.fleet is not None:
            framework_arguments.lightning(plan)
            plan = replace(plan, fleet=replace(plan.fleet, lockstep=True, steps=plan.accumulation_steps))
        if trainer.fast_dev_run:  # fast_dev_run then counts windows instead of batches
            self._undo.append(_putting_back(trainer, "limit_train_batches"))
            trainer.limit_train_batches = int(trainer.fast_dev_run) * plan.accumulation_steps
        if self._learned is None:
            _check_limits(trainer, plan)
            _check_optimizers(trainer, plan)
            self.plan = plan
        self._look, self._feed = self._looking(trainer, pl_module, plan), None
        if trainer.is_global_zero and self._learned is None:
            logging.getLogger(_pytorch.__name__).info("EffectiveBatch: %s", plan)
        self._undo.append(_putting_back(trainer._accelerator_connector, "use_distributed_sampler"))
        trainer._accelerator_connector.use_distributed_sampler = False  # each rank's loader reads only its own part already
        trainer.accumulate_grad_batches = plan.accumulation_steps
        trainer.fit_loop._combined_loader = None  # code that asked for the number of steps made Lightning build it

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Goes on behind the last finished window of a checkpoint, which may have had other micro-batches.

        Raises `UsageError` for a checkpoint from inside an epoch whose place in the data cannot be found again.
        """
        current = trainer.fit_loop.epoch_loop.batch_progress.current
        if self._feed is None or not trainer.fit_loop.restarting:
            return
        read = self._feed.read_before
        if read is not None:
            # Lightning counts micro-batches. A checkpoint that it writes within the hook of a batch has not completed this one yet.
            open_ones = current.processed - current.completed
            current.ready = current.started = current.processed = read
            current.completed = read - open_ones
        elif current.ready and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            raise UsageError(
                f"the checkpoint was written inside an epoch, after {current.ready} micro-batches, and no place in its data can be found again, because the "
                "loader has an order of its own or EffectiveBatch was not there: resume from a checkpoint that was written at an epoch's end "
                "(ModelCheckpoint(every_n_epochs=1))"
            )

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Takes the micro-batch's weight. The weights are in the order in which the micro-batches were read."""
        (self._weight, self._ends), self._backwards = self._fed.popleft(), 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Notes the place behind a window that has ended; callbacks that write checkpoints run later."""
        if self._ends is not None and self._feed is not None:
            self._feed.progress.finished(self._ends, stops=False)
            if self._learned is not None:
                self._learned.end(self._ends)
                self.plan = self._learned.plan
            self._ends = None  # its samples are not needed any more

    def _weigh(self, weight: float) -> None:
        self._weight = weight

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: torch.Tensor) -> None:
        """Weights the gradient, not the loss. Lightning divides by the accumulation steps, even if micro-batches differ in size."""
        self._backwards += 1
        if self._backwards > 1 and trainer.accumulate_grad_batches > 1:
            raise PlanError(_evaluates_again(trainer.optimizers[0]))
        weight = self._weight * trainer.accumulate_grad_batches
        if weight != 1.0 and loss.requires_grad:
            loss.register_hook(lambda gradient: gradient * weight)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Restores the Trainer, its loader and its gradient accumulation steps."""
        for undo in self._undo:
            undo()
        if self._undo:
            trainer.fit_loop._combined_loader = None
        self._undo, self._read_loader, self._read_validation = [], _nothing_to_read, _nothing_to_read

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Restores the Trainer also if `fit` failed."""
        self.teardown(trainer, pl_module, "fit")

    def _check(self, trainer: Any, pl_module: Any) -> None:
        if not pl_module.automatic_optimization:
            raise UsageError("this model optimizes by itself: in its training_step loop over plan.split(batch), and leave EffectiveBatch out")
        if trainer.accumulate_grad_batches != 1:
            raise UsageError(f"accumulate_grad_batches={trainer.accumulate_grad_batches} and EffectiveBatch both say how to accumulate: leave the first out")
        if trainer.overfit_batches:
            raise UsageError("overfit_batches takes batches of the loader's size: leave it out, or EffectiveBatch")
        strategy = type(trainer.strategy).__name__
        if strategy not in ("SingleDeviceStrategy", "DDPStrategy"):
            raise UsageError(f"{strategy} shards the model or runs it elsewhere, where one rank cannot rehearse it alone: tune before, and give plan=")
        if self._count is not None and trainer.world_size > 1:
            raise UsageError(
                "EffectiveBatch counts on one rank only: over several, use autoaccum.Accumulator in a loop of your own, with a loss that returns (loss_sum, count)"
            )
        not_remembered(self._request)
        if sum(isinstance(callback, EffectiveBatch) for callback in trainer.callbacks) > 1:
            raise UsageError("two EffectiveBatch callbacks say how many samples a step sees: give one")
        if any(type(callback).__name__ in ("BatchSizeFinder", "GradientAccumulationScheduler") for callback in trainer.callbacks):
            raise UsageError("BatchSizeFinder and GradientAccumulationScheduler change what EffectiveBatch keeps together: leave them out")

    def _may_learn(self, trainer: Any) -> bool:
        """True if the plan is learned while training. Raises `UsageError` if it cannot be, and tune=False forbids to measure before."""
        only_tune = [name for name in self._request if name not in LIMITS] + ([] if self._batch is None else ["batch"])
        reason = (
            f"on {trainer.world_size} ranks"
            if trainer.world_size > 1
            else f"with {' and '.join(only_tune)}"
            if only_tune
            else "with CUDA graphs"
            if trainer.strategy.root_device.type == "cuda" and replays_graphs(trainer.lightning_module, trainer.lightning_module.training_step)
            else ""
        )
        if reason and self._tune is False:
            raise UsageError(f"EffectiveBatch measures before training {reason}: leave tune=False out")
        return not reason and not self._tune

    def _comparing(self, trainer: Any, pl_module: Any) -> Callable[[Window], None]:
        """A function that compares a few samples of a window, together and one by one."""

        def compare(window: Window) -> None:
            with _undisturbed(pl_module):
                FirstWindows([self._job(trainer, pl_module, ())]).look(window, None, 2, at_any=True)

        return compare

    def _job(self, trainer: Any, pl_module: Any, batch: Any) -> Job:
        clips = trainer.gradient_clip_val if trainer.gradient_clip_algorithm in (None, "norm") else None
        return Job(
            pl_module,
            list(trainer.optimizers) if len(trainer.optimizers) > 1 else trainer.optimizers[0],
            _loss_of(trainer, pl_module),
            batch,
            scaler=getattr(trainer.precision_plugin, "scaler", None),
            max_grad_norm=clips or None,
            count=self._count,
        )

    def _looking(self, trainer: Any, pl_module: Any, plan: Plan) -> Callable[[Window], None]:
        """A function that looks at the first windows of training."""
        first = FirstWindows.of(plan if self._learned is None else self._learned.plan, [self._job(trainer, pl_module, ())])

        def look(window: Window) -> None:
            if first is None or first.is_over:
                return
            most = plan.micro_batch if self._learned is None else self._learned.plan.micro_batch
            if self._learned is not None and most < 2:  # one sample is known to fit, and two may not
                return
            with _undisturbed(pl_module):
                first.look(window, None, most)

        return look

    def _tuned(self, trainer: Any, pl_module: Any, loader: DataLoader[Any]) -> Plan:
        request = {**self._request, "equal": True} if trainer.world_size > 1 else dict(self._request)
        if request.get("evaluate") is True:
            request["evaluate"] = self._evaluation(trainer, pl_module)
        rng = RngState(pl_module.device)
        rng.note()
        try:
            with attributes_kept(pl_module):
                pl_module.log = pl_module.log_dict = _log_nothing  # the values of a trial must not be logged
                job = self._job(trainer, pl_module, next(iter(loader)) if self._batch is None else self._batch)
                return replace(tune_in_place(job, target_batch=self.target_batch, **request), hints=())
        finally:
            rng.put_back()


def apply(plan: Plan, trainer: Any, *, count: Callable[[Any], float] | None = None) -> None:
    """Adds the callback to a `lightning.Trainer`, with this plan. count: as in `EffectiveBatch`."""
    trainer.callbacks[:] = [callback for callback in trainer.callbacks if not isinstance(callback, EffectiveBatch)]
    trainer.callbacks.append(EffectiveBatch(plan.target_batch, plan=plan, count=count))


@contextmanager
def _undisturbed(pl_module: Any) -> Iterator[None]:
    """Inside, the module logs nothing; at the end its attributes and metrics are as before."""
    metrics = Metrics(pl_module)
    try:
        with attributes_kept(pl_module):
            pl_module.log = pl_module.log_dict = _log_nothing
            yield
    finally:
        metrics.put_back()


def _putting_back(owner: Any, name: str) -> Callable[[], None]:
    value = getattr(owner, name)
    return lambda: setattr(owner, name, value)


def _nothing_to_read() -> Any: ...


def _look_at_nothing(window: Window) -> None: ...


def _log_nothing(*_: Any, **__: Any) -> None: ...


def _loss_of(trainer: Any, pl_module: Any) -> Callable[[Any, Any], Any]:
    takes_index = len(inspect.signature(pl_module.training_step).parameters) > 1

    def loss(model: Any, batch: Any) -> Any:
        hook = type(model)._on_before_batch_transfer  # not that of the instance, which lets windows through
        moved = trainer.strategy.batch_to_device(hook(model, trainer.precision_plugin.convert_input(batch)), dataloader_idx=0)
        with trainer.precision_plugin.train_step_context():
            returned = model.training_step(moved, 0) if takes_index else model.training_step(moved)
        return returned["loss"] if isinstance(returned, dict) else returned

    loss.cure = (  # type: ignore[attr-defined]
        "give EffectiveBatch count=, a function of a batch that says what its loss is a mean over"
        if trainer.world_size == 1
        else "use autoaccum.Accumulator in a loop of your own, with a loss that returns (loss_sum, count)"
    )
    return loss


def _check_limits(trainer: Any, plan: Plan) -> None:
    """Raises `UsageError` if `limit_train_batches` ends an epoch inside a window: the weights would be for the whole window."""
    limit = trainer.limit_train_batches
    if limit == 1.0 and isinstance(limit, float):
        return
    if not isinstance(limit, int) or limit % plan.accumulation_steps:
        near = max(limit // plan.accumulation_steps, 1) * plan.accumulation_steps if isinstance(limit, int) else plan.accumulation_steps
        raise UsageError(
            f"limit_train_batches={limit} counts micro-batches and ends inside a window of {window_notation(plan.micro_batches)}: "
            f"give a whole number of windows, {near} for instance, or max_steps"
        )


def _check_optimizers(trainer: Any, plan: Plan) -> None:
    """Raises `PlanError` for an optimizer that evaluates its closure several times: Lightning's closure holds the last micro-batch only."""
    for optimizer in trainer.optimizers if plan.accumulation_steps > 1 else ():
        closure = inspect.signature(type(optimizer).step).parameters.get("closure")
        if isinstance(optimizer, torch.optim.LBFGS) or (closure is not None and closure.default is inspect.Parameter.empty):
            raise PlanError(_evaluates_again(optimizer))


def _evaluates_again(optimizer: Any) -> str:
    name = type(optimizer).__name__
    return (
        f"{name} evaluates the loss again inside its step, and in Lightning that is the loss of the last micro-batch only: train in one piece "
        f"(a target batch that fits at once), or with autoaccum.Accumulator in a loop of your own, which gives {name} the whole window"
    )
