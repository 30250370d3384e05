"""Tuning on one device: job -> device memory -> trials -> search -> plan.

A trial runs a real window of the job on its device, under an enforced budget, and restores the training state afterwards.
The search runs trials at growing micro-batches and finds the fewest accumulation steps that fit. The whole window then runs
once more to confirm the plan.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from autoaccum.devices import Budget, drift, driver_version
from autoaccum.errors import UsageError
from autoaccum.plan import Plan, arithmetic, window_led_by, window_notation
from autoaccum.probe import Reading, ReadingCache, Rehearser, Request, Subject, refusals, search
from autoaccum.tuner import compiled_sizes, throughput
from autoaccum.tuner.assembly import assemble_plan, versions
from autoaccum.tuner.eval_batch import largest_evaluation
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
    """Returns the plan of one device.

    remarked: further warnings. shelf: the cache of readings. Its earlier readings shorten the search, and it keeps those of this run.
    known, start: as in `search.largest`.
    """
    started = time.monotonic()
    request = request.in_samples(rehearsal.sample_tokens)
    subject = rehearsal.subject()
    first_budget = budget = refusals.enough(rehearsal.budget())
    target = request.samples
    remembered = [] if shelf is None else shelf.known(target, budget.budget_bytes)
    # Readings of other targets help the search. The plan lists only readings of its own target.
    trials.readings += [
        reading for reading in remembered if reading.micro_batch <= target and (reading.accumulation_steps == 1) == (reading.micro_batch == target)
    ]
    try:
        result, confirmed, sizes, budget = _search(rehearsal, request, trials, subject, budget, shelf, [*remembered, *known], start)
    finally:
        if shelf is not None:
            shelf.keep(trials.readings, target, budget.budget_bytes)
    remarked = (*remarked, *drift(first_budget, rehearsal.budget(), confirmed.peak_bytes))
    evaluated = largest_evaluation(rehearsal, trials, budget, request.max_eval_batch) if request.evaluate else None
    if request.evaluate and evaluated is None:
        remarked = (*remarked, "evaluation does not fit, not even of one sample, so there is no eval_batch")
    plan = assemble_plan(rehearsal, request, trials, label, result, confirmed, sizes, budget, started, remarked)
    return plan if evaluated is None else replace(plan, eval_batch=evaluated.micro_batch, eval_peak_bytes=evaluated.peak_bytes)


def _search(
    rehearsal: Rehearser, request: Request, trials: TrialLog, subject: Subject, budget: Budget, shelf: ReadingCache | None, known: Sequence[Reading], start: int
) -> tuple[search.SearchResult, Reading, tuple[int, ...], Budget]:
    """The result of the search, the reading of the confirming run, the window's micro-batches, and the budget of that run."""
    target = request.samples
    smallest = 2 if subject.batch_norms else 1
    candidates = arithmetic.candidate_sizes(target, smallest=smallest, most=request.max_micro_batch, equal=request.equal, every=request.largest)
    if not candidates:
        raise refusals.nothing_allowed(target, request.max_micro_batch, subject.batch_norms)

    def fits(micro_batch: int, steps: int) -> Reading:
        reading = trials.refused.get(micro_batch) or trials.known.get((micro_batch, steps > 1))
        return reading or trials.measure(rehearsal, window_led_by(target, micro_batch))

    def budget_bytes() -> int:
        return budget.budget_bytes

    allowed = candidates
    while True:
        result = search.largest(
            fits,
            target,
            candidates,
            budget_bytes=budget_bytes,
            gradient_bytes=subject.gradient_bytes,
            daring=rehearsal.enforces,
            start=start,
            known=known,
        )
        if not result.micro_batch and known:
            trials.readings, known = (
                [reading for reading in trials.readings if not reading.cached],
                (),
            )  # a refusal must come from a trial of this run, not from the cache
            continue
        if not result.micro_batch:
            raise nothing_fits(rehearsal, trials, candidates[0], target, budget)
        if subject.predicted and request.largest:
            result = _search_above(rehearsal, trials, candidates, result, target, budget.budget_bytes)
        sizes = arithmetic.micro_batches(target, result.accumulation_steps)
        timed = request.objective == "throughput"
        if len(sizes) == 1 and (target, False) in trials.known and not timed:
            confirmed = trials.known[(target, False)]  # its trial already ran the whole window
            break
        if subject.device.kind == "cpu":
            rehearsal.fresh()  # allocators and libraries keep state of earlier sizes; training starts without it
        budget = refusals.enough(rehearsal.budget())
        confirmed = trials.measure(rehearsal, sizes, full=True, windows=throughput.WINDOWS if timed else 2)
        if confirmed.fits:
            break
        trials.refused[sizes[0]] = confirmed
        if known and shelf is not None:
            # The cached readings were too optimistic, because something changed that the cache does not know. Search again without them.
            shelf.forget()
            trials.readings = [reading for reading in trials.readings if not reading.cached]
            candidates = allowed
        known = ()
        # Smaller sizes remain, and the window in one piece, which holds no gradients, if it was not tried yet.
        candidates = [size for size in candidates if size < sizes[0] or (size == target and (target, False) not in trials.known)]
        if not candidates:
            raise nothing_fits(rehearsal, trials, sizes[0], target, budget)
    if subject.compiled and not subject.predicted and not timed:

        def compiled_window(window: tuple[int, ...]) -> Reading | None:
            try:
                return trials.measure(rehearsal, window, full=True)
            except Exception as error:  # there is a plan already
                said = (str(error).splitlines() or [type(error).__name__])[0][:160]
                trials.remarks.append(f"larger micro-batches were not tried compiled, because {window_notation(window)} failed: {said}")
                return None

        confirmed = compiled_sizes.larger(
            compiled_window,
            confirmed,
            allowed,
            target,
            readings=trials.readings,
            gradient_bytes=subject.gradient_bytes,
            budget_bytes=budget.budget_bytes,
        )
        sizes = arithmetic.micro_batches(target, confirmed.accumulation_steps)
        result = replace(result, micro_batch=sizes[0], accumulation_steps=len(sizes), largest_fit=max(result.largest_fit, sizes[0]))
    if request.objective == "throughput":
        if subject.predicted:
            raise UsageError('objective "throughput" needs a device that is here: a simulated card has no clock')
        smaller = [size for size in allowed if size < sizes[0] and size not in trials.refused]
        if not rehearsal.enforces and len(sizes) == 1 and (confirmed.peak_bytes or 0) + subject.gradient_bytes > budget.budget_bytes:
            smaller = []  # with more than one piece gradients are resident, and nothing stops a window that is too big

        def timed_window(size: int) -> Reading:
            if subject.device.kind == "cpu":
                rehearsal.fresh()
            return trials.measure(rehearsal, arithmetic.micro_batches(target, math.ceil(target / size)), full=True, windows=throughput.WINDOWS)

        confirmed = throughput.fastest(timed_window, smaller, confirmed)
        sizes = arithmetic.micro_batches(target, confirmed.accumulation_steps)
        result = replace(result, micro_batch=sizes[0], accumulation_steps=len(sizes))
    return result, confirmed, sizes, budget


