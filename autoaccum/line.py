"""The line itself: job -> device memory -> trials -> search -> plan.

A job is rehearsed on its device in growing micro-batches, each trial the real window under an enforced
budget and undone; the search finds the fewest accumulation steps that fit; the whole window is run twice
to confirm; the plan says so.
"""

from __future__ import annotations

import importlib.metadata
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from autoaccum import explaining, hints, oom, plan, refusing, search, throughput
from autoaccum.cache import Shelf
from autoaccum.command import Command
from autoaccum.devices.base import ASSUMED_OUTSIDE, Budget
from autoaccum.errors import AutoaccumError, DeviceError, JobError, JobFailed, UsageError, noted
from autoaccum.plan import Plan, PlannedDevice, Tried
from autoaccum.reading import COMPARED_SAMPLES, Limits, Progress, Reading, Rehearser, Subject, Trying
from autoaccum.units import MIB, in_words, parse_headroom, parse_size
from autoaccum.version import __version__

Objective = Literal["fewest-steps", "throughput"]


@dataclass(frozen=True)
class Wish:
    """What was asked for. Raises `UsageError` for values that cannot be used.

    memory_limit: bytes or a size in words. headroom: a size, or a percentage of the budget. lockstep: over ranks, the same number of
    micro-steps on each.
    """

    target_batch: int
    memory_limit: int | str | None = None
    headroom: int | str = "3%"
    max_micro_batch: int | None = None
    equal: bool = False
    largest: bool = False
    timeout_s: float | None = None
    lockstep: bool = False
    objective: Objective = "fewest-steps"
    limits: Limits = field(init=False)

    def __post_init__(self) -> None:
        for name, value in (("target_batch", self.target_batch), ("max_micro_batch", self.max_micro_batch)):
            if (value is not None or name == "target_batch") and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise UsageError(f"{name} must be a whole number of samples, at least 1, not {value!r}")
        if self.timeout_s is not None and not self.timeout_s > 0:
            raise UsageError(f"timeout_s must be more than 0 seconds, not {self.timeout_s!r}")
        if self.objective not in get_args(Objective):
            raise UsageError(f"objective must be {' or '.join(get_args(Objective))}, not {self.objective!r}")
        if self.largest and self.objective == "throughput":
            raise UsageError("the largest micro-batch and the fastest one are two questions: give either largest or the objective throughput")
        limit = None if self.memory_limit is None else parse_size(self.memory_limit)
        if limit is not None and limit < MIB:
            raise UsageError(f"a memory limit of {self.memory_limit} is {in_words(limit)}, less than any process takes: did you mean {self.memory_limit}MiB?")
        parse_headroom(self.headroom, limit or 2**63)  # a bad one is told before anything is built
        object.__setattr__(self, "limits", Limits(limit, self.headroom, self.timeout_s))


def found_for(
    rehearsal: Rehearser,
    wish: Wish,
    tell: Teller,
    label: str,
    remarked: tuple[str, ...],
    shelf: Shelf | None = None,
    *,
    known: Sequence[Reading] = (),
    start: int = 1,
) -> Plan:
    """The plan of one device.

    shelf: readings of earlier runs, which shorten the search, and where this one's are kept. known, start: as in `search.largest`.
    """
    started = time.monotonic()
    subject = rehearsal.subject()
    first_budget = budget = refusing.enough(rehearsal.budget())
    target = wish.target_batch
    remembered = [] if shelf is None else shelf.known(target, budget.budget_bytes)
    # Sizes of other targets help the search; a plan tells of its own.
    tell.tried += [each for each in remembered if each.micro_batch <= target and (each.accumulation_steps == 1) == (each.micro_batch == target)]
    try:
        found, confirmed, sizes, budget = _searched(rehearsal, wish, tell, subject, budget, shelf, [*remembered, *known], start)
    finally:
        if shelf is not None:
            shelf.keep(tell.tried, target, budget.budget_bytes)
    return planned(rehearsal, wish, tell, label, found, confirmed, sizes, budget, started, (*remarked, *explaining.drift(first_budget, rehearsal.budget())))


