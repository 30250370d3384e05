"""The line itself: job -> device memory -> trials -> search -> plan.

A job is rehearsed on its device in growing micro-batches, each trial the real window under an enforced
budget and undone; the search finds the fewest accumulation steps that fit; the whole window is run twice
to confirm; the plan says so.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import inspect
import math
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from autoaccum import devices, explaining, hints, oom, plan, refusing, search
from autoaccum.child import Child
from autoaccum.command import Command, Template
from autoaccum.devices.base import ASSUMED_OUTSIDE, Budget
from autoaccum.errors import AutoaccumError, DeviceError, JobError, JobFailed, NoSuchDevice, UsageError, noted
from autoaccum.job import Job, Source, in_turn, source
from autoaccum.plan import Plan, PlannedDevice, Tried
from autoaccum.reading import COMPARED_SAMPLES, Equivalence, Limits, Progress, Reading, Rehearser, Trying
from autoaccum.units import MIB, in_words, parse_headroom, parse_size
from autoaccum.version import __version__

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Wish:
    """What was asked for. Raises `UsageError` for values that cannot be used.

    memory_limit: bytes or a size in words. headroom: a size, or a percentage of the budget.
    """

    target_batch: int
    memory_limit: int | str | None = None
    headroom: int | str = "3%"
    max_micro_batch: int | None = None
    equal: bool = False
    largest: bool = False
    timeout_s: float | None = None
    limits: Limits = field(init=False)

    def __post_init__(self) -> None:
        for name, value in (("target_batch", self.target_batch), ("max_micro_batch", self.max_micro_batch)):
            if (value is not None or name == "target_batch") and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise UsageError(f"{name} must be a whole number of samples, at least 1, not {value!r}")
        if self.timeout_s is not None and not self.timeout_s > 0:
            raise UsageError(f"timeout_s must be more than 0 seconds, not {self.timeout_s!r}")
        limit = None if self.memory_limit is None else parse_size(self.memory_limit)
        if limit is not None and limit < MIB:
            raise UsageError(f"a memory limit of {self.memory_limit} is {in_words(limit)}, less than any process takes: did you mean {self.memory_limit}MiB?")
        parse_headroom(self.headroom, limit or 2**63)  # a bad one is told before anything is built
        object.__setattr__(self, "limits", Limits(limit, self.headroom, self.timeout_s))


def tune(
    model: Any,
    optimizer: Any = None,
    loss: Any = None,
    batch: Any = None,
    *,
    target_batch: int,
    device: str | torch.device | None = None,
    memory_limit: int | str | None = None,
    headroom: int | str = "3%",
    max_micro_batch: int | None = None,
    equal: bool = False,
    largest: bool = False,
    timeout_s: float | None = None,
    progress: Progress | None = None,
    **job: Any,
) -> Plan:
    """The plan with the fewest accumulation steps that fits `target_batch` on the device at hand.

    model, optimizer, loss, batch: as in `Job`, with its keywords; or a `Job` alone; or a list of jobs that run one
    after the other in every window, all resident, on the first one's batch (a GAN's discriminator and generator).
    All is rehearsed in place and comes back bit-identical, random number generators included.
    device: where the parameters are; another one is refused. memory_limit: bytes or `"2GiB"`, enforced.
    headroom: kept aside, a size or a percentage of the budget. max_micro_batch: no larger one is tried.
    equal: equal micro-batches only. largest: search the exact largest micro-batch, not only those that save
    a step. timeout_s: per trial; a longer one counts as not fitting. progress: called along the way.

    What the plan warns of (`Plan.warnings`) is warned of here, too.
    Raises `NothingFits`, `UsageError`, `JobError`, `DeviceError`, and whatever the job's own code raises,
    with a note of the micro-batch and the phase.
    """
    from autoaccum import trial  # torch: the command line, which imports this file, does without

    if isinstance(model, (Job, list, tuple)):
        if optimizer is not None or loss is not None or batch is not None or job:
            raise UsageError("tune(job, ...) takes everything from the job: give either a Job or model, optimizer, loss and batch")
        rehearsed = in_turn(model)
    else:
        _known(job, tune)
        rehearsed = (Job(model, optimizer, loss, batch, **job),)
    wish = Wish(target_batch, memory_limit, headroom, max_micro_batch, equal, largest, timeout_s)
    where = _where(rehearsed[0], None if device is None else str(device))
    # In place, on a CPU, an enforced limit is also in the way of threads that other code starts meanwhile:
    # only who asked for one gets it. Without, only sizes that are predicted to fit are run.
    enforce = where.facts.kind != "cpu" or wish.memory_limit is not None
    tell = _Teller(progress)
    with trial.rehearsal(rehearsed, where, wish.limits, enforce=enforce, say=tell.phase) as rehearsal:
        found = _line(rehearsal, wish, tell, "in place", _idle_gpu(where.facts.kind))
    for said in found.warnings:
        warnings.warn(said, stacklevel=2)
    return found


def tune_source(
    where: Source | str | None, wish: Wish, *, device: str = "auto", progress: Progress | None = None, said: Callable[[str], None] | None = None
) -> Plan:
    """As `tune`, for a job that a file builds, in a child process of its own. `said` gets what the job prints."""
    with _child(where, wish, device, progress, said) as (child, tell, label):
        return _line(child, wish, tell, label, ())


def check_source(
    where: Source | str | None,
    micro_batch: int,
    wish: Wish,
    *,
    device: str = "auto",
    progress: Progress | None = None,
    said: Callable[[str], None] | None = None,
) -> Plan:
    """Rehearses one given micro-batch, the whole window twice. Raises `OutOfMemory` with by how much it does not fit."""
    if not 1 <= micro_batch <= wish.target_batch:
        raise UsageError(f"a micro-batch of {micro_batch} for a target batch of {wish.target_batch}: give between 1 and {wish.target_batch}")
    if wish.equal and wish.target_batch % micro_batch:
        near = [size for size in search.sizes(wish.target_batch, equal=True) if size <= micro_batch][-1]
        raise UsageError(f"{micro_batch} does not divide a target batch of {wish.target_batch}: {near} does, or leave --equal out")
    with _child(where, wish, device, progress, said) as (child, tell, label):
        started = time.monotonic()
        budget = refusing.enough(child.budget())
        sizes = plan.micro_batches(wish.target_batch, math.ceil(wish.target_batch / micro_batch))
        norms = child.subject().batch_norms
        if sizes[0] < micro_batch:
            # The size itself was asked for, so it is run as given, with the rest of the window smaller.
            whole, rest = divmod(wish.target_batch, micro_batch)
            sizes = (micro_batch,) * whole + ((rest,) if rest else ())
            if norms and rest == 1:
                sizes = _window(wish.target_batch, micro_batch)
        if norms and min(sizes) < 2:
            raise UsageError(f"BatchNorm layer {norms[0]!r} needs micro-batches of at least 2 samples, and {explaining.notation(sizes)} leaves one alone")
        reading = tell.measured(child, sizes, full=True)
        if not reading.fits:
            raise refusing.too_big(reading, sizes, _unlimited(child, tell, reading, sizes, budget), budget)
        found = search.Found(micro_batch, len(sizes), micro_batch, None)
        return _plan(child, wish, tell, label, found, reading, sizes, budget, started, (), searched=False)


def compare_source(where: Source | str | None, wish: Wish, *, device: str = "auto", said: Callable[[str], None] | None = None) -> Equivalence:
    """Whether splitting a batch of the job changes its gradient, in a child process. Raises `JobFailed` where the job fails."""
    with _child(where, wish, device, None, said) as (child, _, _):
        found = child.compare(COMPARED_SAMPLES)
        if found is None:
            raise JobFailed("the job's process ended, or took longer than --timeout, while a few samples were compared")
        return found


def tune_command(words: Sequence[str], wish: Wish, *, device: str = "auto", progress: Progress | None = None, said: Callable[[str], None]) -> Plan:
    """As `tune`, for a command that takes `{micro_batch}` and `{accumulation_steps}`: equal micro-batches, fewest steps.

    Raises `JobFailed` where the command fails for another reason than memory.
    """
    template, tell, started = Template(tuple(words)), _Teller(progress), time.monotonic()
    wish = replace(wish, equal=True)
    with Command(template, device, wish.limits, said=said) as command:
        budget = refusing.enough(command.budget())
        target = wish.target_batch
        candidates = search.sizes(target, most=wish.max_micro_batch, equal=True)

        def fits(micro_batch: int, steps: int) -> Reading:
            return tell.measured(command, plan.micro_batches(target, steps))

        # Not from one sample on: a script in micro-batches of one is the slowest run there is.
        found = search.largest(fits, target, candidates, budget_bytes=lambda: budget.budget_bytes, daring=command.enforces, start=max(target // 16, 1))
        if not found.micro_batch:
            raise _nothing_fits(command, tell, candidates[0], target, budget)
        sizes = plan.micro_batches(target, found.accumulation_steps)
        confirmed = next(each for each in tell.tried if each.micro_batch == found.micro_batch)
        return _plan(command, wish, tell, str(template), found, confirmed, sizes, budget, started, ())


def check_command(
    words: Sequence[str], micro_batch: int, wish: Wish, *, device: str = "auto", progress: Progress | None = None, said: Callable[[str], None]
) -> Plan:
    """Runs the command once at one given size. Raises `OutOfMemory` where it does not fit."""
    if wish.target_batch % micro_batch:
        raise UsageError(f"a command runs equal micro-batches: {micro_batch} does not divide a target batch of {wish.target_batch}")
    template, tell, started = Template(tuple(words)), _Teller(progress), time.monotonic()
    with Command(template, device, wish.limits, said=said) as command:
        budget = refusing.enough(command.budget())
        sizes = plan.micro_batches(wish.target_batch, wish.target_batch // micro_batch)
        reading = tell.measured(command, sizes)
        if not reading.fits:
            raise refusing.too_big(reading, sizes, _unlimited(command, tell, reading, sizes, budget), budget)
        return _plan(
            command, wish, tell, str(template), search.Found(micro_batch, len(sizes), micro_batch, None), reading, sizes, budget, started, (), searched=False
        )


def _line(rehearsal: Rehearser, wish: Wish, tell: _Teller, label: str, remarked: tuple[str, ...]) -> Plan:
    started = time.monotonic()
    subject = rehearsal.subject()
    first_budget = budget = refusing.enough(rehearsal.budget())
    target = wish.target_batch
    smallest = 2 if subject.batch_norms else 1
    candidates = search.sizes(target, smallest=smallest, most=wish.max_micro_batch, equal=wish.equal, every=wish.largest)
    if not candidates:
        raise refusing.nothing_allowed(target, wish.max_micro_batch, subject.batch_norms)

    def fits(micro_batch: int, steps: int) -> Reading:
        known = tell.refused.get(micro_batch) or tell.known.get((micro_batch, steps > 1))
        return known or tell.measured(rehearsal, _window(target, micro_batch))

    def budget_bytes() -> int:
        return budget.budget_bytes

    while True:
        found = search.largest(fits, target, candidates, budget_bytes=budget_bytes, gradient_bytes=subject.gradient_bytes, daring=rehearsal.enforces)
        if not found.micro_batch:
            raise _nothing_fits(rehearsal, tell, candidates[0], target, budget)
        if subject.predicted and wish.largest:
            found = _beyond(rehearsal, tell, candidates, found, target, budget.budget_bytes)
        sizes = plan.micro_batches(target, found.accumulation_steps)
        if len(sizes) == 1 and (target, False) in tell.known:
            confirmed = tell.known[(target, False)]  # its trial was the whole window twice already
            break
        if subject.device.kind == "cpu":
            rehearsal.fresh()  # allocators and libraries remember sizes: confirm as training will start
        budget = refusing.enough(rehearsal.budget())
        confirmed = tell.measured(rehearsal, sizes, full=True)
        if confirmed.fits:
            break
        tell.refused[sizes[0]] = confirmed
        # Smaller ones are left, and the window in one piece, which holds no gradients, if it was not asked yet.
        candidates = [size for size in candidates if size < sizes[0] or (size == target and (target, False) not in tell.known)]
        if not candidates:
            raise _nothing_fits(rehearsal, tell, sizes[0], target, budget)
    return _plan(rehearsal, wish, tell, label, found, confirmed, sizes, budget, started, (*remarked, *explaining.drift(first_budget, rehearsal.budget())))


def _beyond(rehearsal: Rehearser, tell: _Teller, candidates: Sequence[int], found: search.Found, target: int, budget_bytes: int) -> search.Found:
    """Simulated trials cost nothing, so the sizes above the answer are gone through until one takes too much by what it
    holds alone: an allocator's segments make some size fail where a larger one fits."""
    above = [size for size in candidates if size > found.micro_batch and size not in tell.refused][:512]
    for size in above:
        reading = rehearsal.measure(_window(target, size))
        if reading.fits:
            tell.tried.append(reading)
            tell.known[(size, reading.accumulation_steps > 1)] = reading
            found = replace(found, micro_batch=size, accumulation_steps=math.ceil(target / size), largest_fit=size)
        elif reading.least_bytes is not None and reading.least_bytes > budget_bytes:
            break
    return found


