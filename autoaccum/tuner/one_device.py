"""The line itself: job -> device memory -> trials -> search -> plan.

A job is rehearsed on its device in growing micro-batches, each trial the real window under an enforced
budget and undone; the search finds the fewest accumulation steps that fit; the whole window is run twice
to confirm; the plan says so.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from autoaccum.devices import Budget, drift, driver_version
from autoaccum.errors import UsageError
from autoaccum.plan import Plan, arithmetic, window_led_by
from autoaccum.probe import Reading, ReadingCache, Rehearser, Request, Subject, refusals, search
from autoaccum.tuner import throughput
from autoaccum.tuner.assembly import assemble_plan, versions
from autoaccum.tuner.trial_log import TrialLog
from autoaccum.window import Source


def tune_one_device(
    rehearsal: Rehearser,
    request: Request,
    trials: TrialLog,
    label: str,
    remarked: tuple[str, ...],
    shelf: ReadingCache | None = None,
    *,
    known: Sequence[Reading] = (),
    start: int = 1,
) -> Plan:
    """The plan of one device.

    shelf: readings of earlier runs, which shorten the search, and where this one's are kept. known, start: as in `search.largest`.
    """
    started = time.monotonic()
    subject = rehearsal.subject()
    first_budget = budget = refusals.enough(rehearsal.budget())
    target = request.target_batch
    remembered = [] if shelf is None else shelf.known(target, budget.budget_bytes)
    # Sizes of other targets help the search; a plan tells of its own.
    trials.readings += [each for each in remembered if each.micro_batch <= target and (each.accumulation_steps == 1) == (each.micro_batch == target)]
    try:
        found, confirmed, sizes, budget = _searched(rehearsal, request, trials, subject, budget, shelf, [*remembered, *known], start)
    finally:
        if shelf is not None:
            shelf.keep(trials.readings, target, budget.budget_bytes)
    return assemble_plan(rehearsal, request, trials, label, found, confirmed, sizes, budget, started, (*remarked, *drift(first_budget, rehearsal.budget())))


def _searched(
    rehearsal: Rehearser, request: Request, trials: TrialLog, subject: Subject, budget: Budget, shelf: ReadingCache | None, known: Sequence[Reading], start: int
) -> tuple[search.SearchResult, Reading, tuple[int, ...], Budget]:
    """What was found, its confirming run, the window's micro-batches, and the budget that these ran under."""
    target = request.target_batch
    smallest = 2 if subject.batch_norms else 1
    candidates = arithmetic.candidate_sizes(target, smallest=smallest, most=request.max_micro_batch, equal=request.equal, every=request.largest)
    if not candidates:
        raise refusals.nothing_allowed(target, request.max_micro_batch, subject.batch_norms)

    def fits(micro_batch: int, steps: int) -> Reading:
        read = trials.refused.get(micro_batch) or trials.known.get((micro_batch, steps > 1))
        return read or trials.measure(rehearsal, window_led_by(target, micro_batch))

    def budget_bytes() -> int:
        return budget.budget_bytes

    allowed = candidates
    while True:
        found = search.largest(
            fits,
            target,
            candidates,
            budget_bytes=budget_bytes,
            gradient_bytes=subject.gradient_bytes,
            daring=rehearsal.enforces,
            start=start,
            known=known,
        )
        if not found.micro_batch and known:
            trials.readings, known = [each for each in trials.readings if not each.cached], ()  # bad news is not taken from memory
            continue
        if not found.micro_batch:
            raise nothing_fits(rehearsal, trials, candidates[0], target, budget)
        if subject.predicted and request.largest:
            found = _beyond(rehearsal, trials, candidates, found, target, budget.budget_bytes)
        sizes = arithmetic.micro_batches(target, found.accumulation_steps)
        timed = request.objective == "throughput"
        if len(sizes) == 1 and (target, False) in trials.known and not timed:
            confirmed = trials.known[(target, False)]  # its trial was the whole window twice already
            break
        if subject.device.kind == "cpu":
            rehearsal.fresh()  # allocators and libraries remember sizes: confirm as training will start
        budget = refusals.enough(rehearsal.budget())
        confirmed = trials.measure(rehearsal, sizes, full=True, windows=throughput.WINDOWS if timed else 2)
        if confirmed.fits:
            break
        trials.refused[sizes[0]] = confirmed
        if known and shelf is not None:
            # What was remembered promised more than there is: something changed that nobody knew of. Once more, from what is seen now.
            shelf.forget()
            trials.readings = [each for each in trials.readings if not each.cached]
            candidates = allowed
        known = ()
        # Smaller ones are left, and the window in one piece, which holds no gradients, if it was not asked yet.
        candidates = [size for size in candidates if size < sizes[0] or (size == target and (target, False) not in trials.known)]
        if not candidates:
            raise nothing_fits(rehearsal, trials, sizes[0], target, budget)
    if request.objective == "throughput":
        if subject.predicted:
            raise UsageError('objective "throughput" needs a device that is here: a simulated card has no clock')
        smaller = [size for size in allowed if size < sizes[0] and size not in trials.refused]
        if not rehearsal.enforces and len(sizes) == 1 and (confirmed.peak_bytes or 0) + subject.gradient_bytes > budget.budget_bytes:
            smaller = []  # in more than one piece gradients would be resident, and nothing would stop that

        def timed_window(size: int) -> Reading:
            if subject.device.kind == "cpu":
                rehearsal.fresh()
            return trials.measure(rehearsal, arithmetic.micro_batches(target, math.ceil(target / size)), full=True, windows=throughput.WINDOWS)

        confirmed = throughput.fastest(timed_window, smaller, confirmed)
        sizes = arithmetic.micro_batches(target, confirmed.accumulation_steps)
        found = replace(found, micro_batch=sizes[0], accumulation_steps=len(sizes))
    return found, confirmed, sizes, budget


