"""The line over several ranks: each rehearses on its own device at the same moments, and all come to one plan.

Every rank finds the most that its device holds and how long it takes; all tell all; each computes the same shares from
that; each confirms its own; and where one of them does not hold, all compute again.
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
from autoaccum.errors import NothingFits, RanksDisagree
from autoaccum.plan import Plan, arithmetic
from autoaccum.probe import Limits, Reading, Rehearser, Request, refusals, search
from autoaccum.tuner.assembly import assemble_plan
from autoaccum.tuner.trial_log import TrialLog
from autoaccum.units import in_words

Made = TypeVar("Made")
_SOON_S = 0.5


def shared_limits(request: Request, ranks: Ranks, device: tuple[str, str | None, int | None], *, buckets: bool) -> tuple[Limits, tuple[str, ...]]:
    """What trials are allowed on a device that other ranks may use, too, and what is to be said of it.

    device: kind, uuid and index. buckets: whether the gradient buckets of DistributedDataParallel are still to come.
    """
    ranks.same("target_batch", request.target_batch)
    ranks.same("equal, lockstep and max_micro_batch", (request.equal, request.lockstep, request.max_micro_batch))
    everyone = ranks.gathered((host(), device[0], device[1] or device[2]), "comparing devices")
    sharing = [rank for rank, each in enumerate(everyone) if each == everyone[ranks.rank]]
    messages: tuple[str, ...] = ()
    if len(sharing) > 1:
        where = "this machine's memory" if device[0] == "cpu" else "one GPU"
        messages = (f"{units.ranks_in_words(sharing)} share {where}: each may have one part in {len(sharing)} of what is free",)
    return replace(request.limits, sharing_ranks=len(sharing), buckets=buckets), messages


def tune_all_ranks(rehearsal: Rehearser, request: Request, trials: TrialLog, label: str, ranks: Ranks, remarked: Sequence[str]) -> Plan:
    """As `line.found_for`, on every rank at once; returns this rank's view of the one plan.

    Raises `NothingFits` on every rank where none can hold a sample, `RanksDisagree` where another rank failed, and what
    this rank's own job raises.
    """
    started = time.monotonic()
    target, subject = request.target_batch, rehearsal.subject()
    ranks.same("the model, its optimizer and its settings", subject.fingerprint)
    smallest = 2 if subject.batch_norms else 1
    if request.equal:
        equal_share(target, ranks.world_size)  # before anything is rehearsed
    first_budget = _with_all(ranks, "reading its memory", rehearsal.budget)
    most, refused = _with_all(ranks, "looking for its largest micro-batch", lambda: _most(rehearsal, request, trials, first_budget, smallest))
    most, timings = _timed(ranks, rehearsal, trials, most, smallest)
    budget, confirmed = first_budget, {}
    while True:
        curves = alike(ranks.gathered((subject.device.name, most, timings), "planning"))
        if not any(each.most for each in curves):
            raise _nothing_fits(refused, budget, trials)
        try:
            fleet = Fleet.planned(curves, target, equal=request.equal, lockstep=request.lockstep, pairs=smallest > 1)
        except NothingFits as nothing:
            named = f"BatchNorm layer {subject.batch_norms[0]!r}: " if subject.batch_norms else ""
            raise NothingFits(f"{named}{nothing}", budget_bytes=budget.budget_bytes, trials=trials.readings) from None
        sizes = tuple(size for size in fleet.sizes(ranks.rank, target) if size)
        if sizes and sizes not in confirmed:
            budget, confirmed[sizes] = _with_all(ranks, "confirming its part", partial(_confirmed, rehearsal, trials, sizes))
        else:
            _with_all(ranks, "confirming its part", _nothing)
        fits = not sizes or confirmed[sizes].fits
        if all(row[0] for row in ranks.table([fits], "confirming the plan")):
            break
        if not fits:
            trials.refused[sizes[0]] = refused = confirmed[sizes]
            below = [size for size in _worth_trying(target, request, smallest) if size < sizes[0]]
            most = max(below, default=0)
    seconds = confirmed[sizes].window_seconds if sizes else None
    slowest = max(row[0] for row in ranks.table([seconds or 0.0], "comparing speeds"))
    messages = [*remarked, *_said(fleet), *drift(first_budget, budget)]
    found = search.SearchResult(max(sizes, default=0), len(sizes), most, None)
    own = _with_all(
        ranks,
        "writing its plan",
        lambda: assemble_plan(rehearsal, request, trials, label, found, confirmed.get(sizes), sizes, budget, started, tuple(messages), searched=False),
    )
    return replace(
        own,
        share=sum(sizes),
        shares=fleet.shares,
        rank=ranks.rank,
        world_size=ranks.world_size,
        fleet=fleet,
        samples_per_second=target / slowest if slowest else None,
    )


def _with_all(ranks: Ranks, doing: str, own: Callable[[], Made]) -> Made:
    """This rank's own part of something that all do. If it fails on one, all end: that one with its error, the others with who it was."""
    failure: Exception | None = None
    try:
        made = own()
    except Exception as error:
        failure = error
    failed = [(rank, each) for rank, each in enumerate(ranks.gathered("" if failure is None else f"{type(failure).__name__}: {failure}", doing)) if each]
    if failure is not None:
        raise failure
    if failed:
        raise RanksDisagree(f"rank {failed[0][0]} failed while {doing}: {failed[0][1]}")
    return made


