"""From what was found to the plan that the user gets."""

from __future__ import annotations

import importlib.metadata
import platform
import time

from autoaccum import oom
from autoaccum.devices import ASSUMED_OUTSIDE, Budget, budget_terms
from autoaccum.errors import DeviceError, JobFailed
from autoaccum.plan import Plan, PlannedDevice, TrialRecord, window_led_by
from autoaccum.probe import COMPARED_SAMPLES, Command, Reading, Rehearser, Request, search
from autoaccum.tuner.hints import hints
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
    """The plan of one device, of one window's micro-batches `sizes`.

    found: what the search found. confirmed: the confirming run, None for a rank without a share. budget: under which it ran.
    started: `time.monotonic()` when tuning began. remarked: further warnings. searched: False for a size that was given, which gets no hints.
    """
    subject = rehearsal.subject()
    memory = budget.memory
    most = max(sizes, default=0)
    return Plan(
        target_batch=request.target_batch,
        micro_batch=most,
        accumulation_steps=len(sizes),
        micro_batches=sizes,
        share=request.target_batch,
        shares=(request.target_batch,),
        rank=0,
        world_size=1,
        largest_fit=max((each.micro_batch for each in trials.readings if each.fits and each.micro_batch not in trials.refused), default=most),
        smallest_refused=min((each.micro_batch for each in trials.readings if not each.fits and each.micro_batch > most), default=None),
        device=PlannedDevice(subject.device.kind, subject.device.name, subject.device.uuid, memory.total_bytes, memory.free_bytes, subject.device.index),
        shapes=(confirmed.shapes if confirmed is not None else None) or {},
        budget_bytes=budget.budget_bytes,
        peak_bytes=confirmed.peak_bytes if confirmed is not None else None,
        outside_bytes=memory.outside_bytes,
        headroom_bytes=budget.headroom_bytes,
        samples_per_second=request.target_batch / confirmed.window_seconds if confirmed is not None and confirmed.window_seconds else None,
        trials=tuple(
            TrialRecord(
                each.micro_batch,
                each.accumulation_steps,
                each.outcome,
                each.phase,
                each.peak_bytes,
                round(each.seconds, 4),
                each.cached,
                each.full,
                _rate(each, request.target_batch),
            )
            for each in trials.readings
        ),
        objective=request.objective,
        seconds=round(time.monotonic() - started, 4),
        versions=versions(),
        job_fingerprint=subject.fingerprint,
        job=label,
        allocator=subject.allocator,
        predicted=subject.predicted,
        predicted_refusal=found.predicted_refusal,
        arithmetic=budget_terms(budget),
        warnings=_warnings(rehearsal, request, trials, sizes, budget, remarked),
        hints=tuple(
            hints(
                found,
                sizes,
                equal=request.equal,
                most_allowed=request.max_micro_batch,
                smallest=2 if subject.batch_norms else 1,
                for_command=isinstance(rehearsal, Command),
                equal_is="equal=True" if label == "in place" else "--equal",
                steady=subject.allocator == "steady malloc",
            )
            if searched
            else ()
        ),
    )


def _warnings(rehearsal: Rehearser, request: Request, trials: TrialLog, sizes: tuple[int, ...], budget: Budget, remarked: tuple[str, ...]) -> tuple[str, ...]:
    subject = rehearsal.subject()
    unequal = compared(rehearsal, max(sizes)) if sizes else ()
    remarks = dict.fromkeys(remark for reading in trials.readings for remark in reading.remarks)
    messages = [*subject.remarks, *remarked, *remarks]
    if subject.batch_norms and len(sizes) > 1:
        shown = ", ".join(subject.batch_norms[:3]) + (" and more" if len(subject.batch_norms) > 3 else "")
        messages.append(
            f"BatchNorm ({shown}) sees micro-batches of {sizes[0]}, not the whole batch of {request.target_batch}: its statistics differ from one big batch"
        )
        if sizes[0] == 2:
            messages.append(
                "an odd last window leaves one sample alone, which BatchNorm may refuse: plan.windows(loader, drop_last=True) leaves that window out"
            )
    messages += unequal
    if budget.memory.outside_bytes is None and budget.cap_bytes is not None:
        messages.append(f"nobody said what the driver's context takes of the limit: {in_words(ASSUMED_OUTSIDE)} were assumed")
    return tuple(messages)


def _rate(reading: Reading, target: int) -> float | None:
    """Samples per second: of the whole window in a run of it, else of its first micro-batches, with the optimizer's step."""
    if not reading.fits or not reading.window_seconds:
        return None
    return (target if reading.full else sum(window_led_by(target, reading.micro_batch)[:2])) / reading.window_seconds


def compared(rehearsal: Rehearser, largest: int) -> tuple[str, ...]:
    """A short look at whether accumulation is exact for this job, as warnings. What fails here says nothing about the plan."""
    if largest < 2 and not rehearsal.enforces:
        # Two samples at once might be too many, and nothing would stop them.
        return ("whether splitting changes the gradient was not compared, because that takes two samples at once: see autoaccum.equivalence",)
    try:
        found = rehearsal.compare(min(COMPARED_SAMPLES, max(largest, 2)))
    except DeviceError:
        raise
    except Exception as error:
        if oom.is_oom(error) or (isinstance(error, JobFailed) and error.kind in ("OutOfMemoryError", "MemoryError")):
            return ()
        return (f"whether splitting changes the gradient could not be seen: {error.kind if isinstance(error, JobFailed) else type(error).__name__}: {error}",)
    # BatchNorm is told of beside it, with the figure that matters: the micro-batch's.
    return (found.message,) if found is not None and found.exact is False and found.cause != "batch-norm" else ()


def versions() -> dict[str, str]:
    """Of what a plan was made with."""
    found = {"autoaccum": __version__, "python": platform.python_version()}
    try:
        found["torch"] = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        found["torch"] = "unknown"
    return found
