"""The plan that training has learned so far."""

from __future__ import annotations

import math
from collections.abc import Sequence

from autoaccum.devices import Budget, Device, budget_terms
from autoaccum.distributed import Fleet
from autoaccum.plan import Plan, PlannedDevice, TrialRecord, arithmetic
from autoaccum.probe import Reading, Request, refusals
from autoaccum.tuner import versions
from autoaccum.units import in_words
from autoaccum.window import Job, batch_norms, fingerprint


def of(
    jobs: Sequence[Job],
    device: Device,
    request: Request,
    budget: Budget,
    micro_batch: int,
    readings: Sequence[Reading],
    *,
    peak_bytes: int | None,
    seconds: float,
    windows: int,
    learning: bool,
    fleet: Fleet | None = None,
    rank: int = 0,
) -> Plan:
    """The plan of micro-batches of at most `micro_batch`. fleet, rank: the ranks that train together, and which this one is; None for one.

    budget: read before the last window. peak_bytes: the largest peak of a window of these micro-batches, or of any window while none has run. windows: those that it was learned in.
    """
    in_tokens, memory = request.target_tokens is not None, budget.memory
    target = max(request.samples, micro_batch) if in_tokens else request.samples
    share = target if fleet is None else fleet.shares[rank]
    steps = math.ceil(share / micro_batch)
    sizes = arithmetic.window_led_by(share, micro_batch) if in_tokens else arithmetic.micro_batches(share, steps) if share else ()
    largest = max(sizes, default=0)
    norms = [name for job in jobs for name in batch_norms(job.model)]
    warnings = (refusals.norms_see_parts(norms, largest, target),) if norms and len(sizes) > 1 else ()
    return Plan(
        target_batch=target,
        micro_batch=largest,
        accumulation_steps=len(sizes),
        micro_batches=sizes,
        share=share,
        shares=(target,) if fleet is None else fleet.shares,
        rank=rank,
        world_size=1 if fleet is None else len(fleet.shares),
        fleet=fleet,
        largest_fit=max((each.micro_batch for each in readings if each.fits), default=largest),
        smallest_refused=min((each.micro_batch for each in readings if not each.fits and each.micro_batch > largest), default=None),
        device=PlannedDevice(device.facts.kind, device.facts.name, device.facts.uuid, memory.total_bytes, memory.free_bytes, device.facts.index),
        shapes={},
        budget_bytes=budget.budget_bytes,
        peak_bytes=peak_bytes,
        outside_bytes=memory.outside_bytes,
        headroom_bytes=budget.headroom_bytes,
        samples_per_second=None,
        trials=tuple(TrialRecord(each.micro_batch, each.accumulation_steps, each.outcome, each.phase, each.peak_bytes, 0.0) for each in readings),
        seconds=round(seconds, 4),
        versions=versions(),
        job_fingerprint=fingerprint(jobs),
        job="in training",
        allocator=device.allocator,
        arithmetic=budget_terms(budget),
        warnings=warnings,
        target_tokens=request.target_tokens,
        micro_tokens=largest * request.sample_tokens if in_tokens else None,
        learning=learning,
        learned_windows=windows,
    )


def settled(plan: Plan) -> str:
    """The line that is logged when nothing more is learned."""
    peak = "" if plan.peak_bytes is None else f", peak {in_words(plan.peak_bytes)} of {in_words(plan.budget_bytes)}"
    return f"learned in {plan.learned_windows} windows: {plan}{peak}"


def step_over_budget(plan: Plan) -> str:
    """The warning if the optimizer's step, whatever the micro-batches, takes more than the budget."""
    return (
        f"the optimizer's step takes {in_words(plan.peak_bytes or 0)}, more than the budget of {in_words(plan.budget_bytes)}, whatever the micro-batch: raise "
        "memory_limit, or take an optimizer that needs less (foreach=False, fused=True where it exists)"
    )
