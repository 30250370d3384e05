"""Transformers' Trainer: a plan from what it will really run, and set where it really reads it.

plan = tune(trainer, target_batch=512)
plan.apply(trainer)
trainer.train()
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from autoaccum.data import batches, lengths
from autoaccum.errors import JobError, PlanError, UsageError
from autoaccum.integrations import needed, not_remembered
from autoaccum.integrations.module_attributes import attributes_kept
from autoaccum.plan import Plan, framework_arguments, window_notation
from autoaccum.tuner import tune as tune_in_place
from autoaccum.window import IGNORED, Job, RngState, predicts_next


def tune(trainer: Any, *, target_batch: int, max_length: int | None = None, length: lengths.Length | None = None, batch: Any = None, **request: Any) -> Plan:
    """The plan for a `transformers.Trainer`, which comes back as it was: its model, its arguments, its random numbers.

    Rehearsed as the Trainer trains: its `compute_loss`, collator, optimizer, precision, clipping and activation checkpointing.
    batch: what to measure with, as in `autoaccum.tune`; by default the longest samples of its training set, by `length` (as in
    `autoaccum.worst_case`), each cut or repeated to `max_length` where that is given, as for data that is longer than what is here.
    wish: the other keywords of `autoaccum.tune`. Under torchrun every rank calls it, and micro-batches are equal.
    Raises `UsageError` for a Trainer that cannot be rehearsed in this process, and what `autoaccum.tune` raises.
    """
    needed("transformers", "huggingface")
    not_remembered(request)
    _check(trainer)
    if trainer.args.world_size > 1:
        request = {**request, "equal": True}
    drawn = RngState(trainer.args.device)
    drawn.note()
    try:
        with _as_it_trains(trainer) as (model, optimizer):
            make_batch = batch if batch is not None else _worst(trainer, max_length, length)
            job = Job(
                model,
                optimizer,
                _loss_of(trainer, ignores_items=_ignores_items(trainer, model, make_batch(2) if callable(make_batch) else make_batch)),
                make_batch,
                scaler=getattr(trainer.accelerator, "scaler", None),
                max_grad_norm=trainer.args.max_grad_norm or None,
            )
            # Hints tell those who have to write the numbers down what to do about unequal ones; `apply` runs them.
            return replace(tune_in_place(job, target_batch=target_batch, **request), hints=())
    finally:
        drawn.put_back()


def apply(plan: Plan, trainer: Any) -> None:
    """Sets what the Trainer reads: its arguments, and what it has copied from them. Its evaluation batch size stays what it is.

    Micro-batches that differ by a sample come from a loader with `Plan.batch_sampler`, which takes the place of the Trainer's own
    (shuffled by its seed); equal ones from the Trainer's. Either way a mean over samples is weighted by what a window holds, the smaller
    last one included; models that divide by `num_items_in_batch` are told it by the Trainer, and whether one does is tried out with the
    first batch, since many take it and leave it unused.
    Raises `PlanError` for unequal micro-batches over several ranks, for a stream, and where the Trainer's own sampler would be lost.
    """
    args = trainer.args
    if args.world_size != plan.world_size:
        raise PlanError(f"the plan is for {plan.world_size} rank{'s' if plan.world_size != 1 else ''}, and the Trainer has {args.world_size}: tune again")
    if plan.world_size > 1:
        framework_arguments.huggingface(plan)
    trainer_class = type(trainer)
    ragged = len(set(plan.micro_batches)) > 1
    if ragged:
        _check_ragged(plan, trainer)
    args.per_device_train_batch_size, args.gradient_accumulation_steps = plan.micro_batch, plan.accumulation_steps
    args.auto_find_batch_size = False
    trainer._train_batch_size = args.train_batch_size
    trainer.accelerator.gradient_accumulation_steps = 1  # the Trainer divides by itself
    trainer.get_total_train_batch_size = MethodType(lambda self, args: plan.target_batch, trainer)
    trainer.get_train_dataloader = MethodType(lambda self: _loader(self, plan) if ragged else _on_the_host(trainer_class.get_train_dataloader(self)), trainer)
    shares: list[float] = []
    trainer.__dict__.setdefault("_autoaccum_accepted", trainer.model_accepts_loss_kwargs)
    trainer.model_accepts_loss_kwargs = trainer._autoaccum_accepted
    asked = False

    def get_batch_samples(self: Any, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        nonlocal asked
        held, items = trainer_class.get_batch_samples(self, epoch_iterator, num_batches, device)
        if held and not asked:
            asked = True
            if _ignores_items(self, self.model_wrapped, held[0]):
                self.model_accepts_loss_kwargs, items = False, None  # then it divides nothing by what it counts
        shares[:] = _shares(self, held)[::-1]
        return held, items

    def training_step(self: Any, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Any:
        share = shares.pop() if shares else None
        if share is None or _normalised(self, num_items_in_batch):
            return trainer_class.training_step(self, model, inputs, num_items_in_batch)
        # The Trainer divides a mean by the window's micro-batches, whatever they hold.
        whole, self.current_gradient_accumulation_steps = self.current_gradient_accumulation_steps, 1 / share
        try:
            return trainer_class.training_step(self, model, inputs, num_items_in_batch)
        finally:
            self.current_gradient_accumulation_steps = whole

    trainer.get_batch_samples, trainer.training_step = MethodType(get_batch_samples, trainer), MethodType(training_step, trainer)


def _shares(trainer: Any, held: Sequence[Any]) -> list[float]:
    """What each micro-batch's mean is of its window's; nothing where that cannot be counted."""
    try:
        sizes = [_counted(trainer, each) for each in held]
    except PlanError:
        return []
    return [size / sum(sizes) if sum(sizes) else 0.0 for size in sizes]


def _counted(trainer: Any, batch: Any) -> int:
    """What the model's own mean is taken over: labels that count, where every sample has several, else samples."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, torch.Tensor) or labels.dim() < 2 or labels.is_floating_point():
        return batches.count(batch)
    shifted = labels[..., 1:] if predicts_next(trainer.model) else labels
    return int((shifted != IGNORED).sum())