def _beyond(
    rehearsal: Rehearser, trials: TrialLog, candidates: Sequence[int], found: search.SearchResult, target: int, budget_bytes: int
) -> search.SearchResult:
    """Simulated trials cost nothing, so the sizes above the answer are gone through until one takes too much by what it
    holds alone: an allocator's segments make some size fail where a larger one fits."""
    above = [size for size in candidates if size > found.micro_batch and size not in trials.refused][:512]
    for size in above:
        reading = rehearsal.measure(window_led_by(target, size))
        if reading.fits:
            trials.readings.append(reading)
            trials.known[(size, reading.accumulation_steps > 1)] = reading
            found = replace(found, micro_batch=size, accumulation_steps=math.ceil(target / size), largest_fit=size)
        elif reading.least_bytes is not None and reading.least_bytes > budget_bytes:
            break
    return found


def nothing_fits(rehearsal: Rehearser, trials: TrialLog, micro_batch: int, target: int, budget: Budget) -> Exception:
    """The error that even `micro_batch` does not fit, with what it would need, measured where that is safe."""
    sizes = arithmetic.micro_batches(target, math.ceil(target / micro_batch))
    refused = [each for each in trials.readings if each.micro_batch == micro_batch]
    return refusals.nothing_fits(micro_batch, trials.readings, unlimited(rehearsal, trials, refused[-1], sizes, budget), budget)


def unlimited(rehearsal: Rehearser, trials: TrialLog, refused: Reading, sizes: tuple[int, ...], budget: Budget) -> Reading | None:
    """The refused window without the user's limit, for the figure; what the device allows is still enforced."""
    if budget.cap_bytes is None or not rehearsal.enforces or refused.outcome not in ("oom", "killed"):
        return None
    rehearsal.fresh()  # what ran out may have left libraries in a state that remembers it
    return trials.measure(rehearsal, sizes, limited=False)


def refuse_throughput_over_ranks(request: Request, over_ranks: bool) -> None:
    """Raises `UsageError` where several ranks ask for the objective "throughput"."""
    if over_ranks and request.objective == "throughput":
        raise UsageError('objective "throughput" is for one device: over ranks shares are made for the shortest time anyway, so leave it out')


def reading_cache(rehearsal: Rehearser, label: str, origin: Source | None = None) -> ReadingCache | None:
    """What is remembered of this job on this device; None where nothing is worth it."""
    conditions = rehearsal.conditions()
    if conditions is None:
        return None
    subject, memory = rehearsal.subject(), rehearsal.budget().memory
    about: dict[str, Any] = {
        "device": subject.device.name,
        "kind": subject.device.kind,
        "total_bytes": memory.total_bytes,
        "driver": driver_version() if subject.device.kind == "cuda" else "",
        "allocator": subject.allocator,
        **{name: version for name, version in versions().items() if name != "python"},
    }
    if origin is not None:
        about["job"], about["settings"], about["arguments"] = origin.where, repr(sorted(origin.settings.items())), list(origin.argv)
        about["file"] = origin.digest()
    return ReadingCache(label, conditions, about)
