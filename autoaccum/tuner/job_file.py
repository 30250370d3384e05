"""Tuning of a job that a file builds, in a child process."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

from autoaccum import devices
from autoaccum.distributed import launched
from autoaccum.errors import AutoaccumError, JobFailed, NothingFits, UsageError
from autoaccum.plan import Plan, arithmetic, window_led_by, window_notation
from autoaccum.probe import COMPARED_SAMPLES, Child, Equivalence, Limits, Progress, Request, refusals, search
from autoaccum.tuner import changes
from autoaccum.tuner.assembly import assemble_plan
from autoaccum.tuner.one_device import reading_cache, refuse_throughput_over_ranks, tune_one_device, unlimited
from autoaccum.tuner.trial_log import TrialLog
from autoaccum.window import Source, parse_source

_RANKS_SECONDS = 60


def tune_source(
    where: Source | str | None,
    request: Request,
    *,
    device: str = "auto",
    cache: bool = False,
    progress: Progress | None = None,
    on_output: Callable[[str], None] | None = None,
) -> Plan:
    """Tunes a job that a file builds, in a child process. The options are those of `tune`.

    on_output: called with the text that the job prints.
    """
    origin = where if isinstance(where, Source) else parse_source(where)
    refuse_throughput_over_ranks(request, launched() is not None)
    if launched() is not None:
        return _tune_all_ranks(origin, request, device, progress, on_output)
    with _child(origin, request, device, progress, on_output) as (child, trials, label):
        return tune_one_device(child, request, trials, label, (), reading_cache(child, label, origin) if cache else None)


def _tune_all_ranks(where: Source | str | None, request: Request, device: str, progress: Progress | None, on_output: Callable[[str], None] | None) -> Plan:
    """Tunes on every rank, each with its own child process, on the device of its local rank."""
    import torch.distributed as dist

    from autoaccum.distributed import ranks
    from autoaccum.tuner import all_ranks

    launch = launched()
    assert launch is not None
    if device.startswith("virtual:"):
        raise UsageError("torchrun started several ranks, and a simulated card has none: for cards that are not here use autoaccum fleet")
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=_RANKS_SECONDS))
    except (ValueError, RuntimeError) as error:
        raise UsageError(
            f"the environment has RANK={launch.rank} and WORLD_SIZE={launch.world_size}, and the other ranks did not come within {_RANKS_SECONDS} s "
            f"({str(error).splitlines()[0][:200]}): unset RANK and WORLD_SIZE for one process, or start all with torchrun"
        ) from error
    others = ranks.here()
    assert others is not None  # torchrun started several ranks
    labels = devices.here()
    wanted = (
        f"cuda:{launch.local_rank % sum(name.startswith('cuda') for name in labels)}" if device in ("auto", "cuda") and labels[0].startswith("cuda") else device
    )
    facts = devices.get(labels[0] if wanted == "auto" else wanted).facts
    try:
        limits, shared = all_ranks.shared_limits(request, others, (facts.kind, facts.uuid, facts.index), buckets=True)
        with _child(where, request, facts.label, progress, on_output, limits) as (child, trials, label):
            plan = all_ranks.tune_all_ranks(child, request, trials, label, others, shared)
        dist.barrier()  # a rank that leaves while others are still connected may be aborted by gloo
        return plan
    finally:
        dist.destroy_process_group()


def tune_changed(
    where: Source | str | None,
    request: Request,
    unchanged: Plan | None,
    *,
    device: str = "auto",
    progress: Progress | None = None,
    on_output: Callable[[str], None] | None = None,
) -> tuple[changes.ChangedPlan, ...]:
    """Tunes the job with each set of changes that it can have, on the device that is here; the quickest first, those that do not fit last.

    unchanged: the plan of the job as it is; None if nothing fits. Weights packed in four bits are left out: packing them would lose their values.
    """
    origin = where if isinstance(where, Source) else parse_source(where)
    rate = None if unchanged is None else unchanged.samples_per_second
    found: list[changes.ChangedPlan] = []
    refused: dict[str, str] = {}  # by change: why the job cannot have it
    over: dict[tuple[str, ...], float] = {}  # by changes: the bytes above the budget, negative if it fits, as far as they are known

    def tried(wanted: tuple[str, ...]) -> None:
        try:
            plan = tune_source(replace(origin, changes=wanted), request, device=device, progress=progress, on_output=on_output)
        except UsageError as error:  # the job has it already, or cannot have it
            if len(wanted) == 1:
                refused[wanted[0]] = str(error)
        except AutoaccumError as error:
            found.append(changes.ChangedPlan(wanted, None, error="" if isinstance(error, NothingFits) else str(error)[:200]))
            if isinstance(error, NothingFits) and error.needs_bytes is not None:
                over[wanted] = float(max(error.needs_bytes - error.budget_bytes, 1))
        else:
            found.append(changes.ChangedPlan(wanted, plan, plan.samples_per_second / rate if plan.samples_per_second and rate else None))
            over[wanted] = float(min((plan.peak_bytes or 0) - plan.budget_bytes, -1))

    def excess(percent: int) -> float:
        wanted = (*least, changes.of_length(percent))
        tried(wanted)
        return over.get(wanted, math.inf)

    for wanted in changes.ALONE:
        tried(wanted)
    for wanted in changes.together(refused):
        if "nf4" not in wanted:
            tried(wanted)
    whole = [row for row in found if "half-length" not in row.changes]
    if unchanged is None and "half-length" not in refused and all(row.plan is None for row in whole):
        # Of those whose needs are not known, the one with the most changes.
        least = min((row.changes for row in whole if not row.error), key=lambda names: (over.get(names, math.inf), -len(names)), default=())
        before = len(found)
        changes.longest(excess, whole=over.get(least, math.inf), half=over.get((*least, "half-length")))
        looked = found[before:]
        fitting = [row for row in looked if row.plan is not None]  # ever longer ones
        found[before:] = fitting[-1:] or [row for row in looked if row.changes == min((row.changes for row in looked), key=changes.part)]
    return tuple(sorted(found, key=lambda row: (row.plan is None, -(row.plan.samples_per_second or 0.0) if row.plan else 0.0)))


def check_source(
    where: Source | str | None,
    micro_batch: int,
    request: Request,
    *,
    device: str = "auto",
    windows: int = 2,
    progress: Progress | None = None,
    on_output: Callable[[str], None] | None = None,
) -> Plan:
    """Runs the whole window with one given micro-batch `windows` times. Raises `OutOfMemory` with the missing memory if it does not fit."""
    if not 1 <= micro_batch <= request.samples:
        raise UsageError(f"a micro-batch of {micro_batch} for a target batch of {request.samples}: give between 1 and {request.samples}")
    if request.equal and request.samples % micro_batch:
        near = [size for size in arithmetic.candidate_sizes(request.samples, equal=True) if size <= micro_batch][-1]
        raise UsageError(f"{micro_batch} does not divide a target batch of {request.samples}: {near} does, or leave --equal out")
    with _child(where, request, device, progress, on_output) as (child, trials, label):
        started = time.monotonic()
        budget = refusals.enough(child.budget())
        sizes = arithmetic.micro_batches(request.samples, math.ceil(request.samples / micro_batch))
        norms = child.subject().batch_norms
        if sizes[0] < micro_batch:
            # The user asked for this size, so it runs as given. The last micro-batch of the window is smaller.
            count, rest = divmod(request.samples, micro_batch)
            sizes = (micro_batch,) * count + ((rest,) if rest else ())
            if norms and rest == 1:
                sizes = window_led_by(request.samples, micro_batch)
        if norms and min(sizes) < 2:
            raise UsageError(f"BatchNorm layer {norms[0]!r} needs micro-batches of at least 2 samples, and {window_notation(sizes)} leaves one alone")
        reading = trials.measure(child, sizes, full=True, windows=windows)
        if not reading.fits:
            raise refusals.too_big(reading, sizes, unlimited(child, trials, reading, sizes, budget), budget)
        result = search.SearchResult(micro_batch, len(sizes), micro_batch, None)
        return assemble_plan(child, request, trials, label, result, reading, sizes, budget, started, (), searched=False)


def compare_source(where: Source | str | None, request: Request, *, device: str = "auto", on_output: Callable[[str], None] | None = None) -> Equivalence:
    """Compares the gradient of a split batch with that of the whole batch, in a child process. Raises `JobFailed` if the job fails."""
    with _child(where, request, device, None, on_output) as (child, _, _):
        equivalence = child.compare(COMPARED_SAMPLES)
        if equivalence is None:
            raise JobFailed("the job's process ended, or took longer than --timeout, while a few samples were compared")
        return equivalence


@contextmanager
def _child(
    where: Source | str | None,
    request: Request,
    device: str,
    progress: Progress | None,
    on_output: Callable[[str], None] | None,
    limits: Limits | None = None,
) -> Iterator[tuple[Child, TrialLog, str]]:
    origin = where if isinstance(where, Source) else parse_source(where)
    trials = TrialLog(progress)
    with Child(origin, device, limits or request.limits, on_phase=trials.phase, on_output=on_output) as child:
        yield child, trials, origin.label
