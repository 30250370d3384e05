"""Lightning: a callback that keeps the loader's batch size and the Trainer's accumulation together, exactly.

trainer = lightning.Trainer(callbacks=[EffectiveBatch(512)])
trainer.fit(model, loader)  # of any batch size
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sized
from dataclasses import replace
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler, SequentialSampler

from autoaccum.data import WindowSampler, samples_in
from autoaccum.errors import PlanError, UsageError
from autoaccum.integrations import needed, not_remembered
from autoaccum.integrations.module_attributes import attributes_kept
from autoaccum.plan import Plan, framework_arguments, window_notation
from autoaccum.probe import Request
from autoaccum.tuner import refuse_unknown_keywords
from autoaccum.tuner import tune as tune_in_place
from autoaccum.window import Job, RngState

# Either package has the same classes; the one that is imported already is the user's.
_pytorch: Any = sys.modules.get("lightning.pytorch") or sys.modules.get("pytorch_lightning") or needed("lightning.pytorch", "lightning")


class EffectiveBatch(_pytorch.Callback):  # type: ignore[misc] # Lightning is not typed here
    """Tunes when `fit` begins, then feeds windows of exactly `target_batch` samples; after `fit` the Trainer is as it was.

    Every optimizer step is over one window, also the smaller last one of an epoch, and its gradient is that of the whole window: each
    micro-batch's is weighted by what it holds. What `training_step` returns and logs stays as it is. Clipping, precision, schedulers and
    checkpoints remain Lightning's.

    batch: what to measure with, as in `autoaccum.tune`; by default the loader's first batch (for samples of unlike lengths give
    `autoaccum.worst_case(loader)`). plan: one that was made before, instead of tuning. wish: the other keywords of `autoaccum.tune`.
    Loaders are those of `fit`, of a datamodule or of the model. In distributed training micro-batches are equal.
    `plan` is the plan, once `fit` has begun.

    Raises `UsageError` for manual optimization, several loaders, sharding strategies, and limits that end inside a window.
    """

    def __init__(self, target_batch: int, *, batch: Any = None, plan: Plan | None = None, **request: Any) -> None:
        Request(target_batch)  # what cannot be used is told before anything is built
        refuse_unknown_keywords(request, tune_in_place)
        if plan is not None and plan.target_batch != target_batch:
            raise UsageError(f"the plan is for a target batch of {plan.target_batch}, not {target_batch}")
        self.target_batch, self.plan, self._batch, self._wish, self._given = target_batch, plan, batch, request, plan
        self._weights: deque[float] = deque()
        self._weight = 1.0
        self._undo: list[Callable[[], object]] = []
        self._read: Callable[[], Any] = _nothing_to_read
        self._world_size = 1

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Before optimizers are made: schedules ask how many steps there will be, and that depends on the target alone."""
        if stage != "fit":
            return
        self._check(trainer, pl_module)
        self.plan, self._world_size = None, trainer.world_size  # not that of an earlier fit
        source = trainer.fit_loop._data_source
        self._read = source.dataloader
        source.dataloader = self._loader  # asked for again whenever Lightning reloads
        self._undo = [_putting_back(trainer, "accumulate_grad_batches"), lambda: vars(source).pop("dataloader", None)]

    def _loader(self) -> Any:
        """In place of the user's loader: whole windows to count until there is a plan, then its micro-batches."""
        loader = self._users()
        if self.plan is None:
            return _to_count(loader, self.target_batch, self._world_size)
        return _MicroBatches(self.plan, _of_windows(self.plan, loader), self._weights)

    def _users(self) -> DataLoader[Any]:
        loader = self._read()
        if not isinstance(loader, DataLoader):
            raise UsageError(
                f"EffectiveBatch regroups one DataLoader, not a {type(loader).__name__}: give one, or use autoaccum.Accumulator in a loop of your own"
            )
        return loader

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """The model is on its device and has its optimizer; the loader is not read yet."""
        plan = self._given if self._given is not None else self._tuned(trainer, pl_module, self._users())
        if plan.world_size != trainer.world_size:
            raise PlanError(
                f"the plan is for {plan.world_size} rank{'s' if plan.world_size != 1 else ''}, and the Trainer has {trainer.world_size}: tune again"
            )
        if plan.fleet is not None:
            framework_arguments.lightning(plan)
            plan = replace(plan, fleet=replace(plan.fleet, lockstep=True, steps=plan.accumulation_steps))
        if trainer.fast_dev_run:  # as many windows instead of batches
            self._undo.append(_putting_back(trainer, "limit_train_batches"))
            trainer.limit_train_batches = int(trainer.fast_dev_run) * plan.accumulation_steps
        _check_limits(trainer, plan)
        self.plan = plan
        if trainer.is_global_zero:
            logging.getLogger(_pytorch.__name__).info("EffectiveBatch: %s", plan)
        self._undo.append(_putting_back(trainer._accelerator_connector, "use_distributed_sampler"))
        trainer._accelerator_connector.use_distributed_sampler = False  # every rank reads its own part already
        trainer.accumulate_grad_batches = plan.accumulation_steps
        trainer.fit_loop._combined_loader = None  # who asked for the number of steps has had it made

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Raises `UsageError` for a run that goes on inside an epoch: Lightning would begin to read it anew, and cut its last window."""
        read = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if 0 < read < trainer.num_training_batches:
            raise UsageError(
                f"the checkpoint was written inside an epoch, after {read} micro-batches, and its windows cannot be gone on with: resume from one that was "
                "written at an epoch's end (ModelCheckpoint(every_n_epochs=1))"
            )

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Takes the micro-batch's weight, in the order in which they were read."""
        self._weight = self._weights.popleft()

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: torch.Tensor) -> None:
        """Weights the gradient and leaves the loss: Lightning divides by the steps, whatever each holds."""
        weight = self._weight * trainer.accumulate_grad_batches
        if weight != 1.0 and loss.requires_grad:
            loss.register_hook(lambda gradient: gradient * weight)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """The Trainer, its loader and its accumulation as they were."""
        for undo in self._undo:
            undo()
        if self._undo:
            trainer.fit_loop._combined_loader = None
        self._undo, self._read = [], _nothing_to_read

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Also where `fit` failed."""
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
        not_remembered(self._wish)
        if sum(isinstance(each, EffectiveBatch) for each in trainer.callbacks) > 1:
            raise UsageError("two EffectiveBatch callbacks say how many samples a step sees: give one")
        if any(type(each).__name__ in ("BatchSizeFinder", "GradientAccumulationScheduler") for each in trainer.callbacks):
            raise UsageError("BatchSizeFinder and GradientAccumulationScheduler change what EffectiveBatch keeps together: leave them out")

    def _tuned(self, trainer: Any, pl_module: Any, loader: DataLoader[Any]) -> Plan:
        request = {**self._wish, "equal": True} if trainer.world_size > 1 else self._wish
        drawn = RngState(pl_module.device)
        drawn.note()
        try:
            with attributes_kept(pl_module):
                pl_module.log = pl_module.log_dict = _say_nothing  # a rehearsal's figures are nobody's
                clips = trainer.gradient_clip_val if trainer.gradient_clip_algorithm in (None, "norm") else None
                job = Job(
                    pl_module,
                    list(trainer.optimizers) if len(trainer.optimizers) > 1 else trainer.optimizers[0],
                    _loss_of(trainer, pl_module),
                    next(iter(loader)) if self._batch is None else self._batch,
                    scaler=getattr(trainer.precision_plugin, "scaler", None),
                    max_grad_norm=clips or None,
                )
                return replace(tune_in_place(job, target_batch=self.target_batch, **request), hints=())
        finally:
            drawn.put_back()


def apply(plan: Plan, trainer: Any) -> None:
    """Adds the callback to a `lightning.Trainer`, with this plan."""
    trainer.callbacks[:] = [each for each in trainer.callbacks if not isinstance(each, EffectiveBatch)]
    trainer.callbacks.append(EffectiveBatch(plan.target_batch, plan=plan))


def _putting_back(of: Any, name: str) -> Callable[[], None]:
    value = getattr(of, name)
    return lambda: setattr(of, name, value)


def _nothing_to_read() -> Any: ...


def _say_nothing(*_: Any, **__: Any) -> None: ...


def _loss_of(trainer: Any, pl_module: Any) -> Callable[[Any, Any], Any]:
    takes_index = len(inspect.signature(pl_module.training_step).parameters) > 1

    def loss(model: Any, batch: Any) -> Any:
        moved = trainer.precision_plugin.convert_input(trainer.strategy.batch_to_device(batch, dataloader_idx=0))
        with trainer.precision_plugin.train_step_context():
            returned = model.training_step(moved, 0) if takes_index else model.training_step(moved)
        return returned["loss"] if isinstance(returned, dict) else returned

    return loss


def _check_limits(trainer: Any, plan: Plan) -> None:
    """An epoch that ends inside a window would leave a part of it out of the weights."""
    limit = trainer.limit_train_batches
    if limit == 1.0 and isinstance(limit, float):
        return
    if not isinstance(limit, int) or limit % plan.accumulation_steps:
        near = max(limit // plan.accumulation_steps, 1) * plan.accumulation_steps if isinstance(limit, int) else plan.accumulation_steps
        raise UsageError(
            f"limit_train_batches={limit} counts micro-batches and ends inside a window of {window_notation(plan.micro_batches)}: "
            f"give a whole number of windows, {near} for instance, or max_steps"
        )


def _is_any_order(loader: DataLoader[Any]) -> bool:
    """Whether the loader reads its whole dataset, each sample once, in its order or shuffled, so that a sampler of ours can take its place."""
    sampler, plain = loader.sampler, (RandomSampler, SequentialSampler, DistributedSampler)
    if isinstance(loader.dataset, IterableDataset) or not isinstance(sampler, plain) or loader.batch_size is None:
        return False
    return not isinstance(sampler, RandomSampler) or (not sampler.replacement and sampler.num_samples == len(cast(Sized, loader.dataset)))


def _to_count(loader: DataLoader[Any], target: int, world_size: int) -> DataLoader[Any]:
    """As many batches on every rank as there will be windows; a stream itself, whose windows nobody can count."""
    try:
        samples = len(cast(Sized, loader.dataset)) if _is_any_order(loader) else samples_in(loader)
    except TypeError:
        return loader
    whole = samples // target if _is_any_order(loader) and loader.drop_last else -(-samples // target)
    return DataLoader(range(whole * world_size), batch_size=1)  # type: ignore[arg-type] # Lightning shares it out among the ranks


def _of_windows(plan: Plan, loader: DataLoader[Any]) -> DataLoader[Any]:
    """The same data in whole micro-batches, each collated by itself; a stream, or an order that somebody made, as it comes."""
    sampler = loader.sampler
    if not _is_any_order(loader):
        return loader
    shuffle = sampler.shuffle if isinstance(sampler, DistributedSampler) else isinstance(sampler, RandomSampler)
    # As everything else that is shuffled: by the generator's seed, so that `seed_everything` decides; alike on all ranks.
    seed = torch.initial_seed() % 2**31 if plan.world_size == 1 else 0
    workers: dict[str, Any] = {"persistent_workers": loader.persistent_workers, "prefetch_factor": loader.prefetch_factor} if loader.num_workers else {}
    return DataLoader(
        loader.dataset,
        batch_sampler=plan.batch_sampler(cast(Sized, loader.dataset), shuffle=shuffle, seed=seed, drop_last=loader.drop_last),
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        **workers,
    )


class _MicroBatches:
    """A loader of micro-batches, window after window, which notes what each owes."""

    def __init__(self, plan: Plan, loader: DataLoader[Any], weights: deque[float]) -> None:
        self._plan, self._loader, self._weights = plan, loader, weights
        self.dataset = loader.dataset
        self._drop_last = isinstance(loader.batch_sampler, WindowSampler) and loader.batch_sampler.drop_last

    def __iter__(self) -> Iterator[Any]:
        self._weights.clear()
        for window in self._plan.windows(self._loader, drop_last=self._drop_last):
            sizes = self._sizes(window.of_all, window.samples)
            pieces = list(window.cut([size for size in sizes if size], most=self._plan.micro_batch)) if window.samples else []
            if len(pieces) > len(sizes):  # parts that cannot be joined: each by itself, where that makes no more
                pieces = list(window.cut([size for held in window.sizes for size in self._plan.sizes(held)], most=self._plan.micro_batch))
            if len(pieces) > len(sizes):  # Lightning has counted them: it would leave some out
                raise PlanError(
                    f"a window came in {len(pieces)} micro-batches instead of {len(sizes)}, because its batches cannot be joined (padded to "
                    "unlike lengths): leave the sampler to EffectiveBatch, with shuffle=True or False"
                )
            # Lightning's ranks meet in every micro-batch: one that has fewer samples runs one of them again, for nothing.
            pieces += [(pieces[-1][0] if pieces else window.parts[0], 0)] * (len(sizes) - len(pieces))
            for piece, size in pieces:
                self._weights.append(self._plan.world_size * size / window.of_all)
                yield piece

    def __len__(self) -> int:
        """Micro-batches in an epoch, of every rank. Raises `TypeError` for a stream."""
        sampler, target = self._loader.batch_sampler, self._plan.target_batch
        if isinstance(sampler, WindowSampler):
            if self._plan.world_size == 1:
                return len(sampler)
            return sum(len(self._sizes(min(target, sampler.length - start))) for start, _ in sampler.windows(0))
        whole, rest = divmod(samples_in(self._loader), target)
        return whole * self._plan.accumulation_steps + (len(self._sizes(rest)) if rest else 0)

    def _sizes(self, of_all: int, own: int | None = None) -> tuple[int, ...]:
        """This rank's micro-batches of a window of so many samples over all ranks, as many as every other's; zeros are for nothing."""
        if self._plan.fleet is None:
            return self._plan.sizes(of_all if own is None else own)
        return self._plan.fleet.sizes(self._plan.rank, of_all)