def _search_above(
    rehearsal: Rehearser, trials: TrialLog, candidates: Sequence[int], result: search.SearchResult, target: int, budget_bytes: int
) -> search.SearchResult:
    """Tries the sizes above the search's result in a simulation, where trials cost almost nothing.

    A size can fail although a larger size fits, because of the allocator's segments. The loop ends at the first size whose
    requested bytes alone exceed the budget.
    """
    above = [size for size in candidates if size > result.micro_batch and size not in trials.refused][:512]
    for size in above:
        reading = rehearsal.measure(window_led_by(target, size))
        if reading.fits:
            trials.readings.append(reading)
            trials.known[(size, reading.accumulation_steps > 1)] = reading
            result = replace(result, micro_batch=size, accumulation_steps=math.ceil(target / size), largest_fit=size)
        elif reading.least_bytes is not None and reading.least_bytes > budget_bytes:
            break
    return result


def nothing_fits(rehearsal: Rehearser, trials: TrialLog, micro_batch: int, target: int, budget: Budget) -> Exception:
    """The error for the smallest micro-batch, which does not fit. It names the needed memory if that can be measured safely."""
    sizes = arithmetic.micro_batches(target, math.ceil(target / micro_batch))
    refused = [reading for reading in trials.readings if reading.micro_batch == micro_batch]
    needs = unlimited(rehearsal, trials, refused[-1], sizes, budget)
    return refusals.nothing_fits(micro_batch, trials.readings, needs, budget, half=rehearsal.subject().half)


def unlimited(rehearsal: Rehearser, trials: TrialLog, refused: Reading, sizes: tuple[int, ...], budget: Budget) -> Reading | None:
    """Runs the refused window without the user's limit, to measure the memory that it needs; the device's own limit is still enforced.

    Returns None if there is no user limit, if nothing enforces limits, or if the trial did not end with an out-of-memory or a kill.
    """
    if budget.cap_bytes is None or not rehearsal.enforces or refused.outcome not in ("oom", "killed"):
        return None
    rehearsal.fresh()  # libraries may keep a bad state after an out-of-memory
    return trials.measure(rehearsal, sizes, limited=False)


def refuse_throughput_over_ranks(request: Request, over_ranks: bool) -> None:
    """Raises `UsageError` if several ranks ask for the objective "throughput"."""
    if over_ranks and request.objective == "throughput":
        raise UsageError('objective "throughput" is for one device: over ranks shares are made for the shortest time anyway, so leave it out')


def reading_cache(rehearsal: Rehearser, label: str, origin: Source | None = None) -> ReadingCache | None:
    """The cache of readings of this job on this device; None if its readings are not worth keeping."""
    conditions = rehearsal.conditions()
    if conditions is None:
        return None
    subject, memory = rehearsal.subject(), rehearsal.budget().memory
    about = device_key(subject.device.name, subject.device.kind, memory.total_bytes, subject.allocator)
    if origin is not None:
        about["job"], about["settings"], about["arguments"] = origin.where, repr(sorted(origin.settings.items())), list(origin.argv)
        about["file"] = origin.digest()
    return ReadingCache(label, conditions, about)


def device_key(name: str, kind: str, total_bytes: int, allocator: str) -> dict[str, Any]:
    """What readings depend on beside the job: the device, its driver and allocator, and the versions of libraries."""
    return {
        "device": name,
        "kind": kind,
        "total_bytes": total_bytes,
        "driver": driver_version() if kind == "cuda" else "",
        "allocator": allocator,
        **{library: version for library, version in versions().items() if library != "python"},
    }
