"""Transformers: a plan for a `Trainer`, measured with the Trainer's own training code and applied to its arguments.

plan = tune(trainer, target_batch=512)
plan.apply(trainer)
trainer.train()
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from autoaccum.data import IGNORED, batches, lengths, variety
from autoaccum.errors import JobError, PlanError, UsageError
from autoaccum.integrations import needed, not_remembered
from autoaccum.integrations.module_attributes import attributes_kept
from autoaccum.plan import Plan, framework_arguments, window_notation
from autoaccum.probe import COMPARED_SAMPLES, compare_values
from autoaccum.tuner import tune as tune_in_place
from autoaccum.window import Job, RngState, predicts_next


def tune(
    trainer: Any,
    *,
    target_batch: int,
    max_length: int | None = None,
    length: lengths.Length | None = None,
    batch: Any = None,
    count: Callable[[Any], float] | None = None,
    **request: Any,
) -> Plan:
    """Returns the plan for a `transformers.Trainer`. The Trainer, its model, its arguments and the random numbers are restored.

    The trial runs as the Trainer trains: with its loss, collator, optimizer, precision, clipping and activation checkpointing.
    max_length: every sample is cut or repeated to this length, as for data that is longer than the training set.
    length: the length of a sample, as in `autoaccum.worst_case`. batch: as in `autoaccum.tune`; by default the longest samples of the
    training set, by `length`.
    count: `count(batch)`, what the loss of a batch is a mean over, if that is neither its samples nor its labels other than -100:
    for class weights, the sum of the weights. `plan.apply(trainer)` uses it too.
    request: the other keywords of `autoaccum.tune`.
    With torchrun every rank calls this function, and all micro-batches are equal.
    Raises `UsageError` if the Trainer cannot run in this process, and what `autoaccum.tune` raises.
    """
    needed("transformers", "huggingface")
    not_remembered(request)
    _check(trainer)
    if count is not None and not callable(count):
        raise UsageError(f"count must be a function of a batch, not {type(count).__name__}")
    trainer._autoaccum_count = count
    if trainer.args.world_size > 1:
        request = {**request, "equal": True}
    rng = RngState(trainer.args.device)
    rng.note()
    try:
        with _as_it_trains(trainer) as (model, optimizer):
            make_batch, collate = (batch, None) if batch is not None else _worst(trainer, max_length, length)
            job = Job(
                model,
                optimizer,
                _loss_of(trainer, collate),
                make_batch,
                scaler=getattr(trainer.accelerator, "scaler", None),
                max_grad_norm=trainer.args.max_grad_norm or None,
            )
            # Hints explain unequal micro-batches to users who copy the numbers by hand; `apply` can set unequal ones.
            plan = replace(tune_in_place(job, target_batch=target_batch, **request), hints=())
            trainer._autoaccum_compared = plan.job_fingerprint
            return plan
    finally:
        rng.put_back()


def apply(plan: Plan, trainer: Any, *, count: Callable[[Any], float] | None = None) -> None:
    """Sets the Trainer's arguments, and the copies of them that the Trainer holds. The evaluation batch size does not change.

    Equal micro-batches come from the Trainer's loader. Micro-batches that differ by a sample come from a loader of their own: with the
    order of the Trainer's sampler or loader if a method for it was overridden, otherwise shuffled with the Trainer's seed.
    The loss of each micro-batch is its own mean, whatever the model or `compute_loss_func` does with `num_items_in_batch`, and is weighted
    by what is counted in it: its labels other than -100, or its samples, or `count` of `tune`. A micro-batch in which nothing counts is
    left out.
    count: as in `tune`, for a Trainer that was not tuned itself; by default what `tune` was given.
    Raises `PlanError` for unequal micro-batches if there are several ranks, if the dataset is a stream, or if the order of samples comes
    from batches that the user's own code puts together; and, in training, for a batch that cannot be counted, for a loader of another batch size,
    and for a `training_step` that does not call `self.compute_loss`.
    """
    args = trainer.args
    if count is not None:
        trainer._autoaccum_count = count
    if args.world_size != plan.world_size:
        raise PlanError(f"the plan is for {plan.world_size} rank{'s' if plan.world_size != 1 else ''}, and the Trainer has {args.world_size}: tune again")
    if plan.world_size > 1:
        framework_arguments.huggingface(plan)
    # The user's own methods, also those on the instance; kept from an earlier plan, whose methods would otherwise be taken for them.
    own = trainer.__dict__.setdefault(
        "_autoaccum_own", {name: getattr(trainer, name) for name in ("get_train_dataloader", "get_batch_samples", "training_step", "compute_loss")}
    )
    ragged = len(set(plan.micro_batches)) > 1
    if (strategy := getattr(args, "train_sampling_strategy", "random")) == "batch_rebalance":
        raise PlanError(
            f"train_sampling_strategy={strategy!r} makes micro-batches of other sizes than the plan's: use 'random', 'sequential' or 'group_by_length'"
        )
    if ragged:
        _check_ragged(plan, trainer)
    args.per_device_train_batch_size, args.gradient_accumulation_steps = plan.micro_batch, plan.accumulation_steps
    args.auto_find_batch_size = False
    trainer._train_batch_size = args.train_batch_size
    trainer.accelerator.gradient_accumulation_steps = 1  # the weights of the losses sum to 1 already
    trainer.get_total_train_batch_size = MethodType(lambda self, args: plan.target_batch, trainer)
    trainer.get_train_dataloader = MethodType(
        lambda self: _loader(self, plan, own["get_train_dataloader"]) if ragged else _on_the_host(own["get_train_dataloader"](), plan), trainer
    )
    compared = getattr(trainer, "_autoaccum_compared", "") == plan.job_fingerprint != ""  # then `tune` has compared samples of this Trainer already
    began = False
    weights: list[tuple[int | float, float]] = []  # of the window's micro-batches, the last one first: count, and weight of the mean

    def get_batch_samples(self: Any, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        nonlocal began
        micro_batches, items = own["get_batch_samples"](epoch_iterator, num_batches, device)
        weights[:] = _weights(self, micro_batches)[::-1]
        if micro_batches and not began:
            began = True
            if not compared and plan.world_size == 1:
                _compare_first(self, micro_batches[0])
            if self.model_accepts_loss_kwargs and all(map(_has_counted_labels, micro_batches)):
                _say_what_the_trainer_divides_by(self, micro_batches, sum(count for count, _ in weights))
        return micro_batches, items

    def training_step(self: Any, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Any:
        count, weight = weights.pop() if weights else (_counted(self, inputs), 1.0)
        if not count and plan.world_size == 1:
            return torch.zeros((), device=self.args.device)  # its mean is nan, and it contributes nothing

        asked = False

        def compute_loss(model: torch.nn.Module, inputs: Any, *_: Any, **__: Any) -> Any:
            nonlocal asked
            asked = True
            loss = _mean(self, model, inputs, count, own["compute_loss"])
            return loss * weight if count else loss.nan_to_num() * 0.0

        # The loss is weighted here, so the Trainer must divide by 1 only.
        steps, self.current_gradient_accumulation_steps, self.compute_loss = self.current_gradient_accumulation_steps, 1, compute_loss
        self.args.gradient_accumulation_steps = 1
        try:
            loss = own["training_step"](model, inputs, None)
        finally:
            self.current_gradient_accumulation_steps, self.compute_loss = steps, own["compute_loss"]
            self.args.gradient_accumulation_steps = plan.accumulation_steps
        if not asked:
            raise PlanError(
                f"training_step() of this {type(self).__name__} computes its loss without self.compute_loss(model, inputs), where micro-batches are weighted: "
                "call that, or train in a loop of your own with autoaccum.Accumulator"
            )
        return loss

    trainer.get_batch_samples, trainer.training_step = MethodType(get_batch_samples, trainer), MethodType(training_step, trainer)


def _compare_first(trainer: Any, batch: Any) -> None:
    """Warns if the loss of a few samples does not follow from the losses of parts of them; for a plan that was not made with this Trainer.

    batch: the first micro-batch. If it cannot be cut, samples of the dataset are put together instead.
    """
    model, few = trainer.model, min(COMPARED_SAMPLES, max(trainer.args.per_device_train_batch_size, 2))
    rng, training = RngState(trainer.args.device), model.training
    rng.note()
    try:
        model.eval()
        samples, collate = _samples_of(batch), None
        if samples is None:
            loader = trainer._autoaccum_own["get_train_dataloader"]()
            _forget(trainer, loader)
            batch, collate = [loader.dataset[index * len(loader.dataset) // few] for index in range(few)], loader.collate_fn
        elif samples < 2:
            return
        else:
            batch = variety.most_unlike(dict(batch), samples, few)
        job = Job(model, torch.optim.SGD(model.parameters(), lr=0.0), _loss_of(trainer, collate), batch)
        message = compare_values(job, batch)
    except Exception:  # what is wrong with the job is told when it trains
        return
    finally:
        model.train(training)
        rng.put_back()
    if message:
        warnings.warn(message, stacklevel=6)


def _say_what_the_trainer_divides_by(trainer: Any, micro_batches: Sequence[Any], counted: float) -> None:
    """Warns if the Trainer alone would divide by another number than the loss is a mean over."""
    items = trainer._get_num_items_in_batch(list(micro_batches), trainer.args.device) if trainer.args.world_size == 1 else None
    if items is not None and trainer.compute_loss_func is None and counted and abs(float(items) / counted - 1) > 1e-6:
        warnings.warn(
            f"the Trainer alone would divide this window's loss by {float(items):g} labels, and the model's loss is a mean over {counted:g}: here the gradient is "
            f"that of the mean, {float(items) / counted:.3f} times the Trainer's",
            stacklevel=6,
        )


def _shifts_labels(trainer: Any) -> bool:
    """True if the model leaves out each sequence's first label."""
    return predicts_next(trainer.model) or bool(getattr(trainer, "_loss_shifts_labels", False))


