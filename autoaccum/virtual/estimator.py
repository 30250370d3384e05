"""The function `estimate`: it traces a job in a separate process and returns its plan for cards that are not here."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, NoReturn

from autoaccum.devices import LEAST_GPU_HEADROOM
from autoaccum.errors import AutoaccumError, JobError, UsageError, as_document, from_document
from autoaccum.probe import Child, Limits, Request, die_with_parent
from autoaccum.simulate import profiles
from autoaccum.tuner import changes
from autoaccum.units import in_words, parse_headroom
from autoaccum.virtual.estimate import ENGINES, Estimate, Estimates
from autoaccum.window import Source, parse_source

_DETAILED = 8  # up to this number of cards, the largest micro-batches are also searched


def estimate(
    job: Any,
    *,
    target_batch: int,
    gpus: Sequence[str] | str | None = None,
    headroom: int | str = "3%",
    max_micro_batch: int | None = None,
    equal: bool = False,
    what_if: bool = False,
    world: int = 1,
    shard: str | None = None,
) -> Estimates:
    """Estimates a job on cards that are not here: if it fits, its plan, its peak, and a breakdown of the memory.

    job: `"train.py:make_job"`, or a function that builds the `Job` (or a list of jobs). The function runs in a copy of this
    process, so this process does not change.
    gpus: a name or a size (`"t4"`, `"24GiB"`), or a list of them; None for all known cards.
    what_if: also trace the job with changes that make it need less memory: bfloat16 autocast, blocks checkpointed, a fused optimizer, LoRA, half
    the length, and several of them. For a job's file; `Estimates.what_if` has them by card.
    world: the number of equal cards that train together; the target is that of all. shard: what divides or copies their state: "ddp" (the default),
    "fsdp2", "zero1", "zero2" or "zero3". The plan is then that of a rank with the largest share.
    The other keywords are those of `tune`.

    Raises `UsageError` for an unknown card, `ProfileError` for an invalid data file, `JobError` for a job that cannot be traced.
    """
    request, ranks = Request(target_batch, None, headroom, max_micro_batch, equal), _ranks(world, shard)
    names = [gpus] if isinstance(gpus, str) else profiles.names() if gpus is None else list(gpus)
    if callable(job) and what_if:
        raise UsageError("what_if=True builds the job several times, each in a process of its own: give the job's file, 'train.py:make_job'")
    if callable(job):
        return _forked(job, request, names, ranks)
    if not isinstance(job, (str, Source)):
        raise UsageError(
            f"estimate needs a function that builds the job, or its file ('train.py:make_job'), not a {type(job).__name__}: the job itself is torn apart"
        )
    return estimate_source(job, request, names, what_if=what_if, world=world, shard=shard)


def _ranks(world: int, shard: str | None) -> tuple[int, str]:
    """The number of ranks, and what divides or copies their state; "" on one. Raises `UsageError` for what is none."""
    if isinstance(world, bool) or not isinstance(world, int) or world < 1:
        raise UsageError(f"world must be a number of ranks, at least 1, not {world!r}")
    if shard is not None and shard not in ENGINES:
        raise UsageError(f"shard must be one of {', '.join(ENGINES)}, not {shard!r}")
    if shard is not None and world == 1:
        raise UsageError(f"shard={shard!r} divides the state over ranks: say how many with world")
    return world, (shard or "ddp") if world > 1 else ""


def _of_rank(request: Request, ranks: tuple[int, str]) -> Request:
    """The request of the rank with the largest share. Raises `UsageError` for fewer samples than ranks."""
    world, engine = ranks
    if request.samples < world:
        raise UsageError(f"a target batch of {request.samples} over {world} ranks leaves some without a sample: give a larger one, or fewer ranks")
    share = Request(-(-request.samples // world), None, request.headroom, request.max_micro_batch, request.equal)
    object.__setattr__(share, "limits", replace(share.limits, engine=engine, world=world))
    return share


def estimate_source(
    where: Source | str | None,
    request: Request,
    names: Sequence[str],
    *,
    on_output: Callable[[str], None] | None = None,
    on_stage: Callable[[str], None] = lambda words: None,
    timeline: str | None = None,
    buckets: bool = False,
    what_if: bool = False,
    world: int = 1,
    shard: str | None = None,
) -> Estimates:
    """Does the same as `estimate`, for a job that a file builds.

    on_output: called with the text that the job prints. on_stage: called with what is traced now, in words. timeline: the card whose window is also returned as a tape.
    buckets: True to keep memory free for the gradient buckets of DistributedDataParallel. what_if, world, shard: as in `estimate`.
    """
    started = time.monotonic()
    target, (world, engine) = request.samples, _ranks(world, shard)
    request = _of_rank(request, (world, engine))
    _check_cards(names, request)
    origin = where if isinstance(where, Source) else parse_source(where)
    if timeline is None and len(names) > _DETAILED:
        many = _side_by_side(origin, request, names, replace(request.limits, buckets=buckets), on_output, on_stage)
        return Estimates(origin.label, target, many, round(time.monotonic() - started, 3), world=world, shard=engine)
    with Child(origin, f"virtual:{names[0]}", replace(request.limits, buckets=buckets), on_output=on_output) as child:
        estimates = []
        for name in names:
            on_stage(f"tracing the job for {name}")
            estimates.append(_estimate_card(child, name, request, len(names)))
        tape = None
        if timeline is not None:
            chosen = _estimate_card(child, timeline, request, len(names))
            tape = child.simulated("taped", sizes=list(chosen.micro_batches))
    found = _what_if(origin, request, names, replace(request.limits, buckets=buckets), estimates, on_stage) if what_if else {}
    return Estimates(origin.label, target, tuple(estimates), round(time.monotonic() - started, 3), tape, found, world, engine)


def _what_if(
    origin: Source, request: Request, names: Sequence[str], limits: Limits, unchanged: Sequence[Estimate], on_stage: Callable[[str], None]
) -> dict[str, tuple[changes.WhatIf, ...]]:
    """By card: the job with each set of changes that it can have, traced, the quickest first and those that do not fit last."""
    found: dict[str, list[_Traced]] = {name: [] for name in names}
    refused: dict[str, str] = {}  # by change: why the job cannot have it

    def traced_with(wanted: tuple[str, ...], cards: Sequence[str] = names) -> dict[str, _Traced]:
        on_stage(f"tracing the job with {changes.in_words(wanted)}")
        return _changed(origin, wanted, cards, request, limits)

    def tried(wanted: tuple[str, ...]) -> None:
        try:
            for name, traced in traced_with(wanted).items():
                found[name].append(traced)
        except UsageError as error:  # the job has it already, or cannot have it
            if len(wanted) == 1:
                refused[wanted[0]] = str(error)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(tried, changes.ALONE))
        list(pool.map(tried, changes.together(refused)))
    for name, estimate in zip(names, unchanged) if "half-length" not in refused else ():
        whole = [each for each in found[name] if "half-length" not in each.row.changes and each.estimate is not None]
        if not estimate.fits and not any(each.row.fits for each in whole):
            least = min(whole, key=lambda each: each.excess, default=_Traced(changes.WhatIf((), False, (), 0, 1.0), estimate))
            half = next((each.excess for each in found[name] if each.row.changes == (*least.row.changes, "half-length")), None)
            found[name] += _longest(partial(traced_with, cards=[name]), least, half)
    return {name: tuple(sorted((each.row for each in rows), key=lambda row: (not row.fits, row.times, row.peak_bytes))) for name, rows in found.items()}


class _Traced(NamedTuple):
    """A changed job on a card. estimate: None if it could not be traced."""

    row: changes.WhatIf
    estimate: Estimate | None

    @property
    def excess(self) -> float:
        """The bytes by which it is above the budget; negative if it fits."""
        if self.estimate is None:
            return math.inf
        over = self.estimate.peak_interval_bytes[1] - self.estimate.budget_bytes
        return min(over, -1) if self.estimate.fits else max(over, 1)


def _longest(traced: Callable[[tuple[str, ...]], dict[str, _Traced]], least: _Traced, half: float | None) -> list[_Traced]:
    """The job at the longest length that fits, with those changes that take the least memory; nothing if no length fits."""
    seen: dict[int, _Traced] = {}

    def excess(percent: int) -> float:
        (seen[percent],) = traced((*least.row.changes, changes.of_length(percent))).values()
        return seen[percent].excess

    percent = changes.longest(excess, whole=least.excess, half=half)
    found = seen.get(percent or min(seen, default=0))  # where no length fits, the shortest that was looked at says so
    if found is None or found.estimate is None or least.estimate is None:
        return []
    before, now = ((each.estimate.measured_at or {}) for each in (least, found) if each.estimate is not None)
    length = next((shape[1] for path, shape in now.items() if len(shape) > 1 and before.get(path, shape) != shape), None)
    return [found._replace(row=replace(found.row, length=length))]


def _changed(origin: Source, wanted: tuple[str, ...], names: Sequence[str], request: Request, limits: Limits) -> dict[str, _Traced]:
    """By card: the job with these changes, traced. Raises `UsageError` if it cannot have them."""
    found = {}
    try:
        with Child(replace(origin, changes=wanted), f"virtual:{names[0]}", limits) as child:
            for name in names:
                card, told = profiles.load(name), _estimate_card(child, name, request, _DETAILED + 1)
                fp32, half = card.flops.get("fp32"), card.flops.get("bf16") or card.flops.get("fp16")
                rate = half.value / fp32.value if fp32 and half else 1.0
                found[name] = _Traced(changes.WhatIf(wanted, told.fits, told.micro_batches, told.peak_bytes, changes.times(wanted, rate)), told)
    except UsageError:
        raise
    except AutoaccumError as error:
        return {name: _Traced(changes.WhatIf(wanted, False, (), 0, changes.times(wanted, 1.0), str(error)[:200]), None) for name in names}
    return found


def timed(origin: Source, request: Request, most: dict[str, int], *, on_output: Callable[[str], None] | None = None) -> dict[str, dict[str, Any]]:
    """The time curves of a job by card, as `Simulation.timed` returns them. most: by card, its largest micro-batch."""
    names = list(most)
    with Child(origin, f"virtual:{names[0]}", request.limits, on_output=on_output) as child:
        return {name: child.simulated("timed", gpu=name, most=most[name]) for name in names}


def _side_by_side(
    origin: Source, request: Request, names: Sequence[str], limits: Limits, on_output: Callable[[str], None] | None, on_stage: Callable[[str], None]
) -> tuple[Estimate, ...]:
    """Estimates for many cards, in two processes at the same time. Cards that share their traces are in the same process."""
    kinds: dict[bool, list[str]] = {}
    for name in dict.fromkeys(names):
        kinds.setdefault(profiles.load(name).capability // 10 in (8, 12), []).append(name)
    children: list[Child] = []
    begun: list[str] = []

    def of(group: Sequence[str]) -> list[Estimate]:
        with Child(origin, f"virtual:{group[0]}", limits, on_output=on_output) as child:
            children.append(child)
            made = []
            for name in group:
                begun.append(name)
                on_stage(f"tracing the job for {name}, {len(begun)} of {sum(map(len, kinds.values()))} cards")
                made.append(_estimate_card(child, name, request, len(names)))
            return made

    with ThreadPoolExecutor(len(kinds)) as pool:
        futures = [pool.submit(of, group) for group in kinds.values()]
        try:
            estimates = {name: result for group, future in zip(kinds.values(), futures) for name, result in zip(group, future.result())}
        except BaseException:
            for child in children:
                child.kill()
            raise
    return tuple(estimates[name] for name in names)


def _check_cards(names: Sequence[str], request: Request) -> None:
    """Checks the cards before the job is built.

    Raises `UsageError` for an empty list, an unknown card, or a headroom that leaves no memory of a card.
    """
    if not names:
        raise UsageError("no card was named: give --gpu NAME, or --all-gpus")
    for name in names:
        card = profiles.load(name)
        headroom = parse_headroom(request.headroom, card.available_bytes)
        if "%" in str(request.headroom):
            headroom = max(headroom, LEAST_GPU_HEADROOM)
        if headroom >= card.available_bytes:
            raise UsageError(f"{name} leaves nothing beside a headroom of {in_words(headroom)}: name a larger card, or give a smaller headroom as a size")


def _estimate_card(child: Child, gpu: str, request: Request, cards: int) -> Estimate:
    return Estimate.from_dict(child.simulated("estimated", gpu=gpu, target=request.samples, **_search_options(request, cards)))


def _search_options(request: Request, cards: int) -> dict[str, Any]:
    return {"most": request.max_micro_batch, "equal": request.equal, "both": cards <= _DETAILED}


def _forked(make: Callable[[], Any], request: Request, names: Sequence[str], ranks: tuple[int, str]) -> Estimates:
    """Estimates in a copy of this process: the function may live in a notebook, and tracing changes torch for the whole process."""
    started = time.monotonic()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        raise UsageError("this process has used CUDA, so no copy of it can simulate a card: give the job's file, estimate('train.py:make_job', ...)")
    if not hasattr(os, "fork"):
        raise UsageError("this system cannot copy a process: give the job's file, estimate('train.py:make_job', ...)")
    target, request = request.samples, _of_rank(request, ranks)
    _check_cards(names, request)
    receive, send = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    parent, copy = os.getpid(), os.fork()
    if copy == 0:
        _run_copy(make, request, names, receive, send, parent)
    os.close(send)
    try:
        with os.fdopen(receive) as pipe:
            text = pipe.read()
    except BaseException:
        os.kill(copy, signal.SIGKILL)
        raise
    finally:
        os.waitpid(copy, 0)
    if not text:
        raise UsageError("the copy of this process ended while it simulated: give the job's file, estimate('train.py:make_job', ...)")
    answer = json.loads(text)
    if "error" in answer:
        raise from_document(answer["error"])
    found = tuple(map(Estimate.from_dict, answer["gpus"]))
    return Estimates(getattr(make, "__name__", "job"), target, found, round(time.monotonic() - started, 3), world=ranks[0], shard=ranks[1])


def _run_copy(make: Callable[[], Any], request: Request, names: Sequence[str], receive: int, send: int, parent: int) -> NoReturn:
    """Runs the copy of the process until it exits. The copy must never return to the caller's program."""
    try:
        die_with_parent(parent)
        os.close(receive)
        os.dup2(2, 1)  # stdout belongs to the caller
        import torch

        from autoaccum.trace import quieten_torch

        quieten_torch()

        torch.set_num_threads(1)  # fork does not copy the threads of torch's pool, and torch would wait for them
        with os.fdopen(send, "w") as answer:
            json.dump(_estimate_in_copy(make, request, names), answer)
    finally:
        os._exit(0)


def _estimate_in_copy(make: Callable[[], Any], request: Request, names: Sequence[str]) -> dict[str, Any]:
    from autoaccum.trace import fake_cuda
    from autoaccum.virtual import simulation
    from autoaccum.virtual.empty_weights import without_memory
    from autoaccum.window import as_jobs

    try:
        with without_memory():
            jobs = as_jobs(make())
        approximate = fake_cuda()
        simulated = simulation.Simulation(jobs, profiles.load(names[0]), request.limits, approximate=approximate)
        return {"gpus": [simulated.estimated(name, request.samples, **_search_options(request, len(names))) for name in names]}
    except (Exception, SystemExit) as error:
        if "fork-based multiprocessing" in str(error):
            error = UsageError(
                "this process has run backward before, so no copy of it can: give the job's file, estimate('train.py:make_job', ...), or estimate first"
            )
        if isinstance(error, SystemExit):
            error = JobError(f"the function ended the process (exit code {error.code}): let it return the Job")
        return {"error": as_document(error)}
