"""Tuning a job that a file builds, in a child process."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from autoaccum import devices
from autoaccum.distributed import launched
from autoaccum.errors import JobFailed, UsageError
from autoaccum.plan import Plan, arithmetic, window_led_by, window_notation
from autoaccum.probe import COMPARED_SAMPLES, Child, Equivalence, Limits, Progress, Request, refusals, search
from autoaccum.tuner.assembly import assemble_plan
from autoaccum.tuner.one_device import reading_cache, refuse_throughput_over_ranks, tune_one_device, unlimited
from autoaccum.tuner.trial_log import TrialLog
from autoaccum.window import Source, parse_source


def tune_source(
    where: Source | str | None,
    request: Request,
    *,
    device: str = "auto",
    cache: bool = False,
    progress: Progress | None = None,
    on_output: Callable[[str], None] | None = None,
) -> Plan:
    """As `tune`, for a job that a file builds, in a child process of its own. `said` gets what the job prints."""
    origin = where if isinstance(where, Source) else parse_source(where)
    refuse_throughput_over_ranks(request, launched() is not None)
    if launched() is not None:
        return _tuned_with_ranks(origin, request, device, progress, on_output)
    with _child(origin, request, device, progress, on_output) as (child, trials, label):
        return tune_one_device(child, request, trials, label, (), reading_cache(child, label, origin) if cache else None)


def _tuned_with_ranks(where: Source | str | None, request: Request, device: str, progress: Progress | None, on_output: Callable[[str], None] | None) -> Plan:
    """Every rank with a child of its own, on the device of its local rank."""
    import torch.distributed as dist

    from autoaccum.distributed import ranks
    from autoaccum.tuner import all_ranks

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
        limits, shared = all_ranks.shared_limits(request, others, (facts.kind, facts.uuid, facts.index), buckets=True)
        with _child(where, request, facts.label, progress, on_output, limits) as (child, trials, label):
            found = all_ranks.tune_all_ranks(child, request, trials, label, others, shared)
        dist.barrier()  # a rank that leaves while others are still connected may be aborted by gloo
        return found
    finally:
        dist.destroy_process_group()


def check_source(
    where: Source | str | None,
    micro_batch: int,
    request: Request,
    *,
    device: str = "auto",
    progress: Progress | None = None,
    on_output: Callable[[str], None] | None = None,
) -> Plan:
    """Rehearses one given micro-batch, the whole window twice. Raises `OutOfMemory` with by how much it does not fit."""
    if not 1 <= micro_batch <= request.target_batch:
        raise UsageError(f"a micro-batch of {micro_batch} for a target batch of {request.target_batch}: give between 1 and {request.target_batch}")
    if request.equal and request.target_batch % micro_batch:
        near = [size for size in arithmetic.candidate_sizes(request.target_batch, equal=True) if size <= micro_batch][-1]
        raise UsageError(f"{micro_batch} does not divide a target batch of {request.target_batch}: {near} does, or leave --equal out")
    with _child(where, request, device, progress, on_output) as (child, trials, label):
        started = time.monotonic()
        budget = refusals.enough(child.budget())
        sizes = arithmetic.micro_batches(request.target_batch, math.ceil(request.target_batch / micro_batch))
        norms = child.subject().batch_norms
        if sizes[0] < micro_batch:
            # The size itself was asked for, so it is run as given, with the rest of the window smaller.
            whole, rest = divmod(request.target_batch, micro_batch)
            sizes = (micro_batch,) * whole + ((rest,) if rest else ())
            if norms and rest == 1:
                sizes = window_led_by(request.target_batch, micro_batch)
        if norms and min(sizes) < 2:
            raise UsageError(f"BatchNorm layer {norms[0]!r} needs micro-batches of at least 2 samples, and {window_notation(sizes)} leaves one alone")
        reading = trials.measure(child, sizes, full=True)
        if not reading.fits:
            raise refusals.too_big(reading, sizes, unlimited(child, trials, reading, sizes, budget), budget)
        found = search.SearchResult(micro_batch, len(sizes), micro_batch, None)
        return assemble_plan(child, request, trials, label, found, reading, sizes, budget, started, (), searched=False)


def compare_source(where: Source | str | None, request: Request, *, device: str = "auto", on_output: Callable[[str], None] | None = None) -> Equivalence:
    """Whether splitting a batch of the job changes its gradient, in a child process. Raises `JobFailed` where the job fails."""
    with _child(where, request, device, None, on_output) as (child, _, _):
        found = child.compare(COMPARED_SAMPLES)
        if found is None:
            raise JobFailed("the job's process ended, or took longer than --timeout, while a few samples were compared")
        return found


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