def _weights(trainer: Any, micro_batches: Sequence[Any]) -> list[tuple[int | float, float]]:
    """The count of each micro-batch, and the weight of its mean in the window over all ranks."""
    counts = [_counted(trainer, batch) for batch in micro_batches]
    total, averaged = float(sum(counts)), 1
    if trainer.args.world_size > 1:
        # DistributedDataParallel averages the gradients over the ranks.
        averaged = trainer.args.world_size
        total = float(trainer.accelerator.gather(torch.tensor([total], dtype=torch.float64, device=trainer.args.device)).sum())
    return [(count, averaged * count / total if total else 0.0) for count in counts]


def _mean(trainer: Any, model: torch.nn.Module, inputs: Any, count: float, compute_loss: Callable[..., Any]) -> torch.Tensor:
    """The mean loss of one micro-batch, over what is counted in it.

    Transformers' own `compute_loss` gets no `num_items_in_batch`, so the model takes its own mean. A function of the user's gets this
    micro-batch's count: if it divides a sum by it, and if it takes a mean of its own, the result is the mean over this micro-batch.
    """
    by_user = trainer.compute_loss_func is not None or not _is_of_transformers(compute_loss)
    if not by_user:
        return compute_loss(model, inputs)  # type: ignore[no-any-return]
    loss = compute_loss(model, inputs, num_items_in_batch=torch.tensor(count, device=trainer.args.device))
    args = trainer.args
    if args.average_tokens_across_devices and args.world_size > 1 and (trainer.model_accepts_loss_kwargs or trainer.compute_loss_func):
        loss = loss / args.world_size  # the Trainer has multiplied by it, for a count over all ranks
    return loss  # type: ignore[no-any-return]