def _searched(
    rehearsal: Rehearser, wish: Wish, tell: Teller, subject: Subject, budget: Budget, shelf: Shelf | None, known: Sequence[Reading], start: int
) -> tuple[search.Found, Reading, tuple[int, ...], Budget]:
    """What was found, its confirming run, the window's micro-batches, and the budget that these ran under."""
    target = wish.target_batch
    smallest = 2 if subject.batch_norms else 1
    candidates = search.sizes(target, smallest=smallest, most=wish.max_micro_batch, equal=wish.equal, every=wish.largest)
    if not candidates:
        raise refusing.nothing_allowed(target, wish.max_micro_batch, subject.batch_norms)

    def fits(micro_batch: int, steps: int) -> Reading:
        read = tell.refused.get(micro_batch) or tell.known.get((micro_batch, steps > 1))
        return read or tell.measured(rehearsal, window_of(target, micro_batch))

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
            tell.tried, known = [each for each in tell.tried if not each.cached], ()  # bad news is not taken from memory
            continue
        if not found.micro_batch:
            raise nothing_fits(rehearsal, tell, candidates[0], target, budget)
        if subject.predicted and wish.largest:
            found = _beyond(rehearsal, tell, candidates, found, target, budget.budget_bytes)
        sizes = plan.micro_batches(target, found.accumulation_steps)
        timed = wish.objective == "throughput"
        if len(sizes) == 1 and (target, False) in tell.known and not timed:
            confirmed = tell.known[(target, False)]  # its trial was the whole window twice already
            break
        if subject.device.kind == "cpu":
            rehearsal.fresh()  # allocators and libraries remember sizes: confirm as training will start
        budget = refusing.enough(rehearsal.budget())
        confirmed = tell.measured(rehearsal, sizes, full=True, windows=throughput.WINDOWS if timed else 2)
        if confirmed.fits:
            break
        tell.refused[sizes[0]] = confirmed
        if known and shelf is not None:
            # What was remembered promised more than there is: something changed that nobody knew of. Once more, from what is seen now.
            shelf.forget()
            tell.tried = [each for each in tell.tried if not each.cached]
            candidates = allowed
        known = ()
        # Smaller ones are left, and the window in one piece, which holds no gradients, if it was not asked yet.
        candidates = [size for size in candidates if size < sizes[0] or (size == target and (target, False) not in tell.known)]
        if not candidates:
            raise nothing_fits(rehearsal, tell, sizes[0], target, budget)
    if wish.objective == "throughput":
        if subject.predicted:
            raise UsageError('objective "throughput" needs a device that is here: a simulated card has no clock')
        smaller = [size for size in allowed if size < sizes[0] and size not in tell.refused]
        if not rehearsal.enforces and len(sizes) == 1 and (confirmed.peak_bytes or 0) + subject.gradient_bytes > budget.budget_bytes:
            smaller = []  # in more than one piece gradients would be resident, and nothing would stop that

        def timed_window(size: int) -> Reading:
            if subject.device.kind == "cpu":
                rehearsal.fresh()
            return tell.measured(rehearsal, plan.micro_batches(target, math.ceil(target / size)), full=True, windows=throughput.WINDOWS)

        confirmed = throughput.fastest(timed_window, smaller, confirmed)
        sizes = plan.micro_batches(target, confirmed.accumulation_steps)
        found = replace(found, micro_batch=sizes[0], accumulation_steps=len(sizes))
    return found, confirmed, sizes, budget


def _beyond(rehearsal: Rehearser, tell: Teller, candidates: Sequence[int], found: search.Found, target: int, budget_bytes: int) -> search.Found:
    """Simulated trials cost nothing, so the sizes above the answer are gone through until one takes too much by what it
    holds alone: an allocator's segments make some size fail where a larger one fits."""
    above = [size for size in candidates if size > found.micro_batch and size not in tell.refused][:512]
    for size in above:
        reading = rehearsal.measure(window_of(target, size))
        if reading.fits:
            tell.tried.append(reading)
            tell.known[(size, reading.accumulation_steps > 1)] = reading
            found = replace(found, micro_batch=size, accumulation_steps=math.ceil(target / size), largest_fit=size)
        elif reading.least_bytes is not None and reading.least_bytes > budget_bytes:
            break
    return found


