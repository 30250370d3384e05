"""The line for cards that are not here: a job is traced in a process of its own, and every card gets its plan."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from autoaccum import profiles
from autoaccum.child import Child
from autoaccum.errors import UsageError
from autoaccum.job import Source, source
from autoaccum.reading import Estimate
from autoaccum.tuning import Wish

_DETAILED = 8  # for up to so many cards the largest micro-batches are searched, too


@dataclass(frozen=True)
class Estimates:
    """Estimates of one job on several cards, in the order they were asked for. `gpus` holds an `Estimate` each."""

    job: str
    target_batch: int
    gpus: tuple[Estimate, ...]
    seconds: float
    tape: dict[str, Any] | None = field(default=None, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """The document that `estimate --json` prints, schema autoaccum.estimate/1."""
        return {
            "schema": "autoaccum.estimate/1",
            "job": self.job,
            "target_batch": self.target_batch,
            "gpus": [each.as_dict() for each in self.gpus],
            "seconds": self.seconds,
        }


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
    where: Source | str | None, wish: Wish, names: Sequence[str], *, said: Callable[[str], None] | None = None, timeline: str | None = None
) -> Estimates:
    """As `estimate`, for a job that a file builds. timeline: the card whose window is wanted as a tape, too."""
    started = time.monotonic()
    cards = [profiles.load(name) for name in names]  # an unknown one is told before anything is built
    if not cards:
        raise UsageError("no card was named: give --gpu NAME, or --all-gpus")
    origin = where if isinstance(where, Source) else source(where)
    with Child(origin, f"virtual:{names[0]}", wish.limits, said=said) as child:
        found = [child.estimate(name, wish.target_batch, **_wishes(wish, len(names))) for name in names]
        tape = None
        if timeline is not None:
            chosen = child.estimate(timeline, wish.target_batch, **_wishes(wish, len(names)))
            tape = child.tape(chosen.micro_batches or (min(wish.target_batch, 1),))
    return Estimates(origin.label, wish.target_batch, tuple(found), round(time.monotonic() - started, 3), tape)


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
    for name in names:
        profiles.load(name)
    receive, send = os.pipe()
    copy = os.fork()
    if copy == 0:
        os.close(receive)
        with os.fdopen(send, "w") as answer:
            json.dump(_in_the_copy(make, wish, names), answer)
        os._exit(0)
    os.close(send)
    with os.fdopen(receive) as told:
        text = told.read()
    os.waitpid(copy, 0)
    if not text:
        raise UsageError("the copy of this process ended while it simulated: give the job's file, estimate('train.py:make_job', ...)")
    answer = json.loads(text)
    if "error" in answer:
        from autoaccum.child import raised

        raise raised(answer["error"])
    return Estimates(getattr(make, "__name__", "job"), wish.target_batch, tuple(map(Estimate.from_dict, answer["gpus"])), round(time.monotonic() - started, 3))


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
    except Exception as error:
        if "fork-based multiprocessing" in str(error):
            error = UsageError(
                "this process has run backward before, so no copy of it can: give the job's file, estimate('train.py:make_job', ...), or estimate first"
            )
        return {"error": told(error)}
