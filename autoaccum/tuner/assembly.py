"""The assembly of a `Plan` from the result of the search and the readings of the trials."""

from __future__ import annotations

import importlib.metadata
import platform
import time

from autoaccum import oom
from autoaccum.command import Command
from autoaccum.devices import ASSUMED_OUTSIDE, Budget, budget_terms
from autoaccum.errors import DeviceError, JobError, JobFailed
from autoaccum.plan import Plan, PlannedDevice, TrialRecord, window_led_by
from autoaccum.probe import COMPARED_SAMPLES, Reading, Rehearser, Request, refusals, search
from autoaccum.tuner.hints import cost_of_equal, hints
from autoaccum.tuner.trial_log import TrialLog
from autoaccum.units import in_words
from autoaccum.version import __version__


def assemble_plan(
    rehearsal: Rehearser,
    request: Request,
    trials: TrialLog,
    label: str,
    found: search.SearchResult,
    confirmed: Reading | None,
    sizes: tuple[int, ...],
    budget: Budget,
    started: float,
    remarked: tuple[str, ...],
    *,
    searched: bool = True,
) -> Plan:
    """Returns the plan of one device.

    found: the result of the search. confirmed: the reading of the confirming run; None for a rank without a share.
    sizes: the micro-batches of one window. budget: the budget of the confirming run.
    started: `time.monotonic()` when tuning began. remarked: further warnings.
    searched: False if the user gave the size; the plan then has no hints.
    """
    subject = rehearsal.subject()
    memory = budget.memory
    most = max(sizes, default=0)
    smallest, for_command, equal_is = 2 if subject.batch_norms else 1, isinstance(rehearsal, Command), "equal=True" if label == "in place" else "--equal"
    if searched and request.equal and request.target_tokens is None:
        costs = cost_of_equal(found, sizes, most_allowed=request.max_micro_batch, smallest=smallest, for_command=for_command, equal_is=equal_is)
        remarked = (*remarked, *costs)
    return Plan(
        target_batch=request.samples,
        micro_batch=most,
        accumulation_steps=len(sizes),
        micro_batches=sizes,
        share=request.samples,
        shares=(request.samples,),
        rank=0,
        world_size=1,
        largest_fit=max((reading.micro_batch for reading in trials.readings if reading.fits and reading.micro_batch not in trials.refused), default=most),
        smallest_refused=min((reading.micro_batch for reading in trials.readings if not reading.fits and reading.micro_batch > most), default=None),
        device=PlannedDevice(subject.device.kind, subject.device.name, subject.device.uuid, memory.total_bytes, memory.free_bytes, subject.device.index),
        shapes=(confirmed.shapes if confirmed is not None else None) or {},
        budget_bytes=budget.budget_bytes,
        peak_bytes=confirmed.peak_bytes if confirmed is not None else None,
        outside_bytes=memory.outside_bytes,
        headroom_bytes=budget.headroom_bytes,
        samples_per_second=request.samples / confirmed.window_seconds if confirmed is not None and confirmed.window_seconds else None,
        trials=tuple(
            TrialRecord(
                reading.micro_batch,
                reading.accumulation_steps,
                reading.outcome,
                reading.phase,
                reading.peak_bytes,
                round(reading.seconds, 4),
                reading.cached,
                reading.full,
                _rate(reading, request.samples),
            )
            for reading in trials.readings
        ),
        objective=request.objective,
        target_tokens=request.target_tokens,
        micro_tokens=most * request.sample_tokens if request.target_tokens is not None else None,
        seconds=round(time.monotonic() - started, 4),
        versions=versions(),
        job_fingerprint=subject.fingerprint,
        job=label,
        allocator=subject.allocator,
        predicted=subject.predicted,
        predicted_refusal=found.predicted_refusal,
        arithmetic=budget_terms(budget),
        warnings=_warnings(rehearsal, request, trials, confirmed, sizes, budget, remarked),
        hints=tuple(
            hints(
                found,
                sizes,
                equal=request.equal,
                smallest=smallest,
                for_command=for_command,
                equal_is=equal_is,
                steady=subject.allocator == "steady malloc",
            )
            if searched and request.target_tokens is None  # hints are about counts of samples
            else ()
        ),
    )


