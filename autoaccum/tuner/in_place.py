"""The function `tune`: it tunes the user's own objects in this process, on one device or, under torchrun, on every rank."""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from autoaccum import devices
from autoaccum.devices import malloc_for_training
from autoaccum.distributed import engines, ranks
from autoaccum.errors import AutoaccumWarning, NoSuchDevice, UsageError
from autoaccum.plan import Plan
from autoaccum.probe import Evaluation, Objective, Progress, Reading, Request, rehearsing
from autoaccum.tuner import all_ranks
from autoaccum.tuner.one_device import reading_cache, refuse_throughput_over_ranks, tune_one_device
from autoaccum.tuner.progress import plain
from autoaccum.tuner.trial_log import TrialLog
from autoaccum.units import MIB
from autoaccum.window import Job, as_jobs

if TYPE_CHECKING:
    import torch

RANK_TIMEOUT_S = 1800.0


def tune(
    model: Any,
    optimizer: Any = None,
    loss: Any = None,
    batch: Any = None,
    *,
    target_batch: int | None = None,
    target_tokens: int | None = None,
    device: str | torch.device | None = None,
    memory_limit: int | str | None = None,
    headroom: int | str = "3%",
    max_micro_batch: int | None = None,
    equal: bool = False,
    largest: bool = False,
    objective: Objective = "fewest-steps",
    lockstep: bool = False,
    timeout_s: float | None = None,
    rank_timeout_s: float = RANK_TIMEOUT_S,
    cache: bool = False,
    lengths: Sequence[int] | None = None,
    evaluate: bool | Callable[[Any, Any], Any] = False,
    progress: Progress | bool | None = None,
    **job: Any,
) -> Plan:
    """Returns the plan with the fewest accumulation steps for `target_batch` that fits the device.

    Trials run on the given objects. Afterwards these objects and the random number generators are bit-identical to before.

    model, optimizer, loss, batch: as in `Job`, with its keywords. Instead of them: a `Job`, or a list of jobs (a GAN's
    discriminator and generator). The jobs of a list run one after the other in every window, all resident, on the first
    job's batch.
    target_tokens: the effective batch in tokens, instead of `target_batch` in samples. A window then takes samples until it has these tokens:
    labels other than -100, or what `count` says. Its loss is per token: a scalar is taken for the mean over the tokens of its batch.
    Measure with the longest samples: `Plan.micro_tokens` is what a micro-batch may hold of them or of shorter ones, padding included.
    device: the device of the parameters; any other device raises `NoSuchDevice`.
    memory_limit: bytes or a text such as `"2GiB"`; it is enforced.
    headroom: memory that stays free, as a size or as a percentage of the budget.
    max_micro_batch: the largest micro-batch to try. equal: equal micro-batches only.
    largest: search the exact largest micro-batch, not only those that save a step.
    objective: "throughput" also times whole windows of smaller micro-batches and takes the fastest. If several are within
    2 % of the fastest, it takes the one with the lowest peak.
    timeout_s: seconds per trial; a trial that takes longer counts as not fitting.
    progress: a callback for progress events; True prints a line on stderr after every trial.
    cache: start from the readings of earlier runs of the same job on the same device (`autoaccum cache list`), and keep the
    readings of this run. A run still confirms the plan. For one device only.
    lengths: also plan for shorter samples, see `Plan.for_length(length)`. batch is then `make_batch(n, length)`, or tensors
    with the length as their second dimension. `tune` returns the plan of the longest samples. For one device only.

    evaluate: True also searches the largest batch that runs forward only, with the optimizer's state resident: `Plan.eval_batch`. It runs
    the loss, with the model in eval mode and without gradients; or give `evaluate(model, batch)`, which runs one batch of your evaluation.

    Under torchrun, every rank calls `tune`, after `torch.distributed.init_process_group` and before `fully_shard` (before or
    after DistributedDataParallel). Each rank runs trials on its own device. The plan's shares let all ranks finish at the
    same time: unlike GPUs get unlike shares, and a rank that cannot hold a sample gets none.
    equal: also the same share and micro-batches on every rank.
    lockstep: the same number of micro-steps on every rank, for engines that communicate in forward.
    rank_timeout_s: seconds after which a missing rank is an error.

    `tune` also issues the plan's warnings (`Plan.warnings`) with `warnings.warn`.
    Raises `NothingFits`, `UsageError`, `JobError`, `DeviceError`, `RanksDisagree`, and any exception of the job's own code,
    with a note of the micro-batch and the phase.
    """
    refuse_unknown_keywords(job, tune)
    if isinstance(model, (Job, list, tuple)):
        if optimizer is not None or loss is not None or batch is not None or job:
            raise UsageError("tune(job, ...) takes everything from the job: give either a Job or model, optimizer, loss and batch")
        jobs = as_jobs(model)
    else:
        jobs = (Job(model, optimizer, loss, batch, **job),)
    evaluation = Evaluation.of(evaluate)
    request = Request(
        target_batch,
        memory_limit,
        headroom,
        max_micro_batch,
        equal,
        largest,
        timeout_s,
        lockstep,
        objective,
        evaluate=evaluation is not None,
        target_tokens=target_tokens,
        **({} if evaluation is None or evaluation.most is None else {"max_eval_batch": evaluation.most}),
    )
    if target_tokens is not None and lengths is not None:
        raise UsageError("lengths= makes a plan for each length, and target_tokens one plan for all: give one of the two")
    where = _where(jobs[0], None if device is None else str(device))
    # On a CPU an enforced limit also stops threads that other code of this process starts meanwhile. So it is enforced only
    # if the user gave one. Without it, only sizes that are predicted to fit are run.
    enforce = where.facts.kind != "cpu" or request.memory_limit is not None
    trials, idle = TrialLog(plain if progress is True else progress or None), _idle_gpu(where.facts.kind)
    others = ranks.here(_group(jobs), rank_timeout_s)
    if others is not None and cache:
        raise UsageError("cache=True is for one device: over ranks all rehearse at the same moments, so leave it out")
    refuse_throughput_over_ranks(request, others is not None)
    if lengths is not None:
        if others is not None:
            raise UsageError("lengths= is for one device: over ranks leave it out, and measure with the longest samples")
        return _per_length(jobs, where, request, lengths, trials, idle, enforce=enforce, cache=cache, evaluation=evaluation)
    if others is None:
        with rehearsing(jobs, where, request.limits, enforce=enforce, on_phase=trials.phase, evaluation=evaluation) as rehearsal:
            plan = tune_one_device(rehearsal, request, trials, "in place", idle, reading_cache(rehearsal, "in place") if cache else None)
    else:
        single_rank_jobs = tuple(_without_engine(each) for each in jobs)
        _warm_up_nccl(jobs[0])
        facts = where.facts
        limits, shared = all_ranks.shared_limits(request, others, (facts.kind, facts.uuid, facts.index), buckets=single_rank_jobs[0].model is jobs[0].model)
        with rehearsing(single_rank_jobs, where, limits, enforce=enforce, on_phase=trials.phase, evaluation=evaluation) as rehearsal:
            plan = all_ranks.tune_all_ranks(rehearsal, request, trials, "in place", others, (*idle, *shared))
    if where.facts.kind == "cpu":
        malloc_for_training(plan.peak_bytes, plan.budget_bytes)
    reported = [] if others is None else others.gathered(plan.warnings, "warning")[: others.rank]
    for message in plan.warnings:
        if not any(message in each for each in reported):  # the first rank with this warning issues it
            warnings.warn(message, AutoaccumWarning, stacklevel=2)
    return plan