def _is_of_transformers(method: Any) -> bool:
    return str(getattr(getattr(method, "__func__", method), "__module__", "")).partition(".")[0] == "transformers"


def _has_counted_labels(batch: Any) -> bool:
    """True if labels are whole numbers, over which models take their mean, without those that are -100."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    return isinstance(labels, torch.Tensor) and labels.dim() >= 1 and not labels.is_floating_point() and labels.dtype is not torch.bool


def _counted(trainer: Any, batch: Any) -> int | float:
    """What the mean loss of a batch is a mean over: `count` of the user's, labels other than -100, or samples.

    A loss function of the user's is given, and judged by, what the Trainer counts for it.
    Raises `PlanError` if nothing of it can be counted.
    """
    count = getattr(trainer, "_autoaccum_count", None)
    if count is not None:
        return float(count(batch))
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    by_user = trainer.compute_loss_func is not None
    if isinstance(labels, torch.Tensor) and labels.dim() and (by_user or _has_counted_labels(batch)):
        shifts = bool(getattr(trainer, "_loss_shifts_labels", False)) if by_user else _shifts_labels(trainer)
        if isinstance(shifted := batch.get("shift_labels"), torch.Tensor):
            labels = shifted
        elif shifts and labels.dim() >= 2:
            labels = labels[..., 1:]
        return int((labels != IGNORED).sum())
    if isinstance(labels, torch.Tensor) and labels.dim():
        return len(labels)
    try:
        return batches.count(batch)
    except PlanError as error:
        raise PlanError(
            f"what a batch of this Trainer counts is not known ({str(error).partition(';')[0]}): give count=, a function of a batch, to huggingface.tune"
        ) from None


def _check(trainer: Any) -> None:
    args = trainer.args
    if args.n_gpu > 1:
        raise UsageError(
            f"this Trainer would spread every micro-batch over {args.n_gpu} GPUs in one process: start it with torchrun, or set CUDA_VISIBLE_DEVICES"
        )
    for name, framework in (("is_deepspeed_enabled", "DeepSpeed"), ("is_fsdp_enabled", "FSDP")):
        if getattr(trainer, name, False):
            raise UsageError(
                f"with {framework} the Trainer shards the model itself, and one rank cannot rehearse it alone: tune the plain model with autoaccum.tune"
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


class _Epochs(DataLoader[Any]):
    """A loader with `set_epoch`, which the Trainer calls to change the order."""

    def set_epoch(self, epoch: int) -> None:
        set_epoch = getattr(self.batch_sampler, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)


class _InOrder:
    """A batch sampler: the user's own order of samples, cut into the micro-batches of the plan's windows."""

    def __init__(self, plan: Plan, sampler: Any, *, drop_last: bool) -> None:
        self._plan, self._sampler, self._drop_last = plan, sampler, drop_last

    def __iter__(self) -> Iterator[list[int]]:
        window: list[int] = []
        for index in self._sampler:
            window.append(index)
            if len(window) == self._plan.target_batch:
                yield from self._cut(window)
                window = []
        if window and not self._drop_last:
            yield from self._cut(window)

    def __len__(self) -> int:
        whole, rest = divmod(len(self._sampler), self._plan.target_batch)
        return whole * self._plan.accumulation_steps + (len(self._plan.sizes(rest)) if rest and not self._drop_last else 0)

    def set_epoch(self, epoch: int) -> None:
        set_epoch = getattr(self._sampler, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)

    def _cut(self, window: list[int]) -> Iterator[list[int]]:
        start = 0
        for size in self._plan.sizes(len(window)):
            yield window[start : start + size]
            start += size


# Methods that decide which samples come when. https://huggingface.co/docs/transformers/main_classes/trainer
_ORDER_METHODS = ("get_train_dataloader", "_get_train_sampler", "_get_dataloader")


def _orders_by_itself(trainer: Any, get_train_dataloader: Any) -> str:
    """The name of a method of the user's that decides the order of samples, overridden in any class or on the instance; "" if none is."""
    for name in _ORDER_METHODS:
        method = get_train_dataloader if name == "get_train_dataloader" else getattr(trainer, name, None)
        if method is not None and not _is_of_transformers(method):
            return name
    return ""


