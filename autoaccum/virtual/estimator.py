"""The line for cards that are not here: a job is traced in a process of its own, and every card gets its plan."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NoReturn

from autoaccum.devices import LEAST_GPU_HEADROOM
from autoaccum.errors import JobError, UsageError, as_document, from_document
from autoaccum.probe import Child, Limits, Request, die_with_parent
from autoaccum.simulate import profiles
from autoaccum.units import in_words, parse_headroom
from autoaccum.virtual.estimate import Estimate, Estimates
from autoaccum.window import Source, parse_source

_DETAILED = 8  # for up to so many cards the largest micro-batches are searched, too


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
    request = Request(target_batch, None, headroom, max_micro_batch, equal)
    names = [gpus] if isinstance(gpus, str) else profiles.names() if gpus is None else list(gpus)
    if callable(job):
        return _forked(job, request, names)
    if not isinstance(job, (str, Source)):
        raise UsageError(
            f"estimate needs a function that builds the job, or its file ('train.py:make_job'), not a {type(job).__name__}: the job itself is torn apart"
        )
    return estimate_source(job, request, names)


def estimate_source(
    where: Source | str | None,
    request: Request,
    names: Sequence[str],
    *,
    on_output: Callable[[str], None] | None = None,
    timeline: str | None = None,
    buckets: bool = False,
) -> Estimates:
    """As `estimate`, for a job that a file builds. timeline: the card whose window is wanted as a tape, too. buckets: keeps room for
    the gradient buckets of DistributedDataParallel."""
    started = time.monotonic()
    _known(names, request)
    origin = where if isinstance(where, Source) else parse_source(where)
    if timeline is None and len(names) > _DETAILED:
        many = _side_by_side(origin, request, names, replace(request.limits, buckets=buckets), on_output)
        return Estimates(origin.label, request.target_batch, many, round(time.monotonic() - started, 3))
    with Child(origin, f"virtual:{names[0]}", replace(request.limits, buckets=buckets), on_output=on_output) as child:
        found = [_estimated(child, name, request, len(names)) for name in names]
        tape = None
        if timeline is not None:
            chosen = _estimated(child, timeline, request, len(names))
            tape = child.simulated("tape", sizes=list(chosen.micro_batches))
    return Estimates(origin.label, request.target_batch, tuple(found), round(time.monotonic() - started, 3), tape)


def _side_by_side(origin: Source, request: Request, names: Sequence[str], limits: Limits, on_output: Callable[[str], None] | None) -> tuple[Estimate, ...]:
    """For many cards: two processes at once, each with the cards that have traces in common."""
    kinds: dict[bool, list[str]] = {}
    for name in dict.fromkeys(names):
        kinds.setdefault(profiles.load(name).capability // 10 in (8, 12), []).append(name)
    children: list[Child] = []

    def of(group: Sequence[str]) -> list[Estimate]:
        with Child(origin, f"virtual:{group[0]}", limits, on_output=on_output) as child:
            children.append(child)
            return [_estimated(child, name, request, len(names)) for name in group]

    with ThreadPoolExecutor(len(kinds)) as pool:
        asked = [pool.submit(of, group) for group in kinds.values()]
        try:
            found = {name: each for group, answer in zip(kinds.values(), asked) for name, each in zip(group, answer.result())}
        except BaseException:
            for child in children:
                child.kill()
            raise
    return tuple(found[name] for name in names)


def _known(names: Sequence[str], request: Request) -> None:
    """Raises `UsageError` for no cards, an unknown one, and one that the headroom takes whole: before anything is built."""
    if not names:
        raise UsageError("no card was named: give --gpu NAME, or --all-gpus")
    for name in names:
        card = profiles.load(name)
        kept = parse_headroom(request.headroom, card.available_bytes)
        if "%" in str(request.headroom):
            kept = max(kept, LEAST_GPU_HEADROOM)
        if kept >= card.available_bytes:
            raise UsageError(f"{name} leaves nothing beside a headroom of {in_words(kept)}: name a larger card, or give a smaller headroom as a size")


def _estimated(child: Child, gpu: str, request: Request, cards: int) -> Estimate:
    return Estimate.from_dict(child.simulated("estimate", gpu=gpu, target=request.target_batch, **_wishes(request, cards)))


def _wishes(request: Request, cards: int) -> dict[str, Any]:
    return {"most": request.max_micro_batch, "equal": request.equal, "both": cards <= _DETAILED}


def _forked(make: Callable[[], Any], request: Request, names: Sequence[str]) -> Estimates:
    """In a copy of this process, because the function may live in a notebook, and tracing turns torch inside out."""
    started = time.monotonic()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        raise UsageError("this process has used CUDA, so no copy of it can simulate a card: give the job's file, estimate('train.py:make_job', ...)")
    if not hasattr(os, "fork"):
        raise UsageError("this system cannot copy a process: give the job's file, estimate('train.py:make_job', ...)")
    _known(names, request)
    receive, send = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    parent, copy = os.getpid(), os.fork()
    if copy == 0:
        _be_the_copy(make, request, names, receive, send, parent)
    os.close(send)
    try:
        with os.fdopen(receive) as as_document:
            text = as_document.read()
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
    return Estimates(
        getattr(make, "__name__", "job"), request.target_batch, tuple(map(Estimate.from_dict, answer["gpus"])), round(time.monotonic() - started, 3)
    )


def _be_the_copy(make: Callable[[], Any], request: Request, names: Sequence[str], receive: int, send: int, parent: int) -> NoReturn:
    """The copy's whole life. It must never come back into the caller's program."""
    try:
        die_with_parent(parent)
        os.close(receive)
        os.dup2(2, 1)  # stdout is the caller's
        import torch

        from autoaccum.simulate import quieten_torch

        quieten_torch()

        torch.set_num_threads(1)  # the pool's other threads were not copied, and would be waited for
        with os.fdopen(send, "w") as answer:
            json.dump(_in_the_copy(make, request, names), answer)
    finally:
        os._exit(0)


def _in_the_copy(make: Callable[[], Any], request: Request, names: Sequence[str]) -> dict[str, Any]:
    from autoaccum.simulate import fake_cuda
    from autoaccum.virtual import simulation
    from autoaccum.virtual.empty_weights import without_memory
    from autoaccum.window import as_jobs

    try:
        with without_memory():
            jobs = as_jobs(make())
        approximate = fake_cuda()
        simulated = simulation.Simulation(jobs, profiles.load(names[0]), request.limits, approximate=approximate)
        return {"gpus": [simulated.estimated(name, request.target_batch, **_wishes(request, len(names))) for name in names]}
    except (Exception, SystemExit) as error:
        if "fork-based multiprocessing" in str(error):
            error = UsageError(
                "this process has run backward before, so no copy of it can: give the job's file, estimate('train.py:make_job', ...), or estimate first"
            )
        if isinstance(error, SystemExit):
            error = JobError(f"the function ended the process (exit code {error.code}): let it return the Job")
        return {"error": as_document(error)}