def _warnings(
    rehearsal: Rehearser, request: Request, trials: TrialLog, confirmed: Reading | None, sizes: tuple[int, ...], budget: Budget, remarked: tuple[str, ...]
) -> tuple[str, ...]:
    subject = rehearsal.subject()
    split_warnings = compared(rehearsal, max(sizes)) if sizes else ()
    remarks = dict.fromkeys(remark for reading in trials.readings for remark in reading.remarks)
    messages = [*subject.remarks, *remarked, *trials.remarks, *remarks]
    if subject.batch_norms and len(sizes) > 1:
        messages.append(refusals.norms_see_parts(subject.batch_norms, sizes[0], request.samples))
        if sizes[0] == 2:
            messages.append(
                "an odd last window leaves one sample alone, which BatchNorm may refuse: plan.windows(loader, drop_last=True) leaves that window out"
            )
    messages += [*split_warnings, *_contradiction(trials, compiled=subject.compiled)]
    if confirmed is not None and confirmed.compiled_graphs and len(set(sizes)) > 1:
        messages.append(
            f"torch.compile compiled {confirmed.compiled_graphs} graphs for the micro-batches of {sizes[0]} and {sizes[-1]}: equal=True trains in micro-batches of "
            "one size, which compile once"
        )
    if budget.memory.outside_bytes is None and budget.cap_bytes is not None:
        messages.append(f"nobody said what the driver's context takes of the limit: {in_words(ASSUMED_OUTSIDE)} were assumed")
    return tuple(messages)


def _contradiction(trials: TrialLog, *, compiled: bool) -> list[str]:
    """A sentence if a size was refused for memory although a larger one fitted with as much resident. compiled: whole windows run compiled, others do not."""
    fitted = [reading for reading in trials.readings if reading.fits and reading.accumulation_steps > 1 and not (compiled and reading.full)]
    for refused in trials.readings:
        if refused.outcome not in ("oom", "killed") or refused.full or refused.accumulation_steps == 1:
            continue
        larger = next((reading for reading in fitted if reading.micro_batch > refused.micro_batch), None)
        if larger is not None:
            return [
                f"{refused.micro_batch} ran out of memory in {refused.phase}, and {larger.micro_batch}, which is larger, fitted: the memory was not the same, "
                "or a library failed for another reason; tune again if something else ran"
            ]
    return []


def _rate(reading: Reading, target: int) -> float | None:
    """Samples per second, optimizer step included: over the whole window in a full run, else over its first two micro-batches."""
    if not reading.fits or not reading.window_seconds:
        return None
    return (target if reading.full else sum(window_led_by(target, reading.micro_batch)[:2])) / reading.window_seconds


def compared(rehearsal: Rehearser, largest: int) -> tuple[str, ...]:
    """Compares the gradient of a split batch on a few samples; returns warnings. If the comparison fails, the plan does not change.

    Raises `JobError` if the loss returns a pair whose second part is no count.
    """
    if largest < 2 and not rehearsal.enforces:
        # Two samples at once might not fit, and nothing enforces the budget here.
        return ("whether splitting changes the gradient was not compared, because that takes two samples at once: see autoaccum.equivalence",)
    try:
        equivalence = rehearsal.compare(min(COMPARED_SAMPLES, max(largest, 2)))
    except DeviceError:
        raise
    except Exception as error:
        if oom.is_oom(error) or (isinstance(error, JobFailed) and error.kind in ("OutOfMemoryError", "MemoryError")):
            return ()
        return (f"whether splitting changes the gradient could not be seen: {error.kind if isinstance(error, JobFailed) else type(error).__name__}: {error}",)
    if equivalence is not None and equivalence.cause == "count":
        raise JobError(equivalence.message)  # nothing divided by such a count would be the job's gradient
    if equivalence is not None and equivalence.exact is None and equivalence.cause == "random":
        return (equivalence.message,)
    # `_warnings` reports BatchNorm, with the micro-batch.
    return (equivalence.message,) if equivalence is not None and equivalence.exact is False and equivalence.cause != "batch-norm" else ()


def versions() -> dict[str, str]:
    """The versions of autoaccum, Python and torch."""
    installed = {"autoaccum": __version__, "python": platform.python_version()}
    try:
        installed["torch"] = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        installed["torch"] = "unknown"
    return installed
