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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from autoaccum import devices, plan, search
from autoaccum.child import Child
from autoaccum.command import Command, Template
from autoaccum.devices.base import ASSUMED_OUTSIDE, Budget
from autoaccum.devices.cpu import STEADY_MALLOC
from autoaccum.errors import AutoaccumError, JobError, NoSuchDevice, NothingFits, OutOfMemory, PlanError, UsageError, noted
from autoaccum.explaining import notation
from autoaccum.job import Job, Source, source
from autoaccum.plan import Plan, PlannedDevice, Tried
from autoaccum.reading import Limits, Progress, Reading, Rehearser, Trying
from autoaccum.units import in_words, parse_headroom, parse_size
from autoaccum.version import __version__


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
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise UsageError(f"{name} must be a whole number of samples, at least 1, not {value!r}")
        if self.timeout_s is not None and not self.timeout_s > 0:
            raise UsageError(f"timeout_s must be more than 0 seconds, not {self.timeout_s!r}")
        limit = None if self.memory_limit is None else parse_size(self.memory_limit)
        parse_headroom(self.headroom, limit or 2**63)  # a bad one is told before anything is built
        object.__setattr__(self, "limits", Limits(limit, self.headroom, self.timeout_s))


def tune(
    model: Any,
    optimizer: Any = None,
    loss: Any = None,
    batch: Any = None,
    *,
    target_batch: int,
    device: str | None = None,
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

    model, optimizer, loss, batch: as in `Job`, with its keywords; or a `Job` alone. It is rehearsed in place
    and comes back bit-identical, random number generators included.
    device: where the parameters are; another one is refused. memory_limit: bytes or `"2GiB"`, enforced.
    headroom: kept aside, a size or a percentage of the budget. max_micro_batch: no larger one is tried.
    equal: equal micro-batches only. largest: search the exact largest micro-batch, not only those that save
    a step. timeout_s: per trial; a longer one counts as not fitting. progress: called along the way.

    Raises `NothingFits`, `UsageError`, `JobError`, `DeviceError`, and whatever the job's own code raises,
    with a note of the micro-batch and the phase.
    """
    from autoaccum import trial  # torch: the command line, which imports this file, does without

    if isinstance(model, Job):
        if optimizer is not None or loss is not None or batch is not None or job:
            raise UsageError("tune(job, ...) takes everything from the job: give either a Job or model, optimizer, loss and batch")
        rehearsed = model
    else:
        rehearsed = Job(model, optimizer, loss, batch, **job)
    wish = Wish(target_batch, memory_limit, headroom, max_micro_batch, equal, largest, timeout_s)
    where = _where(rehearsed, device)
    # In place, on a CPU, an enforced limit is also in the way of threads that other code starts meanwhile:
    # only who asked for one gets it. Without, only sizes that are predicted to fit are run.
    enforce = where.facts.kind != "cpu" or wish.memory_limit is not None
    tell = _Teller(progress)
    with trial.rehearsal(rehearsed, where, wish.limits, enforce=enforce, say=tell.phase) as rehearsal:
        return _line(rehearsal, wish, tell, "in place", _idle_gpu(where.facts.kind))


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
    with _child(where, wish, device, progress, said) as (child, tell, label):
        started = time.monotonic()
        budget = _enough(child.budget())
        sizes = plan.micro_batches(wish.target_batch, math.ceil(wish.target_batch / micro_batch))
        if sizes[0] < micro_batch:
            # The size itself was asked for, so it is run as given, with the rest of the window smaller.
            steps = wish.target_batch // micro_batch
            rest = wish.target_batch - steps * micro_batch
            sizes = (micro_batch,) * steps + ((rest,) if rest else ())
        reading = tell.measured(child, sizes, full=True)
        if not reading.fits:
            raise _too_big(child, tell, reading, sizes, budget)
        found = search.Found(micro_batch, len(sizes), micro_batch, None)
        return _plan(child, wish, tell, label, found, reading, sizes, budget, started, ())


def tune_command(words: Sequence[str], wish: Wish, *, device: str = "auto", progress: Progress | None = None, said: Callable[[str], None]) -> Plan:
    """As `tune`, for a command that takes `{micro_batch}` and `{accumulation_steps}`: equal micro-batches, fewest steps.

    Raises `JobFailed` where the command fails for another reason than memory.
    """
    template, tell, started = Template(tuple(words)), _Teller(progress), time.monotonic()
    wish = replace(wish, equal=True)
    with Command(template, device, wish.limits, said=said) as command:
        budget = _enough(command.budget())
        target = wish.target_batch
        candidates = search.sizes(target, most=wish.max_micro_batch, equal=True)

        def fits(micro_batch: int, steps: int) -> Reading:
            return tell.measured(command, plan.micro_batches(target, steps))

        found = search.largest(fits, target, candidates, budget_bytes=lambda: budget.budget_bytes)
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
        budget = _enough(command.budget())
        sizes = plan.micro_batches(wish.target_batch, wish.target_batch // micro_batch)
        reading = tell.measured(command, sizes)
        if not reading.fits:
            raise _too_big(command, tell, reading, sizes, budget)
        return _plan(command, wish, tell, str(template), search.Found(micro_batch, len(sizes), micro_batch, None), reading, sizes, budget, started, ())


def _line(rehearsal: Rehearser, wish: Wish, tell: _Teller, label: str, warnings: tuple[str, ...]) -> Plan:
    started = time.monotonic()
    subject = rehearsal.subject()
    first_budget = budget = _enough(rehearsal.budget())
    target = wish.target_batch
    smallest = 2 if subject.batch_norms else 1
    candidates = search.sizes(target, smallest=smallest, most=wish.max_micro_batch, equal=wish.equal, every=wish.largest)
    if not candidates:
        raise _nothing_allowed(wish, smallest, subject.batch_norms)

    def fits(micro_batch: int, steps: int) -> Reading:
        known = tell.refused.get(micro_batch) or tell.known.get((micro_batch, steps > 1))
        return known or tell.measured(rehearsal, _window(target, micro_batch))

    def budget_bytes() -> int:
        return budget.budget_bytes

    while True:
        found = search.largest(fits, target, candidates, budget_bytes=budget_bytes, gradient_bytes=subject.gradient_bytes, daring=rehearsal.enforces)
        if not found.micro_batch:
            raise _nothing_fits(rehearsal, tell, candidates[0], target, budget)
        sizes = plan.micro_batches(target, found.accumulation_steps)
        if len(sizes) == 1:
            confirmed = tell.known[(target, False)]  # its trial was the whole window twice already
            break
        if subject.device.kind == "cpu":
            rehearsal.fresh()  # allocators and libraries remember sizes: confirm as training will start
        budget = _enough(rehearsal.budget())
        confirmed = tell.measured(rehearsal, sizes, full=True)
        if confirmed.fits:
            break
        tell.refused[found.micro_batch] = confirmed
        candidates = [size for size in candidates if size < found.micro_batch]
        if not candidates:
            raise _nothing_fits(rehearsal, tell, found.micro_batch, target, budget)
    return _plan(rehearsal, wish, tell, label, found, confirmed, sizes, budget, started, (*warnings, *_drift(first_budget, rehearsal.budget())))


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
    warnings: tuple[str, ...],
) -> Plan:
    subject = rehearsal.subject()
    memory = budget.memory
    remarks = dict.fromkeys(remark for reading in tell.tried for remark in reading.remarks)
    said = [*subject.remarks, *warnings, *remarks]
    if subject.batch_norms and len(sizes) > 1:
        shown = ", ".join(subject.batch_norms[:3]) + (" and more" if len(subject.batch_norms) > 3 else "")
        said.append(
            f"BatchNorm ({shown}) sees micro-batches of {sizes[0]}, not the whole batch of {wish.target_batch}: its statistics differ from one big batch"
        )
    if memory.outside_bytes is None and budget.cap_bytes is not None:
        said.append(f"nobody said what the driver's context takes of the limit: {in_words(ASSUMED_OUTSIDE)} were assumed")
    peak = confirmed.peak_bytes
    assert peak is not None  # a trial that fitted lived to tell
    return Plan(
        target_batch=wish.target_batch,
        micro_batch=sizes[0],
        accumulation_steps=len(sizes),
        micro_batches=sizes,
        share=wish.target_batch,
        shares=(wish.target_batch,),
        rank=0,
        world_size=1,
        largest_fit=found.largest_fit,
        smallest_refused=found.smallest_refused,
        device=PlannedDevice(subject.device.kind, subject.device.name, subject.device.uuid, memory.total_bytes, memory.free_bytes, subject.device.index),
        shapes=confirmed.shapes or {},
        budget_bytes=budget.budget_bytes,
        peak_bytes=peak,
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
        predicted_refusal=found.predicted_refusal,
        arithmetic=_arithmetic(budget),
        warnings=tuple(said),
        hints=tuple(
            _hints(wish, found, sizes, 2 if subject.batch_norms else 1, for_command=isinstance(rehearsal, Command), steady=subject.allocator == "steady malloc")
        ),
    )


def _window(target: int, micro_batch: int) -> tuple[int, ...]:
    """A window in the fewest steps whose largest micro-batch is exactly this size."""
    steps = math.ceil(target / micro_batch)
    return plan.micro_batches(target, 1) if steps == 1 else (micro_batch, *plan.micro_batches(target - micro_batch, steps - 1))


def _where(job: Job, device: str | None) -> devices.Device:
    """The device of the parameters. Raises `NoSuchDevice` if another was asked for."""
    placed = str(job.device)
    if device not in (None, "auto", placed) and f"{device}:0" != placed:
        raise NoSuchDevice(f"the model is on {placed}, not on {device}: move the model there first, or leave device out")
    return devices.get(placed)


def _idle_gpu(kind: str) -> tuple[str, ...]:
    if kind != "cpu" or (best := devices.here()[0]) == "cpu":
        return ()
    return (f"the model is on the CPU while {best} is there: move it with model.to({best!r}) before tuning if it trains there",)


def _enough(budget: Budget) -> Budget:
    """Raises `NothingFits` where nothing is left to try with."""
    if budget.budget_bytes <= 0:
        memory = budget.memory
        others = "".join(f"; {other.name} (process {other.pid}) holds {in_words(other.bytes or 0)}" for other in memory.others)
        limit = f"of the limit of {in_words(budget.cap_bytes)} " if budget.cap_bytes else ""
        raise NothingFits(
            f"{limit}nothing is left to train with: {in_words(memory.free_bytes)} of {in_words(memory.total_bytes)} are free{others}; "
            f"headroom keeps {in_words(budget.headroom_bytes)}. Free memory, raise --memory-limit, or lower --headroom",
            budget_bytes=budget.budget_bytes,
        )
    return budget


def _nothing_allowed(wish: Wish, smallest: int, batch_norms: tuple[str, ...]) -> Exception:
    if smallest > 1:
        return NothingFits(
            f"BatchNorm layer {batch_norms[0]!r} needs micro-batches of at least 2 samples, and a target batch of {wish.target_batch}"
            f"{f' in micro-batches of at most {wish.max_micro_batch}' if wish.max_micro_batch else ''} cannot be cut so: "
            "choose another target, or replace BatchNorm (GroupNorm does not mix samples)"
        )
    return PlanError(f"no micro-batch is allowed for a target batch of {wish.target_batch}")


def _nothing_fits(rehearsal: Rehearser, tell: _Teller, micro_batch: int, target: int, budget: Budget) -> NothingFits:
    """What one sample needs, what there is, who holds the rest, and what would help."""
    unit = "one sample" if micro_batch == 1 else f"a micro-batch of {micro_batch}"
    needs, _ = _needs(rehearsal, tell, plan.micro_batches(target, math.ceil(target / micro_batch)), budget)
    refused = next((each for each in tell.tried if not each.fits), None)
    how = f"{unit} {'was killed by the system' if refused and refused.outcome == 'killed' else 'does not fit'}" + (f" (in {refused.phase})" if refused else "")
    others = [other for other in budget.memory.others if other.bytes]
    held = "".join(f"; {other.name} (process {other.pid}) holds {in_words(other.bytes or 0)}" for other in others)
    if refused is not None and refused.outcome == "timeout":
        return NothingFits(
            f"{unit} did not finish in time: raise --timeout, or look for a hang in the job", budget_bytes=budget.budget_bytes, trials=tell.tried
        )
    wide = f"raise --memory-limit (now {in_words(budget.cap_bytes)})" if budget.cap_bytes else "free memory, or use a larger device"
    return NothingFits(
        f"{how}: it needs {needs} and the budget is {in_words(budget.budget_bytes)}{held}. "
        f"What would help: {wide}, autocast to bfloat16, activation checkpointing, an optimizer with less state, shorter samples",
        budget_bytes=budget.budget_bytes,
        trials=tell.tried,
    )


def _needs(rehearsal: Rehearser, tell: _Teller, sizes: tuple[int, ...], budget: Budget) -> tuple[str, int | None]:
    """What this window peaks at, in words and bytes: measured without the user's limit, else only that it is more."""
    if budget.cap_bytes is not None and rehearsal.enforces:
        rehearsal.fresh()  # what ran out may have left libraries in a state that remembers it
        unlimited = tell.measured(rehearsal, sizes, limited=False)
        if unlimited.fits and unlimited.peak_bytes is not None:
            return in_words(unlimited.peak_bytes), unlimited.peak_bytes
    seen = max((each.peak_bytes or 0 for each in tell.tried if each.micro_batch == sizes[0]), default=0)
    return f"more than {in_words(max(seen, budget.budget_bytes))} (predicted)", None


def _too_big(rehearsal: Rehearser, tell: _Teller, reading: Reading, sizes: tuple[int, ...], budget: Budget) -> Exception:
    if reading.outcome == "timeout":
        return OutOfMemory(f"{notation(sizes)} did not finish in time: raise --timeout, or look for a hang in the job")
    if reading.outcome == "over-budget" and reading.peak_bytes is not None:
        measured: tuple[str, int | None] = in_words(reading.peak_bytes), reading.peak_bytes
    else:
        measured = _needs(rehearsal, tell, sizes, budget)
    words, needs = measured
    over = f", {in_words(needs - budget.budget_bytes)} over" if needs is not None and needs > budget.budget_bytes else ""
    how = {"oom": f"ran out in {reading.phase}", "killed": f"was killed by the system in {reading.phase}", "over-budget": "is over budget"}[reading.outcome]
    return OutOfMemory(
        f"{notation(sizes)} does not fit: {sizes[0]} {how}; it needs {words} and the budget is {in_words(budget.budget_bytes)}{over}. "
        f"`autoaccum tune` finds what fits"
    )


def _arithmetic(budget: Budget) -> tuple[tuple[int, str], ...]:
    """What the budget was made of: the first term, less the rest. A remainder nobody explains is "in use"."""
    memory = budget.memory
    headroom = (budget.headroom_bytes, "headroom")
    outside = memory.outside_bytes if memory.outside_bytes is not None else ASSUMED_OUTSIDE if budget.cap_bytes is not None else 0
    context = ((outside, "context"),) if outside else ()
    whole = budget.budget_bytes + budget.headroom_bytes
    if budget.cap_bytes is not None and whole == budget.cap_bytes - outside:
        return ((budget.cap_bytes, "limit"), *context, headroom)
    others = tuple((other.bytes, f"{other.name} {other.pid}") for other in memory.others if other.bytes)
    rest = memory.total_bytes - whole - sum(bytes_ for bytes_, _ in (*others, *context))
    if rest < 0:  # resident pages that processes share are counted with each
        others, rest = (), memory.total_bytes - whole - sum(bytes_ for bytes_, _ in context)
    word = "cgroup limit" if memory.binding_limit.startswith("cgroup") else "total"
    return ((memory.total_bytes, word), *others, *context, *(((rest, "in use"),) if rest > 0 else ()), headroom)


def _drift(before: Budget, after: Budget) -> tuple[str, ...]:
    """Free memory that others took or gave while we measured, if it is more than the headroom."""
    taken = before.budget_bytes - after.budget_bytes
    if taken <= after.headroom_bytes:
        return ()
    known = {other.pid: other.bytes or 0 for other in before.memory.others}
    grown = sorted(((other.bytes or 0) - known.get(other.pid, 0), other.name, other.pid) for other in after.memory.others)
    who = f", {grown[-1][1]} (process {grown[-1][2]}) took {in_words(grown[-1][0])}" if grown and grown[-1][0] > 0 else ""
    return (f"{in_words(taken)} of memory went to others while measuring{who}: leave more headroom, or tune again",)


def _hints(wish: Wish, found: search.Found, sizes: tuple[int, ...], smallest: int, *, for_command: bool, steady: bool) -> Iterator[str]:
    target, most = wish.target_batch, found.largest_fit
    if for_command and steady:
        settings = " ".join(f"{name}={value}" for name, value in STEADY_MALLOC.items())
        yield f"measured with {settings} in the environment, which makes freed memory go back at once: set them for training too"
    if wish.equal:
        # How much fits between the answer and the next divisor is known only where something predicts it.
        above = (found.smallest_refused or target + 1) - 1
        most = min(max(most, found.predicted_largest or above), wish.max_micro_batch or target)
        fewest = math.ceil(target / most)
        if len(sizes) > fewest and (better := plan.easier_targets(target, most, smallest)):
            uneven = "" if for_command else f" without --equal {target} is {notation(plan.micro_batches(target, fewest))}, and"
            yield f"{plan.why_unequal(target)}: equal micro-batches cost {len(sizes)} steps; as far as it fits,{uneven} easier targets are {better}"
    elif sizes[0] != sizes[-1]:
        equal = plan.equal_split(target, most, smallest)
        if equal is not None:
            better = plan.easier_targets(target, most, smallest) if equal[1] > 2 * len(sizes) else ""
            yield f"frameworks need equal micro-batches: --equal gives {equal[0]} x {equal[1]}" + (f"; easier targets are {better}" if better else "")


def _versions() -> dict[str, str]:
    found = {"autoaccum": __version__, "python": platform.python_version()}
    try:
        found["torch"] = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        found["torch"] = "unknown"
    return found