class Teller:
    """Runs trials, tells progress, and remembers what was tried."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self.tried: list[Reading] = []
        self.known: dict[tuple[int, bool], Reading] = {}  # by micro-batch and whether gradients were resident
        self.refused: dict[int, Reading] = {}  # confirming runs that failed
        self._now = (0, 0, False)

    def again(self) -> Teller:
        """One that tells the same listener and remembers nothing."""
        return Teller(self._progress)

    def phase(self, phase: str, index: int) -> None:
        if self._progress is not None:
            self._progress(Trying(*self._now, phase, index))

    def measured(self, rehearsal: Rehearser, sizes: tuple[int, ...], *, full: bool = False, limited: bool = True, windows: int = 2) -> Reading:
        self._now = (sizes[0], len(sizes), full)
        self.phase("batch", 0)
        try:
            reading = rehearsal.measure(sizes, full=full, limited=limited, windows=windows)
        except Exception as error:
            worked = sorted({each.micro_batch for each in self.tried if each.fits})
            if worked and not isinstance(error, AutoaccumError):
                noted(error, f"autoaccum: sizes that had worked: {', '.join(map(str, worked))}")
            if isinstance(error, JobError) and worked:
                error.args = (f"{error.args[0]} (sizes that had worked: {', '.join(map(str, worked))})", *error.args[1:])
            raise
        if limited:
            self.tried.append(reading)
            if not full:
                self.known[(sizes[0], len(sizes) > 1)] = reading
        else:
            reading = replace(reading, limited=False)
        if self._progress is not None:
            self._progress(reading)
        return reading


def planned(
    rehearsal: Rehearser,
    wish: Wish,
    tell: Teller,
    label: str,
    found: search.Found,
    confirmed: Reading | None,
    sizes: tuple[int, ...],
    budget: Budget,
    started: float,
    remarked: tuple[str, ...],
    *,
    searched: bool = True,
) -> Plan:
    subject = rehearsal.subject()
    memory = budget.memory
    most = max(sizes, default=0)
    unequal = compared(rehearsal, most) if most else ()
    remarks = dict.fromkeys(remark for reading in tell.tried for remark in reading.remarks)
    said = [*subject.remarks, *remarked, *remarks]
    if subject.batch_norms and len(sizes) > 1:
        shown = ", ".join(subject.batch_norms[:3]) + (" and more" if len(subject.batch_norms) > 3 else "")
        said.append(
            f"BatchNorm ({shown}) sees micro-batches of {sizes[0]}, not the whole batch of {wish.target_batch}: its statistics differ from one big batch"
        )
        if sizes[0] == 2:
            said.append("an odd last window leaves one sample alone, which BatchNorm may refuse: plan.windows(loader, drop_last=True) leaves that window out")
    said += unequal
    if memory.outside_bytes is None and budget.cap_bytes is not None:
        said.append(f"nobody said what the driver's context takes of the limit: {in_words(ASSUMED_OUTSIDE)} were assumed")
    return Plan(
        target_batch=wish.target_batch,
        micro_batch=most,
        accumulation_steps=len(sizes),
        micro_batches=sizes,
        share=wish.target_batch,
        shares=(wish.target_batch,),
        rank=0,
        world_size=1,
        largest_fit=max((each.micro_batch for each in tell.tried if each.fits and each.micro_batch not in tell.refused), default=most),
        smallest_refused=min((each.micro_batch for each in tell.tried if not each.fits and each.micro_batch > most), default=None),
        device=PlannedDevice(subject.device.kind, subject.device.name, subject.device.uuid, memory.total_bytes, memory.free_bytes, subject.device.index),
        shapes=(confirmed.shapes if confirmed is not None else None) or {},
        budget_bytes=budget.budget_bytes,
        peak_bytes=confirmed.peak_bytes if confirmed is not None else None,
        outside_bytes=memory.outside_bytes,
        headroom_bytes=budget.headroom_bytes,
        samples_per_second=wish.target_batch / confirmed.window_seconds if confirmed is not None and confirmed.window_seconds else None,
        trials=tuple(
            Tried(
                each.micro_batch,
                each.accumulation_steps,
                each.outcome,
                each.phase,
                each.peak_bytes,
                round(each.seconds, 4),
                each.cached,
                each.full,
                _rate(each, wish.target_batch),
            )
            for each in tell.tried
        ),
        objective=wish.objective,
        seconds=round(time.monotonic() - started, 4),
        versions=versions(),
        job_fingerprint=subject.fingerprint,
        job=label,
        allocator=subject.allocator,
        predicted=subject.predicted,
        predicted_refusal=found.predicted_refusal,
        arithmetic=explaining.arithmetic(budget),
        warnings=tuple(said),
        hints=tuple(
            hints.hints(
                found,
                sizes,
                equal=wish.equal,
                most_allowed=wish.max_micro_batch,
                smallest=2 if subject.batch_norms else 1,
                for_command=isinstance(rehearsal, Command),
                equal_is="equal=True" if label == "in place" else "--equal",
                steady=subject.allocator == "steady malloc",
            )
            if searched
            else ()
        ),
    )


def _rate(reading: Reading, target: int) -> float | None:
    """Samples per second: of the whole window in a run of it, else of its first micro-batches, with the optimizer's step."""
    if not reading.fits or not reading.window_seconds:
        return None
    return (target if reading.full else sum(window_of(target, reading.micro_batch)[:2])) / reading.window_seconds


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


def window_of(target: int, micro_batch: int) -> tuple[int, ...]:
    """A window in the fewest steps whose largest micro-batch is exactly this size."""
    steps = math.ceil(target / micro_batch)
    return plan.micro_batches(target, 1) if steps == 1 else (micro_batch, *plan.micro_batches(target - micro_batch, steps - 1))


def nothing_fits(rehearsal: Rehearser, tell: Teller, micro_batch: int, target: int, budget: Budget) -> Exception:
    sizes = plan.micro_batches(target, math.ceil(target / micro_batch))
    refused = [each for each in tell.tried if each.micro_batch == micro_batch]
    return refusing.nothing_fits(micro_batch, tell.tried, unlimited(rehearsal, tell, refused[-1], sizes, budget), budget)


def unlimited(rehearsal: Rehearser, tell: Teller, refused: Reading, sizes: tuple[int, ...], budget: Budget) -> Reading | None:
    """The refused window without the user's limit, for the figure; what the device allows is still enforced."""
    if budget.cap_bytes is None or not rehearsal.enforces or refused.outcome not in ("oom", "killed"):
        return None
    rehearsal.fresh()  # what ran out may have left libraries in a state that remembers it
    return tell.measured(rehearsal, sizes, limited=False)


def versions() -> dict[str, str]:
    """Of what a plan was made with."""
    found = {"autoaccum": __version__, "python": platform.python_version()}
    try:
        found["torch"] = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        found["torch"] = "unknown"
    return found
