"""The line's doors: one's own objects, a job that a file builds, a command; alone, or under torchrun with every rank."""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from autoaccum import devices
from autoaccum.distributed import engines, ranks
from autoaccum.errors import NoSuchDevice, UsageError
from autoaccum.plan import Plan
from autoaccum.probe import Objective, Progress, Reading, Request, rehearsing
from autoaccum.tuner import all_ranks
from autoaccum.tuner.one_device import reading_cache, refuse_throughput_over_ranks, tune_one_device
from autoaccum.tuner.progress import plain
from autoaccum.tuner.trial_log import TrialLog
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
    target_batch: int,
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
    progress: Progress | bool | None = None,
    **job: Any,
) -> Plan:
    """The plan with the fewest accumulation steps that fits `target_batch` on the device at hand.

    model, optimizer, loss, batch: as in `Job`, with its keywords; or a `Job` alone; or a list of jobs that run one
    after the other in every window, all resident, on the first one's batch (a GAN's discriminator and generator).
    All is rehearsed in place and comes back bit-identical, random number generators included.
    device: where the parameters are; another one is refused. memory_limit: bytes or `"2GiB"`, enforced.
    headroom: kept aside, a size or a percentage of the budget. max_micro_batch: no larger one is tried.
    equal: equal micro-batches only. largest: search the exact largest micro-batch, not only those that save
    a step. objective: "throughput" also times smaller micro-batches, in whole windows, and takes the fastest (of those within 2 % of it
    the one with the lowest peak). timeout_s: per trial; a longer one counts as not fitting. progress: called along the way; True for a line on stderr after every trial.
    cache: start from what earlier runs of the same job read on the same device (`autoaccum cache list`), and remember what this one does;
    the plan is made anew, and confirmed by a run. On one device alone.
    lengths: also plans for shorter samples, `Plan.for_length(length)`: batch is then `make_batch(n, length)`, or tensors with the length
    as their second dimension. The plan that comes back is the longest's. On one device alone.

    Under torchrun every rank calls this, after `torch.distributed.init_process_group` and before `fully_shard` (before or after
    DistributedDataParallel). Each rehearses on its own device, and the shares of the plan let all finish together: unlike
    GPUs get unlike shares, a rank that cannot hold a sample none. equal: the same share and micro-batches on every rank. lockstep: the same number of
    micro-steps on every rank, for engines that communicate in forward. rank_timeout_s: after which a missing rank is an error.

    What the plan warns of (`Plan.warnings`) is warned of here, too.
    Raises `NothingFits`, `UsageError`, `JobError`, `DeviceError`, `RanksDisagree`, and whatever the job's own code raises,
    with a note of the micro-batch and the phase.
    """
    refuse_unknown_keywords(job, tune)
    if isinstance(model, (Job, list, tuple)):
        if optimizer is not None or loss is not None or batch is not None or job:
            raise UsageError("tune(job, ...) takes everything from the job: give either a Job or model, optimizer, loss and batch")
        rehearsed = as_jobs(model)
    else:
        rehearsed = (Job(model, optimizer, loss, batch, **job),)
    request = Request(target_batch, memory_limit, headroom, max_micro_batch, equal, largest, timeout_s, lockstep, objective)
    where = _where(rehearsed[0], None if device is None else str(device))
    # In place, on a CPU, an enforced limit is also in the way of threads that other code starts meanwhile:
    # only who asked for one gets it. Without, only sizes that are predicted to fit are run.
    enforce = where.facts.kind != "cpu" or request.memory_limit is not None
    trials, idle = TrialLog(plain if progress is True else progress or None), _idle_gpu(where.facts.kind)
    others = ranks.here(_group(rehearsed), rank_timeout_s)
    if others is not None and cache:
        raise UsageError("cache=True is for one device: over ranks all rehearse at the same moments, so leave it out")
    refuse_throughput_over_ranks(request, others is not None)
    if lengths is not None:
        if others is not None:
            raise UsageError("lengths= is for one device: over ranks leave it out, and measure with the longest samples")
        return _per_length(rehearsed, where, request, lengths, trials, idle, enforce=enforce, cache=cache)
    if others is None:
        with rehearsing(rehearsed, where, request.limits, enforce=enforce, on_phase=trials.phase) as rehearsal:
            found = tune_one_device(rehearsal, request, trials, "in place", idle, reading_cache(rehearsal, "in place") if cache else None)
    else:
        alone = tuple(_without_engine(each) for each in rehearsed)
        _met_on(rehearsed[0])
        facts = where.facts
        limits, shared = all_ranks.shared_limits(request, others, (facts.kind, facts.uuid, facts.index), buckets=alone[0].model is rehearsed[0].model)
        with rehearsing(alone, where, limits, enforce=enforce, on_phase=trials.phase) as rehearsal:
            found = all_ranks.tune_all_ranks(rehearsal, request, trials, "in place", others, (*idle, *shared))
    told = [] if others is None else others.gathered(found.warnings, "warning")[: others.rank]
    for messages in found.warnings:
        if not any(messages in each for each in told):  # once, not once by every rank
            warnings.warn(messages, stacklevel=2)
    return found


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
) -> Plan:
    """One plan for each length, the longest first: what fits there fits the shorter ones, too, and is where their search begins."""
    from autoaccum.data import AtLength

    wanted = sorted(set(lengths), reverse=True) if isinstance(lengths, (list, tuple, set, range)) else []
    if not wanted or not all(isinstance(each, int) and not isinstance(each, bool) and each > 0 for each in wanted):
        raise UsageError(f"lengths must be a list of whole numbers, at least 1, not {lengths!r}")
    batch = AtLength(rehearsed[0].batch)
    jobs = (replace(rehearsed[0], batch=batch), *rehearsed[1:])
    plans: list[tuple[int, Plan]] = []
    with rehearsing(jobs, where, request.limits, enforce=enforce, on_phase=trials.phase) as rehearsal:
        fitted: list[Reading] = []
        start = 1
        for length, shorter in zip(wanted, [*wanted[1:], wanted[-1]]):
            batch.length = length
            found = tune_one_device(
                rehearsal, request, trials, "in place", idle, reading_cache(rehearsal, "in place") if cache else None, known=fitted, start=start
            )
            plans.append((length, found))
            # Of a longer sample's reading only that it fits says something of a shorter one.
            fitted += [replace(each, peak_bytes=None, activation_bytes=None, base_bytes=None) for each in trials.readings if each.fits]
            start = max(found.micro_batch * length // shorter, 1)
            trials = trials.again()
    for messages in dict.fromkeys(messages for _, found in plans for messages in found.warnings):
        warnings.warn(messages, stacklevel=3)
    return replace(plans[0][1], per_length=tuple(plans[::-1]))


def refuse_unknown_keywords(given: dict[str, Any], verb: Callable[..., Any]) -> None:
    """Raises `UsageError` for a keyword that neither `verb` nor `Job` has, with the one that was probably meant."""
    own = [name for name, each in inspect.signature(verb).parameters.items() if each.kind is each.KEYWORD_ONLY]
    names = [*own, *(each.name for each in fields(Job) if each.kw_only)]
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            raise UsageError(f"{verb.__name__}() has no keyword {name!r}" + (f": did you mean {near[0]!r}?" if near else f"; it has {', '.join(names)}"))


def _group(jobs: Sequence[Job]) -> Any:
    """The ranks that a model's engine carries gradients across; None for all there are."""
    return engines.group_of(jobs[0].model)


def _met_on(job: Job) -> None:
    """Has the ranks of a CUDA job meet once on their cards: NCCL takes its buffers then, and they are to be there when memory is read."""
    import torch
    import torch.distributed as dist

    if job.device.type == "cuda":
        with suppress(RuntimeError):  # a process group that knows no cards: then none of its buffers will be on them
            dist.all_reduce(torch.zeros(1, device=job.device), group=_group([job]))


def _without_engine(job: Job) -> Job:
    """The job as one rank can rehearse it, without communication. Raises `UsageError` for a model that cannot run so."""
    engine = engines.parallel(job.model)
    if isinstance(engine, engines.Fsdp2):
        raise UsageError("a sharded model cannot be rehearsed by one rank alone: call tune() before fully_shard(model), on every rank")
    if synced := engines.synced_norms(job.model):
        raise UsageError(
            f"SyncBatchNorm ({synced[0]}) communicates in forward, so one rank alone cannot rehearse it: call tune(..., equal=True) before convert_sync_batchnorm"
        )
    return replace(job, model=engines.unwrapped(job.model))


def _where(job: Job, device: str | None) -> devices.Device:
    """The device of the parameters. Raises `NoSuchDevice` if another was asked for."""
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
