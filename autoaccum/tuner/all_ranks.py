"""Tuning over several ranks: all ranks run their trials at the same time, each on its own device, and make one plan.

Each rank measures the largest micro-batch that its device holds and the time of its windows. The ranks exchange these
figures, and each computes the same shares from them. Each rank then confirms its own share with a run. If a share does not
fit, all ranks compute the shares again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

from autoaccum import units
from autoaccum.devices import Budget, drift
from autoaccum.distributed import Fleet, Ranks, Timing, alike, equal_share, host
from autoaccum.errors import NothingFits, RanksDisagree, UsageError
from autoaccum.plan import Plan, arithmetic
from autoaccum.probe import Limits, Reading, Rehearser, Request, refusals, search
from autoaccum.tuner.assembly import assemble_plan
from autoaccum.tuner.eval_batch import largest_evaluation
from autoaccum.tuner.trial_log import TrialLog
from autoaccum.units import in_words

Made = TypeVar("Made")
_SOON_S = 0.5


def shared_limits(request: Request, ranks: Ranks, device: tuple[str, str | None, int | None], *, buckets: bool) -> tuple[Limits, tuple[str, ...]]:
    """The limits of trials on a device that other ranks may use too, and warnings for the plan.

    device: kind, UUID and index. buckets: True if the model is not wrapped in DistributedDataParallel yet. The memory of its
    gradient buckets must then stay free.
    Raises `RanksDisagree` if the ranks have different requests.
    """
    ranks.same("target_batch", request.target_batch)
    ranks.same("target_tokens", request.target_tokens)
    ranks.same("equal, lockstep and max_micro_batch", (request.equal, request.lockstep, request.max_micro_batch))
    places = ranks.gathered((host(), device[0], device[1] or device[2]), "comparing devices")
    sharing = [rank for rank, place in enumerate(places) if place == places[ranks.rank]]
    messages: tuple[str, ...] = ()
    if len(sharing) > 1:
        memory = "this machine's memory" if device[0] == "cpu" else "one GPU"
        messages = (f"{units.ranks_in_words(sharing)} share {memory}: each may have one part in {len(sharing)} of what is free",)
    return replace(request.limits, sharing_ranks=len(sharing), buckets=buckets), messages


def tune_all_ranks(rehearsal: Rehearser, request: Request, trials: TrialLog, label: str, ranks: Ranks, remarked: Sequence[str]) -> Plan:
    """Tunes on all ranks at the same time, as `tune_one_device` does on one; returns this rank's view of the one plan.

    remarked: further warnings.
    Raises `NothingFits` on every rank if no rank can hold a sample, `RanksDisagree` if another rank failed, and the
    exceptions of this rank's own job.
    """
    started = time.monotonic()
    if request.target_tokens is not None and (request.equal or request.lockstep):
        raise UsageError(
            "target_tokens over ranks shares windows out by tokens, so ranks run unlike numbers of micro-batches: leave equal and lockstep out, or give target_batch"
        )
    request = request.in_samples(rehearsal.sample_tokens)
    ranks.same("the tokens of the longest sample", request.sample_tokens)
    target, subject = request.samples, rehearsal.subject()
    ranks.same("the model, its optimizer and its settings", subject.fingerprint)
    smallest = 2 if subject.batch_norms else 1
    if request.equal:
        equal_share(target, ranks.world_size)  # raises before the first trial
    first_budget = _with_all(ranks, "reading its memory", rehearsal.budget)
    most, refused = _with_all(ranks, "looking for its largest micro-batch", lambda: _largest_micro_batch(rehearsal, request, trials, first_budget, smallest))
    most, timings = _timed(ranks, rehearsal, trials, most, smallest)
    budget, confirmed = first_budget, {}
    while True:
        curves = alike(ranks.gathered((subject.device.name, most, timings), "planning"))
        if not any(curve.most for curve in curves):
            raise _nothing_fits(refused, budget, trials)
        try:
            fleet = Fleet.planned(curves, target, equal=request.equal, lockstep=request.lockstep, pairs=smallest > 1)
        except NothingFits as error:
            prefix = f"BatchNorm layer {subject.batch_norms[0]!r}: " if subject.batch_norms else ""
            raise NothingFits(f"{prefix}{error}", budget_bytes=budget.budget_bytes, trials=trials.readings) from None
        sizes = tuple(size for size in fleet.sizes(ranks.rank, target) if size)
        if sizes and sizes not in confirmed:
            budget, confirmed[sizes] = _with_all(ranks, "confirming its part", partial(_confirmed, rehearsal, trials, sizes))
        else:
            _with_all(ranks, "confirming its part", _do_nothing)
        fits = not sizes or confirmed[sizes].fits
        if all(row[0] for row in ranks.table([fits], "confirming the plan")):
            break
        if not fits:
            trials.refused[sizes[0]] = refused = confirmed[sizes]
            below = [size for size in arithmetic.sizes_over_ranks(target, smallest=smallest, most=request.max_micro_batch) if size < sizes[0]]
            most = max(below, default=0)
    seconds = confirmed[sizes].window_seconds if sizes else None
    eval_batch = None
    if request.evaluate:
        evaluated = _with_all(ranks, "looking for its batch of evaluation", partial(largest_evaluation, rehearsal, trials, budget, request.max_eval_batch))
        smallest_of_all = min(ranks.gathered(0 if evaluated is None else evaluated.micro_batch, "comparing evaluations"))
        eval_batch = smallest_of_all or None
    slowest = max(row[0] for row in ranks.table([seconds or 0.0], "comparing speeds"))
    messages = [*remarked, *_share_warnings(fleet), *drift(first_budget, budget)]
    if request.evaluate and eval_batch is None:
        messages.append("evaluation does not fit on every rank, not even of one sample, so there is no eval_batch")
    result = search.SearchResult(max(sizes, default=0), len(sizes), most, None)
    plan = _with_all(
        ranks,
        "writing its plan",
        lambda: assemble_plan(rehearsal, request, trials, label, result, confirmed.get(sizes), sizes, budget, started, tuple(messages), searched=False),
    )
    return replace(
        plan,
        share=sum(sizes),
        shares=fleet.shares,
        rank=ranks.rank,
        world_size=ranks.world_size,
        fleet=fleet,
        eval_batch=eval_batch,
        samples_per_second=target / slowest if slowest else None,
    )


def _with_all(ranks: Ranks, doing: str, work: Callable[[], Made]) -> Made:
    """Runs this rank's part of a step that all ranks do, and returns its result.

    If it fails on one rank, it fails on all. That rank raises its own error; the others raise `RanksDisagree` with its number.
    """
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:
        failure = error
    failed = [
        (rank, message) for rank, message in enumerate(ranks.gathered("" if failure is None else f"{type(failure).__name__}: {failure}", doing)) if message
    ]
    if failure is not None:
        raise failure
    if failed:
        raise RanksDisagree(f"rank {failed[0][0]} failed while {doing}: {failed[0][1]}")
    return result


def _do_nothing() -> None: ...


def _largest_micro_batch(rehearsal: Rehearser, request: Request, trials: TrialLog, budget: Budget, smallest: int) -> tuple[int, Reading | None]:
    """The largest micro-batch that fits on this rank (0 if none fits), and the smallest reading that does not fit (None without one).

    Gradients are resident in every trial, because the number of micro-batches in this rank's share is not known yet.
    """
    candidates = arithmetic.sizes_over_ranks(request.samples, smallest=smallest, most=request.max_micro_batch)
    if budget.budget_bytes <= 0 or not candidates:
        return 0, None

    def fits(micro_batch: int, steps: int) -> Reading:
        return trials.known.get((micro_batch, True)) or trials.measure(rehearsal, (micro_batch, micro_batch))

    result = search.largest(
        fits,
        2 * candidates[-1],
        candidates,
        budget_bytes=lambda: budget.budget_bytes,
        gradient_bytes=rehearsal.subject().gradient_bytes,
        daring=rehearsal.enforces,
    )
    return result.micro_batch, min((reading for reading in trials.readings if not reading.fits), key=lambda reading: reading.micro_batch, default=None)


def _timed(ranks: Ranks, rehearsal: Rehearser, trials: TrialLog, most: int, smallest: int) -> tuple[int, tuple[Timing, ...]]:
    """Times windows of this rank while all ranks run theirs, as in training.

    Returns the largest micro-batch, which is smaller than `most` if a run did not fit, and the timings.
    """
    half = max(most // 2, smallest)
    shortest: dict[tuple[int, ...], float] = {}
    quick = True
    # Short windows are measured three times. If the times vary, the shortest is the closest to the rank's own time.
    for sizes in (*((most,) * 2, (half,) * 2, (half,) * 4, (most,) * 2), *(((most,) * 2, (half,) * 2, (half,) * 4) * 2)):
        wanted = most and max(sizes) <= most and (sizes not in shortest or quick or sizes == (most,) * 2)
        reading = _with_all(ranks, "timing itself", partial(trials.measure, rehearsal, sizes, full=True) if wanted else _do_nothing)
        if reading is None:
            continue
        if reading.fits and reading.window_seconds:
            shortest[sizes] = min(reading.window_seconds, shortest.get(sizes, reading.window_seconds))
            quick = quick and reading.window_seconds < _SOON_S
        elif sizes[0] == most:
            most = half if half < most else 0  # two windows in a row do not fit
    return most, tuple((len(sizes), sum(sizes), seconds) for sizes, seconds in shortest.items() if max(sizes) <= most)


def _confirmed(rehearsal: Rehearser, trials: TrialLog, sizes: tuple[int, ...]) -> tuple[Budget, Reading]:
    if rehearsal.subject().device.kind == "cpu":
        rehearsal.fresh()
    return refusals.enough(rehearsal.budget()), trials.measure(rehearsal, sizes, full=True)


def _nothing_fits(refused: Reading | None, budget: Budget, trials: TrialLog) -> NothingFits:
    if refused is None:
        return NothingFits(f"no rank has memory to train with; this one has {in_words(max(budget.budget_bytes, 0))}", budget_bytes=budget.budget_bytes)
    error = refusals.nothing_fits(refused.micro_batch, trials.readings, None, budget)
    return NothingFits(f"on no rank anything fits; on this one: {error}", budget_bytes=budget.budget_bytes, trials=error.trials)


def _share_warnings(fleet: Fleet) -> list[str]:
    too_small = [rank for rank, curve in enumerate(fleet.curves) if not curve.most]
    idle = [rank for rank, share in enumerate(fleet.shares) if not share and rank not in too_small]
    messages = []
    if too_small:
        messages.append(f"{units.ranks_in_words(too_small)} cannot hold one sample: no share there, and the others carry all")
    if idle and fleet.target < len(fleet.shares):
        messages.append(f"{fleet.target} samples are fewer than the {len(fleet.shares)} ranks: no share for {units.ranks_in_words(idle)}")
    elif idle:
        messages.append(f"{units.ranks_in_words(idle)} would only slow the job down, and no share is there: leave {'it' if len(idle) == 1 else 'them'} out")
    return messages