def _loader(trainer: Any, plan: Plan, get_train_dataloader: Callable[[], Any]) -> DataLoader[Any]:
    """A loader of whole windows, one micro-batch at a time.

    Batches stay on the host until they are used: the Trainer reads a window ahead.
    """
    own = get_train_dataloader()
    _forget(trainer, own)
    args = trainer.args
    if method := _orders_by_itself(trainer, get_train_dataloader):
        sampler: Any = _InOrder(plan, _sampler_of(own, method, plan), drop_last=args.dataloader_drop_last)
    else:
        shuffle = getattr(args, "train_sampling_strategy", "random") == "random"
        seed = args.data_seed if args.data_seed is not None else args.seed
        sampler = plan.batch_sampler(own.dataset, shuffle=shuffle, seed=seed, drop_last=args.dataloader_drop_last)
    if not len(sampler):
        raise PlanError(
            f"the data has fewer samples than the target batch of {plan.target_batch}, and dataloader_drop_last=True leaves that window out: turn it off"
        )
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


def _sampler_of(loader: Any, method: str, plan: Plan) -> Any:
    """The sampler of the user's loader. Raises `PlanError` if its batches are not simply slices of one."""
    batch_sampler, sampler = getattr(loader, "batch_sampler", None), getattr(loader, "sampler", None)
    if not isinstance(loader, DataLoader) or type(batch_sampler).__name__ not in ("BatchSampler", "SeedableRandomSampler") or not hasattr(sampler, "__len__"):
        raise PlanError(
            f"{window_notation(plan.micro_batches)} cannot keep the order of samples that {method}() of this Trainer decides, because its batches are put "
            "together by code of its own: tune(trainer, ..., equal=True)"
        )
    return sampler


def _on_the_host(loader: Any, plan: Plan) -> Any:
    """Keeps the loader's batches on the host. Raises `PlanError` for a loader of another batch size than the plan's.

    The Trainer reads a window ahead, which would use device memory that no micro-batch needs. It moves each batch later.
    """
    if type(loader).__name__ == "DataLoaderShard":
        loader.device = None
    size = getattr(loader, "batch_size", None) or getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    if isinstance(size, int) and size != plan.micro_batch:
        raise PlanError(
            f"get_train_dataloader() of this Trainer gives batches of {size}, and the plan's are {plan.micro_batch}: let it use self._train_batch_size"
        )
    return loader


