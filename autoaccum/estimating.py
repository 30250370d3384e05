"""The line for cards that are not here: a job is traced in a process of its own, and every card gets its plan."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from autoaccum import profiles
from autoaccum.child import Child, die_with, hush
from autoaccum.devices.base import LEAST_GPU_HEADROOM
from autoaccum.errors import JobError, UsageError
from autoaccum.explaining import notation
from autoaccum.job import Source, source
from autoaccum.line import Wish
from autoaccum.reading import Estimate, Limits
from autoaccum.units import in_words, number, parse_headroom, unit_for

_DETAILED = 8  # for up to so many cards the largest micro-batches are searched, too


@dataclass(frozen=True)
class Estimates:
    """Estimates of one job on several cards, in the order they were asked for. `gpus` holds an `Estimate` each."""

    job: str
    target_batch: int
    gpus: tuple[Estimate, ...]
    seconds: float
    tape: dict[str, Any] | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return self.explain()

    def explain(self) -> str:
        """A table of cards, one a line, and what is to be said of them below."""
        shapes = next((each.measured_at for each in self.gpus if each.measured_at), None) or {}
        of = ", ".join(f"{path} {('n', *shape[1:])}".replace("'", "") for path, shape in list(shapes.items())[:4])
        lines = [f"{self.target_batch} samples a step of {self.job}" + (f", simulated at {of}" if of else "") + "; from weights on what is held at the peak"]
        lines[0] += ", the rest being workspaces, a step's own, and free between blocks"
        lines.append("".join(f"{title:<{width}}" for title, width in _TABLE).rstrip())
        lines += [_row(each) for each in self.gpus]
        for each in self.gpus:
            lines += _said_of(each)
        lines += [f"warning: {warning}" for warning in dict.fromkeys(warning for each in self.gpus for warning in each.warnings)]
        lines += [f"margin: {margin}" for margin in dict.fromkeys(each.margin for each in self.gpus)]
        guessed = sorted({name for each in self.gpus for name in each.estimated if name in ("total_bytes", "context_bytes", "cublas_workspace_bytes")})
        if guessed:
            some = ", for some of these cards" if len(self.gpus) > 1 else ""
            lines.append(f"estimated, not measured{some}: {', '.join(guessed)} (autoaccum profiles show NAME)")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """The document that `estimate --json` prints, schema autoaccum.estimate/1."""
        return {
            "schema": "autoaccum.estimate/1",
            "job": self.job,
            "target_batch": self.target_batch,
            "gpus": [each.as_dict() for each in self.gpus],
            "seconds": self.seconds,
        }


_TABLE = (
    ("gpu", 24),
    ("plan", 21),
    ("peak", 26),
    ("budget", 10),
    ("weights", 10),
    ("gradients", 10),
    ("optimizer", 10),
    ("activations", 12),
    ("rest", 10),
)


def _row(each: Estimate) -> str:
    parts, unit = each.breakdown, unit_for(each.peak_bytes)
    low, high = each.peak_interval_bytes
    cells = [
        each.gpu,
        notation(each.micro_batches) if each.fits else "does not fit",
        f"{in_words(each.peak_bytes, unit)} ({number(low, unit)} to {number(high, unit)})",
        in_words(each.budget_bytes),
        *(in_words(parts[kind]) for kind in ("parameters", "gradients", "optimizer", "activations")),
        in_words(parts["workspace"] + parts["step"] + parts["unused"]),
    ]
    return "".join(f"{cell:<{max(width, len(cell) + 1)}}" for cell, (_, width) in zip(cells, _TABLE)).rstrip()


def _said_of(each: Estimate) -> Iterator[str]:
    if not each.fits:
        need, there = in_words(each.peak_bytes), in_words(each.budget_bytes)
        close = " by the simulation, which may be off by more than what is left" if each.peak_bytes <= each.budget_bytes else ""
        yield f"{each.gpu}: the smallest micro-batch needs {need} of {there}{close}"
        yield from (f"  with {what}" for what in each.advice)
    elif each.largest_micro_batch is not None and each.hard_largest_micro_batch is not None:
        flushed = each.hard_largest_micro_batch
        more = f", {flushed} if the allocator flushes its cache on the way, which is slow" if flushed > each.largest_micro_batch else ""
        yield f"{each.gpu}: by the simulation alone, without headroom, the largest micro-batch is {each.largest_micro_batch}{more}"


def estimate(
    job: Any,
    *,
    target_batch: int,
    gpus: Sequence[str] | str | None = None,
    headroom: int | str = "3%",
    max_micro_batch: int | None = None,
    equal: bool = False,
) -> Estimates:
    """What cards that are not here would make of a job: fits or not, the plan, the peak, and where the memory goes.

    job: `"train.py:make_job"`, or a function that builds the `Job` (or a list of them): it is called in a copy of this
    process, so nothing here is touched. gpus: names or sizes (`"t4"`, `"24GiB"`), or one of them; None for every card known.
    The other keywords as in `tune`.

    Raises `UsageError` for an unknown card, `ProfileError` for a wrong data file, `JobError` for what cannot be traced.
    """
    wish = Wish(target_batch, None, headroom, max_micro_batch, equal)
    names = [gpus] if isinstance(gpus, str) else profiles.names() if gpus is None else list(gpus)
    if callable(job):
        return _forked(job, wish, names)
    if not isinstance(job, (str, Source)):
        raise UsageError(
            f"estimate needs a function that builds the job, or its file ('train.py:make_job'), not a {type(job).__name__}: the job itself is torn apart"
        )
    return estimate_source(job, wish, names)


def estimate_source(
    where: Source | str | None,
    wish: Wish,
    names: Sequence[str],
    *,
    said: Callable[[str], None] | None = None,
    timeline: str | None = None,
    buckets: bool = False,
) -> Estimates:
    """As `estimate`, for a job that a file builds. timeline: the card whose window is wanted as a tape, too. buckets: keeps room for
    the gradient buckets of DistributedDataParallel."""
    started = time.monotonic()
    _known(names, wish)
    origin = where if isinstance(where, Source) else source(where)
    if timeline is None and len(names) > _DETAILED:
        many = _side_by_side(origin, wish, names, replace(wish.limits, buckets=buckets), said)
        return Estimates(origin.label, wish.target_batch, many, round(time.monotonic() - started, 3))
    with Child(origin, f"virtual:{names[0]}", replace(wish.limits, buckets=buckets), said=said) as child:
        found = [child.estimate(name, wish.target_batch, **_wishes(wish, len(names))) for name in names]
        tape = None
        if timeline is not None:
            chosen = child.estimate(timeline, wish.target_batch, **_wishes(wish, len(names)))
            tape = child.tape(chosen.micro_batches)
    return Estimates(origin.label, wish.target_batch, tuple(found), round(time.monotonic() - started, 3), tape)


def _side_by_side(origin: Source, wish: Wish, names: Sequence[str], limits: Limits, said: Callable[[str], None] | None) -> tuple[Estimate, ...]:
    """For many cards: two processes at once, each with the cards that have traces in common."""
    kinds: dict[bool, list[str]] = {}
    for name in dict.fromkeys(names):
        kinds.setdefault(profiles.load(name).capability // 10 in (8, 12), []).append(name)
    children: list[Child] = []

    def of(group: Sequence[str]) -> list[Estimate]:
        with Child(origin, f"virtual:{group[0]}", limits, said=said) as child:
            children.append(child)
            return [child.estimate(name, wish.target_batch, **_wishes(wish, len(names))) for name in group]

    with ThreadPoolExecutor(len(kinds)) as pool:
        asked = [pool.submit(of, group) for group in kinds.values()]
        try:
            found = {name: each for group, answer in zip(kinds.values(), asked) for name, each in zip(group, answer.result())}
        except BaseException:
            for child in children:
                child.kill()
            raise
    return tuple(found[name] for name in names)


def _known(names: Sequence[str], wish: Wish) -> None:
    """Raises `UsageError` for no cards, an unknown one, and one that the headroom takes whole: before anything is built."""
    if not names:
        raise UsageError("no card was named: give --gpu NAME, or --all-gpus")
    for name in names:
        card = profiles.load(name)
        kept = parse_headroom(wish.headroom, card.available_bytes)
        if "%" in str(wish.headroom):
            kept = max(kept, LEAST_GPU_HEADROOM)
        if kept >= card.available_bytes:
            raise UsageError(f"{name} leaves nothing beside a headroom of {in_words(kept)}: name a larger card, or give a smaller headroom as a size")


def _wishes(wish: Wish, cards: int) -> dict[str, Any]:
    return {"most": wish.max_micro_batch, "equal": wish.equal, "both": cards <= _DETAILED}


def _forked(make: Callable[[], Any], wish: Wish, names: Sequence[str]) -> Estimates:
    """In a copy of this process, because the function may live in a notebook, and tracing turns torch inside out."""
    started = time.monotonic()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        raise UsageError("this process has used CUDA, so no copy of it can simulate a card: give the job's file, estimate('train.py:make_job', ...)")
    if not hasattr(os, "fork"):
        raise UsageError("this system cannot copy a process: give the job's file, estimate('train.py:make_job', ...)")
    _known(names, wish)
    receive, send = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    parent, copy = os.getpid(), os.fork()
    if copy == 0:
        _be_the_copy(make, wish, names, receive, send, parent)
    os.close(send)
    try:
        with os.fdopen(receive) as told:
            text = told.read()
    except BaseException:
        os.kill(copy, signal.SIGKILL)
        raise
    finally:
        os.waitpid(copy, 0)
    if not text:
        raise UsageError("the copy of this process ended while it simulated: give the job's file, estimate('train.py:make_job', ...)")
    answer = json.loads(text)
    if "error" in answer:
        from autoaccum.child import raised

        raise raised(answer["error"])
    return Estimates(getattr(make, "__name__", "job"), wish.target_batch, tuple(map(Estimate.from_dict, answer["gpus"])), round(time.monotonic() - started, 3))


def _be_the_copy(make: Callable[[], Any], wish: Wish, names: Sequence[str], receive: int, send: int, parent: int) -> NoReturn:
    """The copy's whole life. It must never come back into the caller's program."""
    try:
        die_with(parent)
        os.close(receive)
        os.dup2(2, 1)  # stdout is the caller's
        hush()
        import torch

        torch.set_num_threads(1)  # the pool's other threads were not copied, and would be waited for
        with os.fdopen(send, "w") as answer:
            json.dump(_in_the_copy(make, wish, names), answer)
    finally:
        os._exit(0)


def _in_the_copy(make: Callable[[], Any], wish: Wish, names: Sequence[str]) -> dict[str, Any]:
    from autoaccum import phantom, simulation
    from autoaccum.child import told
    from autoaccum.job import in_turn
    from autoaccum.simulate import fake

    try:
        with phantom.unfilled():
            jobs = in_turn(make())
        approximate = ""
        try:
            fake.enable()
            fake.self_test()
        except fake.CannotFake as reason:
            approximate = str(reason)
        simulated = simulation.Simulation(jobs, profiles.load(names[0]), wish.limits, approximate=approximate)
        return {"gpus": [simulated.estimated(name, wish.target_batch, **_wishes(wish, len(names))) for name in names]}
    except (Exception, SystemExit) as error:
        if "fork-based multiprocessing" in str(error):
            error = UsageError(
                "this process has run backward before, so no copy of it can: give the job's file, estimate('train.py:make_job', ...), or estimate first"
            )
        if isinstance(error, SystemExit):
            error = JobError(f"the function ended the process (exit code {error.code}): let it return the Job")
        return {"error": told(error)}