class _Teller:
    """Runs trials, tells progress, and remembers what was tried."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self.tried: list[Reading] = []
        self.known: dict[tuple[int, bool], Reading] = {}  # by micro-batch and whether gradients were resident
        self.refused: dict[int, Reading] = {}  # confirming runs that failed
        self._now = (0, 0, False)

    def phase(self, phase: str, index: int) -> None:
        if self._progress is not None:
            self._progress(Trying(*self._now, phase, index))

    def measured(self, rehearsal: Rehearser, sizes: tuple[int, ...], *, full: bool = False, limited: bool = True) -> Reading:
        self._now = (sizes[0], len(sizes), full)
        self.phase("batch", 0)
        try:
            reading = rehearsal.measure(sizes, full=full, limited=limited)
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


@contextmanager
def _child(
    where: Source | str | None, wish: Wish, device: str, progress: Progress | None, said: Callable[[str], None] | None
) -> Iterator[tuple[Child, _Teller, str]]:
    origin = where if isinstance(where, Source) else source(where)
    tell = _Teller(progress)
    with Child(origin, device, wish.limits, say=tell.phase, said=said) as child:
        yield child, tell, origin.label


def _plan(
    rehearsal: Rehearser,
    wish: Wish,
    tell: _Teller,
    label: str,
    found: search.Found,
    confirmed: Reading,
    sizes: tuple[int, ...],
    budget: Budget,
    started: float,
    remarked: tuple[str, ...],
    *,
    searched: bool = True,
) -> Plan:
    subject = rehearsal.subject()
    memory = budget.memory
    unequal = _compared(rehearsal, sizes[0])
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
        micro_batch=sizes[0],
        accumulation_steps=len(sizes),
        micro_batches=sizes,
        share=wish.target_batch,
        shares=(wish.target_batch,),
        rank=0,
        world_size=1,
        largest_fit=max((each.micro_batch for each in tell.tried if each.fits and each.micro_batch not in tell.refused), default=sizes[0]),
        smallest_refused=min((each.micro_batch for each in tell.tried if not each.fits and each.micro_batch > sizes[0]), default=None),
        device=PlannedDevice(subject.device.kind, subject.device.name, subject.device.uuid, memory.total_bytes, memory.free_bytes, subject.device.index),
        shapes=confirmed.shapes or {},
        budget_bytes=budget.budget_bytes,
        peak_bytes=confirmed.peak_bytes,
        outside_bytes=memory.outside_bytes,
        headroom_bytes=budget.headroom_bytes,
        samples_per_second=wish.target_batch / confirmed.window_seconds if confirmed.window_seconds else None,
        trials=tuple(
            Tried(each.micro_batch, each.accumulation_steps, each.outcome, each.phase, each.peak_bytes, round(each.seconds, 4), each.cached, each.full)
            for each in tell.tried
        ),
        seconds=round(time.monotonic() - started, 4),
        versions=_versions(),
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


def _compared(rehearsal: Rehearser, largest: int) -> tuple[str, ...]:
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


def _known(given: dict[str, Any], verb: Callable[..., Any]) -> None:
    """Raises `UsageError` for a keyword that neither `verb` nor `Job` has, with the one that was probably meant."""
    own = [name for name, each in inspect.signature(verb).parameters.items() if each.kind is each.KEYWORD_ONLY]
    known = [*own, *(each.name for each in fields(Job) if each.kw_only)]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise UsageError(f"{verb.__name__}() has no keyword {name!r}" + (f": did you mean {near[0]!r}?" if near else f"; it has {', '.join(known)}"))


def _window(target: int, micro_batch: int) -> tuple[int, ...]:
    """A window in the fewest steps whose largest micro-batch is exactly this size."""
    steps = math.ceil(target / micro_batch)
    return plan.micro_batches(target, 1) if steps == 1 else (micro_batch, *plan.micro_batches(target - micro_batch, steps - 1))


def _where(job: Job, device: str | None) -> devices.Device:
    """The device of the parameters. Raises `NoSuchDevice` if another was asked for."""
    placed = str(job.device)
    if device is not None and device.startswith("virtual:"):
        raise UsageError(
            f"tune() rehearses the objects it is given, which are on {placed}: for {device} use autoaccum.estimate, or autoaccum tune FILE --device {device}"
        )
    if device not in (None, "auto", placed) and f"{device}:0" != placed:
        raise NoSuchDevice(f"the model is on {placed}, not on {device}: move the model there first, or leave device out")
    return devices.get(placed)


def _idle_gpu(kind: str) -> tuple[str, ...]:
    if kind != "cpu" or (best := devices.here()[0]) == "cpu":
        return ()
    return (f"the model is on the CPU while {best} is there: move it with model.to({best!r}) before tuning if it trains there",)


def _nothing_fits(rehearsal: Rehearser, tell: _Teller, micro_batch: int, target: int, budget: Budget) -> Exception:
    sizes = plan.micro_batches(target, math.ceil(target / micro_batch))
    refused = [each for each in tell.tried if each.micro_batch == micro_batch]
    return refusing.nothing_fits(micro_batch, tell.tried, _unlimited(rehearsal, tell, refused[-1], sizes, budget), budget)


def _unlimited(rehearsal: Rehearser, tell: _Teller, refused: Reading, sizes: tuple[int, ...], budget: Budget) -> Reading | None:
    """The refused window without the user's limit, for the figure; what the device allows is still enforced."""
    if budget.cap_bytes is None or not rehearsal.enforces or refused.outcome not in ("oom", "killed"):
        return None
    rehearsal.fresh()  # what ran out may have left libraries in a state that remembers it
    return tell.measured(rehearsal, sizes, limited=False)


def _versions() -> dict[str, str]:
    found = {"autoaccum": __version__, "python": platform.python_version()}
    try:
        found["torch"] = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        found["torch"] = "unknown"
    return found