def _worth_trying(target: int, request: Request, smallest: int) -> list[int]:
    """Micro-batches up to the target, ascending: all small ones, then about 6 % apart, and those that save a step."""
    top = min(target, request.max_micro_batch or target)
    found = set(arithmetic.candidate_sizes(target, smallest=smallest, most=top))
    size = smallest
    while size <= top:
        found.add(size)
        size += max(1, size // 16)
    return sorted(found | {top} if top >= smallest else found)


def _nothing() -> None: ...


def _most(rehearsal: Rehearser, request: Request, trials: TrialLog, budget: Budget, smallest: int) -> tuple[int, Reading | None]:
    """The largest micro-batch that fits here, 0 where not even the smallest does, and the smallest reading that was refused.

    Always with gradients resident: how many micro-batches this rank's share will have is not known yet.
    """
    candidates = _worth_trying(request.target_batch, request, smallest)
    if budget.budget_bytes <= 0 or not candidates:
        return 0, None

    def fits(micro_batch: int, steps: int) -> Reading:
        return trials.known.get((micro_batch, True)) or trials.measure(rehearsal, (micro_batch, micro_batch))

    found = search.largest(
        fits,
        2 * candidates[-1],
        candidates,
        budget_bytes=lambda: budget.budget_bytes,
        gradient_bytes=rehearsal.subject().gradient_bytes,
        daring=rehearsal.enforces,
    )
    return found.micro_batch, min((each for each in trials.readings if not each.fits), key=lambda each: each.micro_batch, default=None)


def _timed(ranks: Ranks, rehearsal: Rehearser, trials: TrialLog, most: int, smallest: int) -> tuple[int, tuple[Timing, ...]]:
    """How long windows of this rank take, run by all ranks at the same moments, as they will train; and the most, if it turned out to be less."""
    half = max(most // 2, smallest)
    least: dict[tuple[int, ...], float] = {}
    quick = True
    # What is over soon is measured three times: of times that vary, the least is the nearest to the rank's own.
    for sizes in (*((most,) * 2, (half,) * 2, (half,) * 4, (most,) * 2), *(((most,) * 2, (half,) * 2, (half,) * 4) * 2)):
        wanted = most and max(sizes) <= most and (sizes not in least or quick or sizes == (most,) * 2)
        reading = _with_all(ranks, "timing itself", partial(trials.measure, rehearsal, sizes, full=True) if wanted else _nothing)
        if reading is None:
            continue
        if reading.fits and reading.window_seconds:
            least[sizes] = min(reading.window_seconds, least.get(sizes, reading.window_seconds))
            quick = quick and reading.window_seconds < _SOON_S
        elif sizes[0] == most:
            most = half if half < most else 0  # twice in a row it did not fit
    return most, tuple((len(sizes), sum(sizes), seconds) for sizes, seconds in least.items() if max(sizes) <= most)


def _confirmed(rehearsal: Rehearser, trials: TrialLog, sizes: tuple[int, ...]) -> tuple[Budget, Reading]:
    if rehearsal.subject().device.kind == "cpu":
        rehearsal.fresh()
    return refusals.enough(rehearsal.budget()), trials.measure(rehearsal, sizes, full=True)


def _nothing_fits(refused: Reading | None, budget: Budget, trials: TrialLog) -> NothingFits:
    if refused is None:
        return NothingFits(f"no rank has memory to train with; this one has {in_words(max(budget.budget_bytes, 0))}", budget_bytes=budget.budget_bytes)
    own = refusals.nothing_fits(refused.micro_batch, trials.readings, None, budget)
    return NothingFits(f"on no rank anything fits; on this one: {own}", budget_bytes=budget.budget_bytes, trials=own.trials)


def _said(fleet: Fleet) -> list[str]:
    out = [rank for rank, curve in enumerate(fleet.curves) if not curve.most]
    idle = [rank for rank, share in enumerate(fleet.shares) if not share and rank not in out]
    messages = []
    if out:
        messages.append(f"{units.ranks_in_words(out)} cannot hold one sample: no share there, and the others carry all")
    if idle and fleet.target < len(fleet.shares):
        messages.append(f"{fleet.target} samples are fewer than the {len(fleet.shares)} ranks: no share for {units.ranks_in_words(idle)}")
    elif idle:
        messages.append(f"{units.ranks_in_words(idle)} would only slow the job down, and no share is there: leave {'it' if len(idle) == 1 else 'them'} out")
    return messages
