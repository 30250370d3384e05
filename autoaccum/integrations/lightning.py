"""Lightning: a callback that sets the micro-batches and the gradient accumulation steps for an exact effective batch.

trainer = lightning.Trainer(callbacks=[EffectiveBatch(512)])
trainer.fit(model, loader)  # the loader may have any batch size
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sized
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler, SequentialSampler

from autoaccum.data import Window, Windows, WindowSampler, batches, samples_in
from autoaccum.errors import PlanError, UsageError
from autoaccum.integrations import needed, not_remembered
from autoaccum.integrations.loaders import copied, with_batches_of
from autoaccum.integrations.module_attributes import attributes_kept
from autoaccum.loop import FirstWindows, Progress
from autoaccum.plan import Plan, framework_arguments, window_notation
from autoaccum.probe import Evaluation, Request
from autoaccum.tuner import refuse_unknown_keywords
from autoaccum.tuner import tune as tune_in_place
from autoaccum.window import Job, RngState

# Both packages have the same classes. Use the package that the user has imported already.
_pytorch: Any = sys.modules.get("lightning.pytorch") or sys.modules.get("pytorch_lightning") or needed("lightning.pytorch", "lightning")


class EffectiveBatch(_pytorch.Callback):  # type: ignore[misc] # Lightning is not typed here
    """Tunes when `fit` begins, then feeds windows of exactly `target_batch` samples. After `fit` it restores the Trainer.

    Every optimizer step is over one window, also over the smaller last window of an epoch. Its gradient is the gradient of the whole
    window: each micro-batch is weighted by its number of samples. The callback does not change what `training_step` returns and logs.
    Lightning still does clipping, precision, schedulers and checkpoints.
    The loader may come from `fit`, from a datamodule or from the model. In distributed training micro-batches are equal.
    The attribute `plan` is the plan after `fit` has begun.

    count: `count(batch)`, what the loss of a batch is a mean over, if that is not its samples: the number of its label tokens, or the
    sum of its class weights. Micro-batches are then weighted by it. A micro-batch in which nothing counts is replaced by another one of
    its window, with weight 0. Called on the host; one rank only.
    batch: the batch to measure with, as in `autoaccum.tune`; by default the loader's first batch. For samples of different lengths
    give `autoaccum.worst_case(loader)`.
    evaluate: True also searches the batch size of validation (`plan.eval_batch`), with `validation_step` and the validation loader's first
    batch, and sets it: in loaders whose batches are slices of their sampler, and unless `limit_val_batches` counts batches.
    plan: a plan that exists already, instead of tuning; its `eval_batch` is set too. request: the other keywords of `autoaccum.tune`.
    Raises `UsageError` for manual optimization, several loaders, sharding strategies, and limits that end inside a window.
    """

    def __init__(self, target_batch: int, *, batch: Any = None, plan: Plan | None = None, count: Callable[[Any], float] | None = None, **request: Any) -> None:
        Request(target_batch)  # raise errors before anything is built
        refuse_unknown_keywords(request, tune_in_place)
        if plan is not None and plan.target_batch != target_batch:
            raise UsageError(f"the plan is for a target batch of {plan.target_batch}, not {target_batch}")
        if count is not None and not callable(count):
            raise UsageError(f"count must be a function of a batch, not {type(count).__name__}")
        self.target_batch, self.plan, self._batch, self._request, self._given_plan = target_batch, plan, batch, request, plan
        self._count = count
        self._fed: deque[_Fed] = deque()
        self._weight, self._backwards = 1.0, 0
        self._ends: Window | None = None
        self._feed: _MicroBatches | None = None
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
        self.plan, self._world_size = None, trainer.world_size  # forget the plan of an earlier fit
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
            return _to_count(loader, self.target_batch, self._world_size, self._most_windows())
        progress = Progress(self.plan.target_batch, alone=True) if self._feed is None else self._feed.progress
        batch_progress = trainer.fit_loop.epoch_loop.batch_progress
        self._feed = _MicroBatches(
            self.plan, _of_windows(self.plan, loader), self._fed, self._count, self._look, progress, was_last=lambda: batch_progress.is_last_batch
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
            moved = trainer.precision_plugin.convert_input(trainer.strategy.batch_to_device(batch, dataloader_idx=0))
            with trainer.precision_plugin.val_step_context():
                return model.validation_step(moved, 0) if takes_index else model.validation_step(moved)

        samples = len(loader.dataset) if isinstance(loader, DataLoader) and hasattr(loader.dataset, "__len__") else None
        return Evaluation(run, partial(batches.resize, batch), *(() if samples is None else (samples,)))

    def _most_windows(self) -> int | None:
        """The windows of an epoch that `limit_train_batches` lets through; None if it does not count micro-batches.

        Raises `UsageError` if the number of micro-batches in a window is not known yet.
        """
        limit = self._limit
        if limit is None:
            return None
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
        """Tunes. The model is on its device and has its optimizer; Lightning has not read the loader yet."""
        plan = self._given_plan if self._given_plan is not None else self._tuned(trainer, pl_module, self._user_loader())
        if plan.world_size != trainer.world_size:
            raise PlanError(
                f"the plan is for {plan.world_size} rank{'s' if plan.world_size != 1 else ''}, and the Trainer has {trainer.world_size}: tune again"
            )
        if plan.fleet is not None:
            framework_arguments.lightning(plan)
            plan = replace(plan, fleet=replace(plan.fleet, lockstep=True, steps=plan.accumulation_steps))
        if trainer.fast_dev_run:  # fast_dev_run then counts windows instead of batches
            self._undo.append(_putting_back(trainer, "limit_train_batches"))
            trainer.limit_train_batches = int(trainer.fast_dev_run) * plan.accumulation_steps
        _check_limits(trainer, plan)
        _check_optimizers(trainer, plan)
        self.plan, self._look, self._feed = plan, self._looking(trainer, pl_module, plan), None
        if trainer.is_global_zero:
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
        elif 0 < current.ready < trainer.num_training_batches:
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
        first = FirstWindows.of(plan, [self._job(trainer, pl_module, ())])

        def look(window: Window) -> None:
            if first is None or first.is_over:
                return
            with attributes_kept(pl_module):
                pl_module.log = pl_module.log_dict = _log_nothing
                first.look(window, None, plan.micro_batch)

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


def _putting_back(owner: Any, name: str) -> Callable[[], None]:
    value = getattr(owner, name)
    return lambda: setattr(owner, name, value)


def _nothing_to_read() -> Any: ...


def _look_at_nothing(window: Window) -> None: ...


def _log_nothing(*_: Any, **__: Any) -> None: ...


def _loss_of(trainer: Any, pl_module: Any) -> Callable[[Any, Any], Any]:
    takes_index = len(inspect.signature(pl_module.training_step).parameters) > 1

    def loss(model: Any, batch: Any) -> Any:
        moved = trainer.precision_plugin.convert_input(trainer.strategy.batch_to_device(batch, dataloader_idx=0))
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


def _is_any_order(loader: DataLoader[Any]) -> bool:
    """True if the loader reads its whole dataset, each sample once, in order or shuffled.

    Then `WindowSampler` can replace its sampler.
    """
    sampler, plain = loader.sampler, (RandomSampler, SequentialSampler, DistributedSampler)
    if isinstance(loader.dataset, IterableDataset) or not isinstance(sampler, plain) or loader.batch_size is None:
        return False
    return not isinstance(sampler, RandomSampler) or (not sampler.replacement and sampler.num_samples == len(cast(Sized, loader.dataset)))


def _to_count(loader: DataLoader[Any], target: int, world_size: int, most: int | None) -> DataLoader[Any]:
    """A loader with one batch per window on every rank, of which there are at most `most`. A stream is returned itself, because its windows cannot be counted."""
    try:
        samples = len(cast(Sized, loader.dataset)) if _is_any_order(loader) else samples_in(loader)
    except TypeError:
        return loader
    windows = samples // target if _is_any_order(loader) and loader.drop_last else -(-samples // target)
    windows = windows if most is None else min(windows, most)
    return DataLoader(range(windows * world_size), batch_size=1)  # type: ignore[arg-type] # Lightning divides it between the ranks


def _of_windows(plan: Plan, loader: DataLoader[Any]) -> DataLoader[Any]:
    """A loader of the same data in whole micro-batches. A stream or a loader with its own order is returned unchanged."""
    sampler = loader.sampler
    if not _is_any_order(loader):
        return loader
    shuffle = sampler.shuffle if isinstance(sampler, DistributedSampler) else isinstance(sampler, RandomSampler)
    # On one rank the seed comes from torch's generator, so `seed_everything` controls it. Several ranks need the same seed.
    seed = torch.initial_seed() % 2**31 if plan.world_size == 1 else 0
    return copied(loader, batch_sampler=plan.batch_sampler(cast(Sized, loader.dataset), shuffle=shuffle, seed=seed, drop_last=loader.drop_last))


_Fed = tuple[float, Window | None]  # the weight of a micro-batch, and the window if it is its last one


class _MicroBatches:
    """A loader of micro-batches, window by window. It appends to `fed` what belongs to each one.

    was_last: `was_last()`, True if the last micro-batch of the run that wrote a checkpoint was the last one of its epoch.

    Its state is the place in the data behind the last window that has ended.
    """

    def __init__(
        self,
        plan: Plan,
        loader: DataLoader[Any],
        fed: deque[_Fed],
        count: Callable[[Any], float] | None,
        look: Callable[[Window], None],
        progress: Progress,
        *,
        was_last: Callable[[], bool],
    ) -> None:
        self._plan, self._loader, self._fed, self._count, self._look, self.progress = plan, loader, fed, count, look, progress
        self._was_last = was_last
        self.read_before: int | None = None  # micro-batches of this plan before the place that a state led to; None if none did
        self.dataset = loader.dataset
        self._drop_last = isinstance(loader.batch_sampler, WindowSampler) and loader.batch_sampler.drop_last

    def __iter__(self) -> Iterator[Any]:
        self._fed.clear()
        for window in self.progress.through(self._windows()):
            self._look(window)
            sizes = self._sizes(window.of_all, window.samples)
            pieces = list(window.cut([size for size in sizes if size], most=self._plan.micro_batch)) if window.samples else []
            if len(pieces) > len(sizes):  # some parts cannot be joined: cut each part separately, which may give fewer pieces
                pieces = list(window.cut([size for samples in window.sizes for size in self._plan.sizes(samples)], most=self._plan.micro_batch))
            if len(pieces) > len(sizes):  # Lightning has counted the micro-batches already and would drop the rest
                raise PlanError(
                    f"a window came in {len(pieces)} micro-batches instead of {len(sizes)}, because its batches cannot be joined (padded to "
                    "unlike lengths): leave the sampler to EffectiveBatch, with shuffle=True or False"
                )
            # The ranks synchronize in every micro-batch. A rank with fewer pieces repeats one with weight 0.
            pieces += [(pieces[-1][0] if pieces else window.parts[0], 0)] * (len(sizes) - len(pieces))
            weighted = self._weighted(pieces, window.of_all)
            for index, (piece, weight) in enumerate(weighted):
                self._fed.append((weight, window if index == len(weighted) - 1 else None))
                yield piece

    def _windows(self) -> Windows:
        return self._plan.windows(self._loader, drop_last=self._drop_last)

    def state_dict(self) -> dict[str, Any]:
        """The place behind the last window that has ended; empty if it could not be found again."""
        try:
            return {**self.progress.state(), "seed": getattr(self._loader.batch_sampler, "seed", None)}
        except PlanError:
            return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there. Raises `PlanError` for another target, or other data."""
        if not state:
            return
        self.progress.load(state)
        sampler = self._loader.batch_sampler
        if isinstance(sampler, WindowSampler) and state["seed"] is not None:
            sampler.seed = state["seed"]
        place = state["place"]
        if place is not None:
            done = place["done"] // self._plan.target_batch + (place["done"] % self._plan.target_batch > 0) if "done" in place else place["windows"]
            windows = self._windows()
            windows.load_state_dict(dict(place))
            self.read_before = done * self._plan.accumulation_steps
            try:
                ended = done >= len(windows)
                if ended:
                    self.read_before = len(self)
            except TypeError:  # its windows cannot be counted
                ended = self._was_last()
            if ended:  # the next window is the first one of the next epoch
                place = {**place, "epoch": place["epoch"] + 1, "done" if "done" in place else "windows": 0}
        self.progress.load({**state, "place": place})

    def _weighted(self, pieces: list[tuple[Any, int]], of_all: int) -> list[tuple[Any, float]]:
        """The pieces of a window of `of_all` samples with the weights of their mean losses. Raises `PlanError` where nothing counts."""
        if self._count is None:
            return [(piece, self._plan.world_size * size / of_all) for piece, size in pieces]
        counts = [float(self._count(piece)) for piece, _ in pieces]
        counted = next((piece for (piece, _), value in zip(pieces, counts) if value), None)
        if counted is None:
            raise PlanError(f"count= counts nothing in a window of {of_all} samples, so its loss is the mean of nothing: leave such samples out of the data")
        # Lightning runs as many micro-batches as it was told. The mean over nothing is nan, and nan with weight 0 is nan.
        return [(piece if value else counted, value / sum(counts)) for (piece, _), value in zip(pieces, counts)]

    def __len__(self) -> int:
        """The number of micro-batches in an epoch, equal on every rank. Raises `TypeError` for a stream."""
        sampler, target = self._loader.batch_sampler, self._plan.target_batch
        if isinstance(sampler, WindowSampler):
            if self._plan.world_size == 1:
                return len(sampler)
            return sum(len(self._sizes(min(target, sampler.length - start))) for start, _, _ in sampler.windows(0))
        windows, rest = divmod(samples_in(self._loader), target)
        return windows * self._plan.accumulation_steps + (len(self._sizes(rest)) if rest else 0)

    def _sizes(self, of_all: int, own: int | None = None) -> tuple[int, ...]:
        """This rank's micro-batch sizes in a window of `of_all` samples over all ranks.

        Every rank has the same number; a size may be 0.
        """
        if self._plan.fleet is None:
            return self._plan.sizes(of_all if own is None else own)
        return self._plan.fleet.sizes(self._plan.rank, of_all)
