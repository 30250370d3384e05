"""The line's doors: one's own objects, a job that a file builds, a command; alone, or under torchrun with every rank."""

from __future__ import annotations

import difflib
import inspect
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from autoaccum import devices, explaining, plan, refusing, search
from autoaccum.cache import Shelf
from autoaccum.child import Child
from autoaccum.command import Command, Template
from autoaccum.devices import nvml
from autoaccum.errors import JobFailed, NoSuchDevice, UsageError
from autoaccum.job import Job, Source, in_turn, source
from autoaccum.launched import launched
from autoaccum.line import Objective, Teller, Wish, found_for, nothing_fits, planned, unlimited, versions, window_of
from autoaccum.plan import Plan
from autoaccum.progress import plain
from autoaccum.reading import COMPARED_SAMPLES, Equivalence, Limits, Progress, Reading, Rehearser

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
    from autoaccum import ranks, together, trial  # torch: the command line, which imports this file, does without

    known(job, tune)
    if isinstance(model, (Job, list, tuple)):
        if optimizer is not None or loss is not None or batch is not None or job:
            raise UsageError("tune(job, ...) takes everything from the job: give either a Job or model, optimizer, loss and batch")
        rehearsed = in_turn(model)
    else:
        rehearsed = (Job(model, optimizer, loss, batch, **job),)
    wish = Wish(target_batch, memory_limit, headroom, max_micro_batch, equal, largest, timeout_s, lockstep, objective)
    where = _where(rehearsed[0], None if device is None else str(device))
    # In place, on a CPU, an enforced limit is also in the way of threads that other code starts meanwhile:
    # only who asked for one gets it. Without, only sizes that are predicted to fit are run.
    enforce = where.facts.kind != "cpu" or wish.memory_limit is not None
    tell, idle = Teller(plain if progress is True else progress or None), _idle_gpu(where.facts.kind)
    others = ranks.here(_group(rehearsed), rank_timeout_s)
    if others is not None and cache:
        raise UsageError("cache=True is for one device: over ranks all rehearse at the same moments, so leave it out")
    _alone_for_throughput(wish, others is not None)
    if lengths is not None:
        if others is not None:
            raise UsageError("lengths= is for one device: over ranks leave it out, and measure with the longest samples")
        return _per_length(rehearsed, where, wish, lengths, tell, idle, enforce=enforce, cache=cache)
    if others is None:
        with trial.rehearsal(rehearsed, where, wish.limits, enforce=enforce, say=tell.phase) as rehearsal:
            found = found_for(rehearsal, wish, tell, "in place", idle, _shelf(rehearsal, "in place") if cache else None)
    else:
        alone = tuple(_without_engine(each) for each in rehearsed)
        _met_on(rehearsed[0])
        facts = where.facts
        limits, shared = together.limits(wish, others, (facts.kind, facts.uuid, facts.index), buckets=alone[0].model is rehearsed[0].model)
        with trial.rehearsal(alone, where, limits, enforce=enforce, say=tell.phase) as rehearsal:
            found = together.found_together(rehearsal, wish, tell, "in place", others, (*idle, *shared))
    told = [] if others is None else others.gathered(found.warnings, "warning")[: others.rank]
    for said in found.warnings:
        if not any(said in each for each in told):  # once, not once by every rank
            warnings.warn(said, stacklevel=2)
    return found


def tune_source(
    where: Source | str | None,
    wish: Wish,
    *,
    device: str = "auto",
    cache: bool = False,
    progress: Progress | None = None,
    said: Callable[[str], None] | None = None,
) -> Plan:
    """As `tune`, for a job that a file builds, in a child process of its own. `said` gets what the job prints."""
    origin = where if isinstance(where, Source) else source(where)
    _alone_for_throughput(wish, launched() is not None)
    if launched() is not None:
        return _tuned_with_ranks(origin, wish, device, progress, said)
    with _child(origin, wish, device, progress, said) as (child, tell, label):
        return found_for(child, wish, tell, label, (), _shelf(child, label, origin) if cache else None)


def _alone_for_throughput(wish: Wish, over_ranks: bool) -> None:
    if over_ranks and wish.objective == "throughput":
        raise UsageError('objective "throughput" is for one device: over ranks shares are made for the shortest time anyway, so leave it out')