def _ignores_items(trainer: Any, model: Any, batch: Any) -> bool:
    """Whether the model takes `num_items_in_batch` and leaves it unused, as stock models that take any keyword do (those for classification
    among them). The Trainer believes that they have divided by it, and their gradient grows with the number of micro-batches."""
    if not trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None or not isinstance(batch, Mapping):
        return False
    try:
        few = trainer._prepare_inputs(dict(batches.resize(batch, min(batches.count(batch), 2))))
    except PlanError:
        return False
    items = trainer._get_num_items_in_batch([few], trainer.args.device)
    if items is None:
        return False
    drawn, training = RngState(trainer.args.device), model.training
    drawn.note()
    model.eval()
    try:
        with torch.no_grad(), trainer.compute_loss_context_manager():
            once, half = (trainer.compute_loss(model, dict(few), num_items_in_batch=items * times) for times in (1, 2))
    finally:
        model.train(training)
        drawn.put_back()
    return bool(torch.isfinite(once) and not torch.isclose(once, 2 * half, rtol=1e-2))


def _normalised(trainer: Any, items: Any) -> bool:
    """Whether the loss is divided by what the whole window counts, as `Trainer.training_step` decides it."""
    told = getattr(trainer, "loss_is_scaled_for_ga", None)
    return bool(told) if told is not None else (trainer.model_accepts_loss_kwargs and items is not None) or trainer.compute_loss_func is not None


def _check(trainer: Any) -> None:
    args = trainer.args
    if args.n_gpu > 1:
        raise UsageError(
            f"this Trainer would spread every micro-batch over {args.n_gpu} GPUs in one process: start it with torchrun, or set CUDA_VISIBLE_DEVICES"
        )
    for name, what in (("is_deepspeed_enabled", "DeepSpeed"), ("is_fsdp_enabled", "FSDP")):
        if getattr(trainer, name, False):
            raise UsageError(
                f"with {what} the Trainer shards the model itself, and one rank cannot rehearse it alone: tune the plain model with autoaccum.tune"
            )
    if trainer.model is None or trainer.model_init is not None:
        raise UsageError("this Trainer makes a new model whenever it trains (model_init), which is not there yet: give it a model")
    if args.use_liger_kernel:
        raise UsageError("use_liger_kernel changes the model when training begins: apply the kernels before, and leave the argument out")


def _check_ragged(plan: Plan, trainer: Any) -> None:
    micro_batches = window_notation(plan.micro_batches)
    if isinstance(trainer.train_dataset, IterableDataset) or not hasattr(trainer.train_dataset, "__len__"):
        raise PlanError(f"{micro_batches} need a dataset with a length, and this one is a stream: tune(trainer, ..., equal=True)")
    strategy = getattr(trainer.args, "train_sampling_strategy", "random")
    if strategy not in ("random", "sequential") or getattr(trainer.args, "group_by_length", False):
        raise PlanError(f"{micro_batches} come from a sampler of ours, and this Trainer has one of its own ({strategy}): tune(trainer, ..., equal=True)")
    if type(trainer).__name__ != "Trainer" and "get_train_dataloader" in vars(type(trainer)):
        raise PlanError(f"{micro_batches} come from a loader of ours, and {type(trainer).__name__} makes its own: tune(trainer, ..., equal=True)")


class _Epochs(DataLoader[Any]):
    """A loader whose order the Trainer can set."""

    def set_epoch(self, epoch: int) -> None:
        set_epoch = getattr(self.batch_sampler, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)


def _loader(trainer: Any, plan: Plan) -> DataLoader[Any]:
    """Whole windows, micro-batch by micro-batch. On the host until their turn comes: the Trainer reads a window ahead."""
    own = type(trainer).get_train_dataloader(trainer)
    _forget(trainer, own)
    args = trainer.args
    shuffle = getattr(args, "train_sampling_strategy", "random") == "random"
    seed = args.data_seed if args.data_seed is not None else args.seed
    sampler = plan.batch_sampler(own.dataset, shuffle=shuffle, seed=seed, drop_last=args.dataloader_drop_last)
    workers = (
        {"persistent_workers": args.dataloader_persistent_workers, "prefetch_factor": args.dataloader_prefetch_factor} if args.dataloader_num_workers else {}
    )
    return _Epochs(
        own.dataset,
        batch_sampler=sampler,
        collate_fn=own.collate_fn,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory and trainer.args.device.type == "cuda",
        worker_init_fn=own.worker_init_fn,
        **workers,
    )


