"""Transformers: a plan for a `Trainer`, measured with the Trainer's own training code and applied to its arguments.

plan = tune(trainer, target_batch=512)
plan.apply(trainer)
trainer.train()

Without a plan it is learned while training: Trainer(..., callbacks=[EffectiveBatch(512)]).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import MethodType
from typing import Any

import torch

from autoaccum.data import lengths, variety
from autoaccum.errors import AutoaccumWarning, PlanError, UsageError
from autoaccum.integrations import needed, not_remembered, rollouts, trainer_counts, trainer_evaluation, trainer_loader, trainer_samples
from autoaccum.loop import attributes_kept, own_attributes_kept
from autoaccum.plan import Plan, framework_arguments
from autoaccum.probe import COMPARED_SAMPLES, compare_values
from autoaccum.tuner import tune as tune_in_place
from autoaccum.virtual import Estimates, estimator
from autoaccum.window import Job, RngState


def __getattr__(name: str) -> Any:
    if name == "EffectiveBatch":  # a callback of Transformers', which is imported only then
        from autoaccum.integrations.trainer_windows import EffectiveBatch

        return EffectiveBatch
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def tune(
    trainer: Any,
    *,
    target_batch: int,
    max_length: int | None = None,
    length: lengths.Length | None = None,
    batch: Any = None,
    count: Callable[[Any], float] | None = None,
    evaluate: bool = False,
    **request: Any,
) -> Plan:
    """Returns the plan for a `transformers.Trainer`. The Trainer, its model, its arguments and the random numbers are restored.

    The trial runs as the Trainer trains: with its loss, collator, optimizer, precision, clipping and activation checkpointing.
    max_length: every sample is cut or repeated to this length, as for data that is longer than the training set.
    length: the length of a sample, as in `autoaccum.worst_case`. batch: as in `autoaccum.tune`; by default the longest samples of the
    training set, by `length`.
    count: `count(batch)`, what the loss of a batch is a mean over, if that is neither its samples nor its labels other than -100:
    for class weights, the sum of the weights. `plan.apply(trainer)` uses it too.
    evaluate: True also searches the batch size of evaluation (`plan.eval_batch`), with the longest samples of the evaluation set.
    request: the other keywords of `autoaccum.tune`.
    With torchrun every rank calls this function, and all micro-batches are equal.
    Raises `UsageError` if the Trainer cannot run in this process, and what `autoaccum.tune` raises.
    """
    needed("transformers", "huggingface")
    not_remembered(request)
    check_trainer(trainer)
    if count is not None and not callable(count):
        raise UsageError(f"count must be a function of a batch, not {type(count).__name__}")
    trainer._autoaccum_count = count
    generates = rollouts.generates(trainer)
    if generates and evaluate:
        raise UsageError(f"{type(trainer).__name__} evaluates by generating, in groups: leave evaluate=True out")
    if trainer.args.world_size > 1 or generates:
        request = {**request, "equal": True}
    rng = RngState(trainer.args.device)
    rng.note()
    try:
        with _as_it_trains(trainer) as (model, optimizer):
            if generates:
                make_batch, loss = batch if batch is not None else rollouts.made(trainer, target_batch), rollouts.loss_of(trainer)
            else:
                make_batch, collate = (batch, None) if batch is not None else trainer_samples.longest(trainer, max_length, length)
                loss = _loss_of(trainer, collate)
            job = Job(
                model,
                optimizer,
                loss,
                make_batch,
                scaler=getattr(trainer.accelerator, "scaler", None),
                max_grad_norm=trainer.args.max_grad_norm or None,
            )
            # Hints explain unequal micro-batches to users who copy the numbers by hand; `apply` can set unequal ones.
            if evaluate:
                request["evaluate"] = trainer_evaluation.evaluation_of(trainer, length)
            plan = replace(tune_in_place(job, target_batch=target_batch, **request), hints=())
    finally:
        rng.put_back()
    trainer._autoaccum_compared = plan.job_fingerprint
    return plan


def estimate(
    trainer: Any,
    *,
    target_batch: int,
    gpus: Sequence[str] | str | None = None,
    max_length: int | None = None,
    length: lengths.Length | None = None,
    **request: Any,
) -> Estimates:
    """Estimates a `transformers.Trainer` on cards that are not here, in a copy of this process: the Trainer does not change.

    The job is the Trainer's: its model, loss, collator, optimizer, precision, clipping and activation checkpointing, and the longest samples of
    its training set. gpus, request: as in `autoaccum.estimate` (also `world` and `shard`). max_length, length: as in `tune`.
    Raises `UsageError` for trainers that generate, and what `autoaccum.estimate` raises.
    """
    needed("transformers", "huggingface")
    check_trainer(trainer)
    if rollouts.generates(trainer):
        raise UsageError(f"{type(trainer).__name__} generates what it trains on, which has no memory here: tune on a real card")

    def make_job() -> Job:
        args, model = trainer.args, trainer.model
        model.train()
        _checkpoint(args, model)
        if trainer.optimizer is None:
            trainer.create_optimizer()
        make_batch, collate = trainer_samples.longest(trainer, max_length, length)
        trainer._prepare_inputs = lambda inputs: inputs  # they are on the simulated card already
        trainer.compute_loss_context_manager = nullcontext  # the job's autocast is the card's
        precision = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        if precision is not None:
            model.forward = convert_outputs_to_fp32(model.forward)  # as `accelerator.prepare` does
        return Job(
            model,
            getattr(trainer.optimizer, "optimizer", trainer.optimizer),
            _loss_of(trainer, collate),
            make_batch,
            scaler=torch.amp.GradScaler("cpu") if args.fp16 else None,
            autocast=precision,
            max_grad_norm=args.max_grad_norm or None,
        )

    convert_outputs_to_fp32 = needed("accelerate", "accelerate").utils.convert_outputs_to_fp32
    return estimator.estimate(make_job, target_batch=target_batch, gpus=gpus, **request)


def apply(plan: Plan, trainer: Any, *, count: Callable[[Any], float] | None = None) -> None:
    """Sets the Trainer's arguments, and the copies of them that the Trainer holds. The evaluation batch size changes only if
    the plan has an `eval_batch`.

    Equal micro-batches come from the Trainer's loader. Micro-batches that differ by a sample come from a loader of their own, in the order
    of the Trainer's sampler. So a checkpoint goes on in the same windows with either kind; with another target batch it is refused.
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
    if rollouts.generates(trainer):
        rollouts.apply(plan, trainer)
        return
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
        trainer_loader.check_ragged(plan, trainer)
    from autoaccum.integrations import trainer_checkpoints  # a callback of Transformers', which is imported only then

    trainer_checkpoints.attach(trainer, plan.target_batch)
    args.per_device_train_batch_size, args.gradient_accumulation_steps = plan.micro_batch, plan.accumulation_steps
    args.auto_find_batch_size = False
    if plan.eval_batch is not None:
        args.per_device_eval_batch_size = plan.eval_batch
    trainer._train_batch_size = args.train_batch_size
    trainer.accelerator.gradient_accumulation_steps = 1  # the weights of the losses sum to 1 already
    trainer.get_total_train_batch_size = MethodType(lambda self, args: plan.target_batch, trainer)
    trainer.get_train_dataloader = MethodType(
        lambda self: (
            trainer_loader.window_loader(self, plan, own["get_train_dataloader"])
            if ragged
            else trainer_loader.on_the_host(own["get_train_dataloader"](), plan, drop_last=args.dataloader_drop_last)
        ),
        trainer,
    )
    # Then nothing new would be told. Samples that `tune` found right may still be unlike those of training.
    compared = getattr(trainer, "_autoaccum_compared", "") == plan.job_fingerprint != "" and bool(plan.warnings)
    began, looks_at_sizes = False, True
    weights: list[trainer_counts.Weight] = []  # of the window's micro-batches, the last one first

    def get_batch_samples(self: Any, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        nonlocal began, looks_at_sizes
        micro_batches, items = own["get_batch_samples"](epoch_iterator, num_batches, device)
        most = max((trainer_samples.samples_of(batch) or 0 for batch in micro_batches), default=0)
        if most > plan.micro_batch and looks_at_sizes:
            looks_at_sizes = trainer_samples.counts_samples(self)
            if looks_at_sizes:
                raise PlanError(
                    f"the Trainer's loader gives a batch of {most} samples, and the plan's micro-batches have {plan.micro_batch}: let it give those"
                )
        weights[:] = trainer_counts.weights(self, micro_batches)[::-1]
        if micro_batches and not began:
            began = True
            if not compared and plan.world_size == 1:
                _compare_first(self, micro_batches[0])
            divides = trainer_counts.is_of_transformers(own["compute_loss"]) and getattr(self, "_autoaccum_count", None) is None
            if divides and self.model_accepts_loss_kwargs and all(map(trainer_counts.has_counted_labels, micro_batches)):
                _say_what_the_trainer_divides_by(self, micro_batches, sum(weight.count for weight in weights))
        return micro_batches, items

    def training_step(self: Any, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Any:
        return weighted_step(self, model, inputs, weights.pop() if weights else trainer_counts.Weight(trainer_counts.counted(self, inputs), 1.0))

    def weighted_step(self: Any, model: torch.nn.Module, inputs: Any, weight: trainer_counts.Weight) -> Any:
        if not weight.count and plan.world_size == 1:
            return torch.zeros((), device=self.args.device)  # its mean is nan, and it contributes nothing

        asked = False

        def compute_loss(model: torch.nn.Module, inputs: Any, *_: Any, **__: Any) -> Any:
            nonlocal asked
            asked = True
            return trainer_counts.weighted(self, model, inputs, weight, own["compute_loss"])

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
    trainer._autoaccum_weighted_step = MethodType(weighted_step, trainer)


def _compare_first(trainer: Any, batch: Any) -> None:
    """Warns if the loss of a few samples does not follow from the losses of parts of them; for a plan that was not made with this Trainer.

    batch: the first micro-batch. If it cannot be cut, samples of the dataset are put together instead.
    """
    model, few = trainer.model, min(COMPARED_SAMPLES, max(trainer.args.per_device_train_batch_size, 2))
    rng, training = RngState(trainer.args.device), model.training
    rng.note()
    try:
        model.eval()
        samples, collate = trainer_samples.samples_of(batch), None
        if samples is None or samples > trainer.args.per_device_train_batch_size or trainer_counts.holds_pairs(trainer, batch):  # rows of pairs
            loader = trainer._autoaccum_own["get_train_dataloader"]()
            trainer_loader.forget(trainer, loader)
            batch, collate = [loader.dataset[index * len(loader.dataset) // few] for index in range(few)], loader.collate_fn
        elif samples < 2:
            loader = trainer._autoaccum_own["get_train_dataloader"]()
            trainer_loader.forget(trainer, loader)
            batch = variety.most_unlike(dict(loader.collate_fn([loader.dataset[0], loader.dataset[len(loader.dataset) // 2]])), 2, 2)
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
        warnings.warn(message, AutoaccumWarning, stacklevel=6)


def _say_what_the_trainer_divides_by(trainer: Any, micro_batches: Sequence[Any], counted: float) -> None:
    """Warns if the Trainer alone would divide by another number than the loss is a mean over."""
    items = trainer._get_num_items_in_batch(list(micro_batches), trainer.args.device) if trainer.args.world_size == 1 else None
    if items is not None and trainer.compute_loss_func is None and counted and abs(float(items) / counted - 1) > 1e-6:
        warnings.warn(
            f"the Trainer alone would divide this window's loss by {float(items):g} labels, and the model's loss is a mean over {counted:g}: here the gradient is "
            f"that of the mean, {float(items) / counted:.3f} times the Trainer's",
            AutoaccumWarning,
            stacklevel=6,
        )


def check_trainer(trainer: Any) -> None:
    """Raises `UsageError` for a Trainer that cannot run in this process as it trains."""
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
    if sorting := [kind for kind in getattr(trainer, "loss_types", None) or () if str(kind).startswith("aot")]:
        raise UsageError(
            f"loss_type={sorting[0]!r} sorts the samples of a batch against each other, so micro-batches change its gradient: train with "
            "gradient_accumulation_steps=1, or take another loss_type"
        )
    if rollouts.generates(trainer):
        rollouts.check(trainer)
    if args.use_liger_kernel:
        raise UsageError("use_liger_kernel changes the model when training begins: apply the kernels before, and leave the argument out")


@contextmanager
def _as_it_trains(trainer: Any) -> Iterator[tuple[torch.nn.Module, Any]]:
    """The model and the optimizer as `Trainer.train` prepares them. All changes are undone at the end."""
    args, accelerator, model = trainer.args, trainer.accelerator, trainer.model
    models, training = list(accelerator._models), model.training
    with attributes_kept(model), own_attributes_kept(trainer):
        try:
            trainer.current_gradient_accumulation_steps = 1  # `train` sets it, and losses of TRL read it
            model.train()
            _checkpoint(args, model)
            if trainer.optimizer is None:
                trainer.create_optimizer()
            optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # after training, the Trainer holds Accelerate's wrapper
            # This adds autocast and float32 outputs, as `accelerator.prepare` does.
            yield accelerator.prepare_model(model, evaluation_mode=True), optimizer
        finally:
            accelerator._models[:] = models
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
        samples = None
        if collate is not None:
            samples, batch = len(batch), collate(list(batch))
        inputs = trainer._prepare_inputs(dict(batch) if isinstance(batch, Mapping) else batch)
        count = trainer_counts.counted(trainer, inputs)
        # Now, because the loss may take the labels out. Training weighs by what is counted, also if that is neither (the nodes of graphs).
        over_samples = trainer_counts.is_over_samples(trainer, inputs) and samples in (None, count)
        with trainer.compute_loss_context_manager():
            mean = trainer_counts.mean(trainer, model, inputs, count, trainer.__dict__.get("_autoaccum_own", {}).get("compute_loss", trainer.compute_loss))
        if over_samples:
            return mean
        # The mean over no items is nan; such a batch contributes nothing.
        return (mean if count else mean.nan_to_num() * 0.0) * count, float(count)

    def of_window(job: Job, pieces: Any, samples: int, *_: Any) -> Callable[[Any, Any], Any]:
        """The loss of each micro-batch of a window whose terms have two denominators: pairs, and tokens of the chosen completions."""
        sizes = [size for _, size in pieces]
        tokens = [trainer_counts.chosen_tokens(batch if collate is None else collate(list(batch))) for batch, _ in pieces]
        micro_batches = iter(zip(sizes, tokens))

        def part(model: torch.nn.Module, batch: Any) -> Any:
            size, own_tokens = next(micro_batches)
            inputs = trainer._prepare_inputs(dict(batch) if collate is None else collate(list(batch)))
            # The window weighs the result by size / samples.
            weight = trainer_counts.Weight(size, 1.0, own_tokens / max(sum(tokens), 1) * samples / size)
            with trainer.compute_loss_context_manager():
                return trainer_counts.weighted(
                    trainer, model, inputs, weight, trainer.__dict__.get("_autoaccum_own", {}).get("compute_loss", trainer.compute_loss)
                )

        return part

    if trainer_counts.adds_tokens_to_pairs(trainer):
        loss.of_window = of_window  # type: ignore[attr-defined]
    loss.cure = "give huggingface.tune count=, a function of a batch that says what its loss is a mean over"  # type: ignore[attr-defined]
    loss.cure_of_mixing = _cure_of_mixing(trainer)  # type: ignore[attr-defined]
    return loss


def _cure_of_mixing(trainer: Any) -> str:
    """What to do about a loss of this Trainer that looks at several samples at once."""
    in_one_piece = "set per_device_train_batch_size to the target, and gradient_accumulation_steps=1"
    if getattr(trainer, "aux_loss_enabled", False) or getattr(getattr(trainer.model, "config", None), "output_router_logits", False):
        return "the router's balance loss does: router_aux_loss_coef=0.0 is exact"
    is_of_sentences = any(base.__name__ == "SentenceTransformerTrainer" for base in type(trainer).__mro__)
    if is_of_sentences and "Cached" not in type(getattr(trainer, "loss", None)).__name__:
        return f"for in-batch negatives take CachedMultipleNegativesRankingLoss(model, mini_batch_size=...); {in_one_piece}"
    return in_one_piece