def _per_length(
    rehearsed: tuple[Job, ...],
    where: devices.Device,
    request: Request,
    lengths: Sequence[int],
    trials: TrialLog,
    idle: tuple[str, ...],
    *,
    enforce: bool,
    cache: bool,
    evaluation: Evaluation | None,
) -> Plan:
    """Plans for each length, the longest first.

    A micro-batch that fits for one length also fits for shorter samples, so their search starts from it.
    """
    from autoaccum.data import AtLength

    wanted = sorted(set(lengths), reverse=True) if isinstance(lengths, (list, tuple, set, range)) else []
    if not wanted or not all(isinstance(each, int) and not isinstance(each, bool) and each > 0 for each in wanted):
        raise UsageError(f"lengths must be a list of whole numbers, at least 1, not {lengths!r}")
    batch = AtLength(rehearsed[0].batch)
    jobs = (replace(rehearsed[0], batch=batch), *rehearsed[1:])
    plans: list[tuple[int, Plan]] = []
    with rehearsing(jobs, where, request.limits, enforce=enforce, on_phase=trials.phase, evaluation=evaluation) as rehearsal:
        fitted: list[Reading] = []
        start = 1
        for length, shorter in zip(wanted, [*wanted[1:], wanted[-1]]):
            batch.length = length
            plan = tune_one_device(
                rehearsal, request, trials, "in place", idle, reading_cache(rehearsal, "in place") if cache else None, known=fitted, start=start
            )
            plans.append((length, plan))
            # Only the outcome "fits" of a longer sample also holds for a shorter one; its bytes do not.
            fitted += [replace(each, peak_bytes=None, activation_bytes=None, base_bytes=None) for each in trials.readings if each.fits]
            start = max(plan.micro_batch * length // shorter, 1)
            trials = trials.again()
    for message in dict.fromkeys(message for _, plan in plans for message in plan.warnings):
        warnings.warn(message, AutoaccumWarning, stacklevel=3)
    return replace(plans[0][1], per_length=tuple(plans[::-1]))


def refuse_unknown_keywords(given: dict[str, Any], verb: Callable[..., Any]) -> None:
    """Raises `UsageError` for a keyword that neither `verb` nor `Job` has. The message suggests the closest keyword."""
    own = [name for name, each in inspect.signature(verb).parameters.items() if each.kind is each.KEYWORD_ONLY]
    names = [*own, *(each.name for each in fields(Job) if each.kw_only)]
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            raise UsageError(f"{verb.__name__}() has no keyword {name!r}" + (f": did you mean {near[0]!r}?" if near else f"; it has {', '.join(names)}"))


def _group(jobs: Sequence[Job]) -> Any:
    """The process group over which the model's engine reduces gradients; None for all ranks."""
    return engines.group_of(jobs[0].model)


_BUCKET_BYTES = 25 * MIB  # of DistributedDataParallel, unless it is told otherwise


def _warm_up_nccl(job: Job) -> None:
    """Runs one all-reduce on the GPUs of a CUDA job, of a bucket's size, so that memory readings include NCCL's buffers.

    It makes them when they are first needed, and which ones depends on the size: https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/
    """
    import torch
    import torch.distributed as dist

    if job.device.type == "cuda":
        with suppress(RuntimeError):  # a process group without CUDA has no buffers on the GPUs
            dist.all_reduce(torch.zeros(min(_BUCKET_BYTES, job.gradient_bytes()), dtype=torch.uint8, device=job.device), group=_group([job]))


def _without_engine(job: Job) -> Job:
    """The job without its engine, so that one rank runs it without communication. Raises `UsageError` if the model cannot run so."""
    engine = engines.parallel(job.model)
    if isinstance(engine, engines.Fsdp2):
        raise UsageError("a sharded model cannot be rehearsed by one rank alone: call tune() before fully_shard(model), on every rank")
    if synced := engines.synced_norms(job.model):
        raise UsageError(
            f"SyncBatchNorm ({synced[0]}) communicates in forward, so one rank alone cannot rehearse it: call tune(..., equal=True) before convert_sync_batchnorm"
        )
    return replace(job, model=engines.unwrapped(job.model))


def _where(job: Job, device: str | None) -> devices.Device:
    """The device of the parameters. Raises `NoSuchDevice` if `device` is another one."""
    placed = str(job.device)
    if device is not None and device.startswith("virtual:"):
        raise UsageError(
            f"tune() rehearses the objects it is given, which are on {placed}: for {device} use autoaccum.estimate, or autoaccum tune FILE --device {device}"
        )
    if device not in (None, "auto", placed) and f"{device}:0" != placed:
        raise NoSuchDevice(f"the model is on {placed}, not on {device}: move the model there first, or leave device out")
    return devices.get(placed)


def _idle_gpu(kind: str) -> tuple[str, ...]:
    if kind != "cpu" or (best := devices.here()[0]) == "cpu":
        return ()
    return (f"the model is on the CPU while {best} is there: move it with model.to({best!r}) before tuning if it trains there",)