def _on_the_host(loader: Any) -> Any:
    """The Trainer reads a whole window ahead: on the device it would take memory that no micro-batch needs. Each is moved when its turn comes."""
    if type(loader).__name__ == "DataLoaderShard":
        loader.device = None
    return loader


def _forget(trainer: Any, loader: Any) -> None:
    """Takes a loader that is not used off the accelerator's list."""
    known = trainer.accelerator._dataloaders
    known[:] = [each for each in known if each is not loader]


@contextmanager
def _as_it_trains(trainer: Any) -> Iterator[tuple[torch.nn.Module, Any]]:
    """The model and the optimizer as `Trainer.train` makes them, and all of it undone."""
    args, accelerator, model = trainer.args, trainer.accelerator, trainer.model
    held = {name: getattr(trainer, name, None) for name in ("optimizer", "lr_scheduler", "_created_lr_scheduler")}
    models, training = list(accelerator._models), model.training
    with attributes_kept(model):
        try:
            model.train()
            _checkpoint(args, model)
            if trainer.optimizer is None:
                trainer.create_optimizer()
            optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # a Trainer that has trained holds Accelerate's wrapper
            # Autocast, and outputs back in single precision, as `accelerator.prepare` does it.
            yield accelerator.prepare_model(model, evaluation_mode=True), optimizer
        finally:
            accelerator._models[:] = models
            for name, value in held.items():
                setattr(trainer, name, value)
            model.train(training)


def _checkpoint(args: Any, model: Any) -> None:
    """Activation checkpointing, which the Trainer turns on when it begins to train; named otherwise before Transformers 5.2."""
    for word in ("activation_checkpointing", "gradient_checkpointing"):
        if getattr(args, word, None):
            settings = dict(getattr(args, f"{word}_kwargs", None) or {})
            enable = getattr(model, f"{word}_enable", None) or model.gradient_checkpointing_enable
            further = {name: settings.pop(name) for name in ("every_n_layers", "offload") if name in settings}
            enable(settings or None, **further)
            return


def _loss_of(trainer: Any, *, ignores_items: bool) -> Callable[[Any, Any], Any]:
    """The Trainer's, as a sum and a count where a mean is over what a whole window counts."""

    def loss(model: torch.nn.Module, batch: Any) -> Any:
        inputs = trainer._prepare_inputs(dict(batch) if isinstance(batch, Mapping) else batch)
        items = trainer._get_num_items_in_batch([inputs], trainer.args.device) if isinstance(inputs, Mapping) else None
        over_labels = _counted(trainer, inputs) if ignores_items else None
        with trainer.compute_loss_context_manager():
            mean = trainer.compute_loss(model, inputs, num_items_in_batch=items)
        if ignores_items or items is None or not _normalised(trainer, items):
            return mean if over_labels is None else (mean.nan_to_num() * over_labels, over_labels)
        # Of no labels the mean is nan, and owes nothing.
        return torch.where(items > 0, mean, torch.zeros_like(mean)) * items, items

    return loss


def _worst(trainer: Any, max_length: int | None, length: lengths.Length | None) -> Callable[[int], Any]:
    if trainer.train_dataset is None:
        raise UsageError("the Trainer has no train_dataset to measure with: give batch=")
    loader = trainer.get_train_dataloader()
    _forget(trainer, loader)
    data = loader.dataset
    if isinstance(data, IterableDataset):
        raise UsageError("the Trainer's dataset is a stream, whose longest sample nobody knows: give batch=, or a function make_batch(n)")
    if max_length is not None:
        data = _AtLength(data, max_length)
    made: Callable[[int], Any] = lengths.worst_case(data, length=length, collate=loader.collate_fn)
    return made


class _AtLength(Dataset[Any]):
    """Samples cut or repeated to a length: every field that is as long as the sample's longest one."""

    def __init__(self, data: Any, length: int) -> None:
        if length < 1:
            raise UsageError(f"max_length must be at least 1, not {length}")
        self._data, self._length = data, length

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Any:
        sample = self._data[index]
        if not isinstance(sample, Mapping):
            raise JobError(f"max_length= needs samples with named fields, and these are {type(sample).__name__}: give batch=")
        deep = {name: len(field) for name, field in sample.items() if isinstance(field, (list, torch.Tensor)) and getattr(field, "ndim", 1) > 0}
        longest = max(deep.values(), default=0)
        return {name: _repeated(field, self._length) if longest and deep.get(name) == longest else field for name, field in sample.items()}


def _repeated(field: Any, length: int) -> Any:
    at = [index % len(field) for index in range(length)]
    return field[torch.tensor(at)] if isinstance(field, torch.Tensor) else [field[index] for index in at]