def _per_length(
    rehearsed: tuple[Job, ...], where: devices.Device, wish: Wish, lengths: Sequence[int], tell: Teller, idle: tuple[str, ...], *, enforce: bool, cache: bool
) -> Plan:
    """One plan for each length, the longest first: what fits there fits the shorter ones, too, and is where their search begins."""
    from autoaccum import trial
    from autoaccum.lengths import AtLength

    wanted = sorted(set(lengths), reverse=True) if isinstance(lengths, (list, tuple, set, range)) else []
    if not wanted or not all(isinstance(each, int) and not isinstance(each, bool) and each > 0 for each in wanted):
        raise UsageError(f"lengths must be a list of whole numbers, at least 1, not {lengths!r}")
    batch = AtLength(rehearsed[0].batch)
    jobs = (replace(rehearsed[0], batch=batch), *rehearsed[1:])
    plans: list[tuple[int, Plan]] = []
    with trial.rehearsal(jobs, where, wish.limits, enforce=enforce, say=tell.phase) as rehearsal:
        fitted: list[Reading] = []
        start = 1
        for length, shorter in zip(wanted, [*wanted[1:], wanted[-1]]):
            batch.length = length
            found = found_for(rehearsal, wish, tell, "in place", idle, _shelf(rehearsal, "in place") if cache else None, known=fitted, start=start)
            plans.append((length, found))
            # Of a longer sample's reading only that it fits says something of a shorter one.
            fitted += [replace(each, peak_bytes=None, activation_bytes=None, base_bytes=None) for each in tell.tried if each.fits]
            start = max(found.micro_batch * length // shorter, 1)
            tell = tell.again()
    for said in dict.fromkeys(said for _, found in plans for said in found.warnings):
        warnings.warn(said, stacklevel=3)
    return replace(plans[0][1], per_length=tuple(plans[::-1]))


def _shelf(rehearsal: Rehearser, label: str, origin: Source | None = None) -> Shelf | None:
    """What is remembered of this job on this device; None where nothing is worth it."""
    conditions = rehearsal.conditions()
    if conditions is None:
        return None
    subject, memory = rehearsal.subject(), rehearsal.budget().memory
    about: dict[str, Any] = {
        "device": subject.device.name,
        "kind": subject.device.kind,
        "total_bytes": memory.total_bytes,
        "driver": nvml.driver_version() if subject.device.kind == "cuda" else "",
        "allocator": subject.allocator,
        **{name: version for name, version in versions().items() if name != "python"},
    }
    if origin is not None:
        about["job"], about["settings"], about["arguments"] = origin.where, repr(sorted(origin.settings.items())), list(origin.argv)
        about["file"] = origin.digest()
    return Shelf(label, conditions, about)


def _tuned_with_ranks(where: Source | str | None, wish: Wish, device: str, progress: Progress | None, said: Callable[[str], None] | None) -> Plan:
    """Every rank with a child of its own, on the device of its local rank."""
    import torch.distributed as dist

    from autoaccum import ranks, together

    told = launched()
    assert told is not None
    if device.startswith("virtual:"):
        raise UsageError("torchrun started several ranks, and a simulated card has none: for cards that are not here use autoaccum fleet")
    dist.init_process_group("gloo")
    others = ranks.here()
    assert others is not None  # torchrun said so
    labels = devices.here()
    mine = (
        f"cuda:{told.local_rank % sum(each.startswith('cuda') for each in labels)}" if device in ("auto", "cuda") and labels[0].startswith("cuda") else device
    )
    facts = devices.get(labels[0] if mine == "auto" else mine).facts
    try:
        limits, shared = together.limits(wish, others, (facts.kind, facts.uuid, facts.index), buckets=True)
        with _child(where, wish, facts.label, progress, said, limits) as (child, tell, label):
            found = together.found_together(child, wish, tell, label, others, shared)
        dist.barrier()  # a rank that leaves while others are still connected may be aborted by gloo
        return found
    finally:
        dist.destroy_process_group()


def check_source(
    where: Source | str | None,
    micro_batch: int,
    wish: Wish,
    *,
    device: str = "auto",
    progress: Progress | None = None,
    said: Callable[[str], None] | None = None,
) -> Plan:
    """Rehearses one given micro-batch, the whole window twice. Raises `OutOfMemory` with by how much it does not fit."""
    if not 1 <= micro_batch <= wish.target_batch:
        raise UsageError(f"a micro-batch of {micro_batch} for a target batch of {wish.target_batch}: give between 1 and {wish.target_batch}")
    if wish.equal and wish.target_batch % micro_batch:
        near = [size for size in search.sizes(wish.target_batch, equal=True) if size <= micro_batch][-1]
        raise UsageError(f"{micro_batch} does not divide a target batch of {wish.target_batch}: {near} does, or leave --equal out")
    with _child(where, wish, device, progress, said) as (child, tell, label):
        started = time.monotonic()
        budget = refusing.enough(child.budget())
        sizes = plan.micro_batches(wish.target_batch, math.ceil(wish.target_batch / micro_batch))
        norms = child.subject().batch_norms
        if sizes[0] < micro_batch:
            # The size itself was asked for, so it is run as given, with the rest of the window smaller.
            whole, rest = divmod(wish.target_batch, micro_batch)
            sizes = (micro_batch,) * whole + ((rest,) if rest else ())
            if norms and rest == 1:
                sizes = window_of(wish.target_batch, micro_batch)
        if norms and min(sizes) < 2:
            raise UsageError(f"BatchNorm layer {norms[0]!r} needs micro-batches of at least 2 samples, and {explaining.notation(sizes)} leaves one alone")
        reading = tell.measured(child, sizes, full=True)
        if not reading.fits:
            raise refusing.too_big(reading, sizes, unlimited(child, tell, reading, sizes, budget), budget)
        found = search.Found(micro_batch, len(sizes), micro_batch, None)
        return planned(child, wish, tell, label, found, reading, sizes, budget, started, (), searched=False)


def compare_source(where: Source | str | None, wish: Wish, *, device: str = "auto", said: Callable[[str], None] | None = None) -> Equivalence:
    """Whether splitting a batch of the job changes its gradient, in a child process. Raises `JobFailed` where the job fails."""
    with _child(where, wish, device, None, said) as (child, _, _):
        found = child.compare(COMPARED_SAMPLES)
        if found is None:
            raise JobFailed("the job's process ended, or took longer than --timeout, while a few samples were compared")
        return found


def tune_command(words: Sequence[str], wish: Wish, *, device: str = "auto", progress: Progress | None = None, said: Callable[[str], None]) -> Plan:
    """As `tune`, for a command that takes `{micro_batch}` and `{accumulation_steps}`: equal micro-batches, fewest steps.

    Raises `JobFailed` where the command fails for another reason than memory.
    """
    if wish.objective == "throughput":
        raise UsageError("--objective throughput times windows, and of a command only the whole run can be timed, its start included: leave it out")
    template, tell, started = Template(tuple(words)), Teller(progress), time.monotonic()
    wish = replace(wish, equal=True)
    with Command(template, device, wish.limits, said=said) as command:
        budget = refusing.enough(command.budget())
        target = wish.target_batch
        candidates = search.sizes(target, most=wish.max_micro_batch, equal=True)

        def fits(micro_batch: int, steps: int) -> Reading:
            return tell.measured(command, plan.micro_batches(target, steps))

        # Not from one sample on: a script in micro-batches of one is the slowest run there is.
        found = search.largest(fits, target, candidates, budget_bytes=lambda: budget.budget_bytes, daring=command.enforces, start=max(target // 16, 1))
        if not found.micro_batch:
            raise nothing_fits(command, tell, candidates[0], target, budget)
        sizes = plan.micro_batches(target, found.accumulation_steps)
        confirmed = next(each for each in tell.tried if each.micro_batch == found.micro_batch)
        return planned(command, wish, tell, str(template), found, confirmed, sizes, budget, started, ())


def check_command(
    words: Sequence[str], micro_batch: int, wish: Wish, *, device: str = "auto", progress: Progress | None = None, said: Callable[[str], None]
) -> Plan:
    """Runs the command once at one given size. Raises `OutOfMemory` where it does not fit."""
    if wish.target_batch % micro_batch:
        raise UsageError(f"a command runs equal micro-batches: {micro_batch} does not divide a target batch of {wish.target_batch}")
    template, tell, started = Template(tuple(words)), Teller(progress), time.monotonic()
    with Command(template, device, wish.limits, said=said) as command:
        budget = refusing.enough(command.budget())
        sizes = plan.micro_batches(wish.target_batch, wish.target_batch // micro_batch)
        reading = tell.measured(command, sizes)
        if not reading.fits:
            raise refusing.too_big(reading, sizes, unlimited(command, tell, reading, sizes, budget), budget)
        return planned(
            command, wish, tell, str(template), search.Found(micro_batch, len(sizes), micro_batch, None), reading, sizes, budget, started, (), searched=False
        )


@contextmanager
def _child(
    where: Source | str | None,
    wish: Wish,
    device: str,
    progress: Progress | None,
    said: Callable[[str], None] | None,
    limits: Limits | None = None,
) -> Iterator[tuple[Child, Teller, str]]:
    origin = where if isinstance(where, Source) else source(where)
    tell = Teller(progress)
    with Child(origin, device, limits or wish.limits, say=tell.phase, said=said) as child:
        yield child, tell, origin.label


def known(given: dict[str, Any], verb: Callable[..., Any]) -> None:
    """Raises `UsageError` for a keyword that neither `verb` nor `Job` has, with the one that was probably meant."""
    own = [name for name, each in inspect.signature(verb).parameters.items() if each.kind is each.KEYWORD_ONLY]
    names = [*own, *(each.name for each in fields(Job) if each.kw_only)]
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            raise UsageError(f"{verb.__name__}() has no keyword {name!r}" + (f": did you mean {near[0]!r}?" if near else f"; it has {', '.join(names)}"))


def _group(jobs: Sequence[Job]) -> Any:
    """The ranks that a model's engine carries gradients across; None for all there are."""
    from autoaccum import engines

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
    from autoaccum import engines

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