def _forget(trainer: Any, loader: Any) -> None:
    """Removes an unused loader from the accelerator's list."""
    loaders = trainer.accelerator._dataloaders
    loaders[:] = [known for known in loaders if known is not loader]


@contextmanager
def _as_it_trains(trainer: Any) -> Iterator[tuple[torch.nn.Module, Any]]:
    """The model and the optimizer as `Trainer.train` prepares them. All changes are undone at the end."""
    args, accelerator, model = trainer.args, trainer.accelerator, trainer.model
    before = {name: getattr(trainer, name, None) for name in ("optimizer", "lr_scheduler", "_created_lr_scheduler")}
    models, training = list(accelerator._models), model.training
    with attributes_kept(model):
        try:
            model.train()
            _checkpoint(args, model)
            if trainer.optimizer is None:
                trainer.create_optimizer()
            optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # after training, the Trainer holds Accelerate's wrapper
            # This adds autocast and float32 outputs, as `accelerator.prepare` does.
            yield accelerator.prepare_model(model, evaluation_mode=True), optimizer
        finally:
            accelerator._models[:] = models
            for name, value in before.items():
                setattr(trainer, name, value)
            model.train(training)


def _checkpoint(args: Any, model: Any) -> None:
    """Turns on activation checkpointing, as the Trainer does when training starts. The names changed in Transformers 5.2."""
    for word in ("activation_checkpointing", "gradient_checkpointing"):
        if getattr(args, word, None):
            settings = dict(getattr(args, f"{word}_kwargs", None) or {})
            enable = getattr(model, f"{word}_enable", None) or model.gradient_checkpointing_enable
            further = {name: settings.pop(name) for name in ("every_n_layers", "offload") if name in settings}
            enable(settings or None, **further)
            return


def _loss_of(trainer: Any, collate: Callable[[list[Any]], Any] | None) -> Callable[[Any, Any], Any]:
    """The Trainer's loss: a mean over samples, or a sum and a count for a mean over anything else.

    collate: puts samples together, for a Trainer whose batches cannot be cut; None if the loss gets batches.
    """

    def loss(model: torch.nn.Module, batch: Any) -> Any:
        if collate is not None:
            batch = collate(list(batch))
        inputs = trainer._prepare_inputs(dict(batch) if isinstance(batch, Mapping) else batch)
        count = _counted(trainer, inputs)
        over_samples = getattr(trainer, "_autoaccum_count", None) is None and not _has_counted_labels(inputs)
        with trainer.compute_loss_context_manager():
            mean = _mean(trainer, model, inputs, count, trainer.__dict__.get("_autoaccum_own", {}).get("compute_loss", trainer.compute_loss))
        if over_samples:
            return mean
        # The mean over no items is nan; such a batch contributes nothing.
        return (mean if count else mean.nan_to_num() * 0.0) * count, float(count)

    loss.cure = "give huggingface.tune count=, a function of a batch that says what its loss is a mean over"  # type: ignore[attr-defined]
    return loss


def _samples_of(batch: Any) -> int | None:
    try:
        return batches.count(batch)
    except PlanError:
        return None


def _worst(trainer: Any, max_length: int | None, length: lengths.Length | None) -> tuple[Callable[[int], Any], Callable[[list[Any]], Any] | None]:
    """`make_batch(n)` with the longest samples of the training set, and the collator if a batch cannot be cut once it is put together."""
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
    if _samples_of(made(2)) == 2:
        return made, None
    # Batches of patches or of flattened texts: samples are cut before they are put together.
    return lengths.worst_case(data, length=length, collate=list), loader.collate_fn


class _AtLength(Dataset[Any]):
    """A dataset whose samples are cut or repeated to a length.

    This changes every field that is as long as the sample's longest field.
    """

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
        field_lengths = {name: len(field) for name, field in sample.items() if isinstance(field, (list, torch.Tensor)) and getattr(field, "ndim", 1) > 0}
        longest = max(field_lengths.values(), default=0)
        return {name: _repeated(field, self._length) if longest and field_lengths.get(name) == longest else field for name, field in sample.items()}


def _repeated(field: Any, length: int) -> Any:
    indices = [index % len(field) for index in range(length)]
    return field[torch.tensor(indices)] if isinstance(field, torch.Tensor) else [field[index] for index in indices]
