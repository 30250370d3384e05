"""The trial of an evaluation: one batch runs forward only, while the state of the optimizers is resident."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from autoaccum.data import batches
from autoaccum.devices import Budget, Device
from autoaccum.errors import UsageError
from autoaccum.probe import trial
from autoaccum.probe.readings import Reading
from autoaccum.window import Job, PhaseCallback


@dataclass(frozen=True)
class Evaluation:
    """What evaluation runs.

    run: `run(model, batch)`, with the model in eval mode and without gradients; None for the loss of each job.
    make_batch: `make_batch(n)`, the worst batch of n samples that evaluation gets; None for the job's own batch.
    most: the largest batch to try, for instance the number of samples in the evaluation set; None if it is not known.
    """

    run: Callable[[Any, Any], Any] | None = None
    make_batch: Callable[[int], Any] | None = None
    most: int | None = None

    @classmethod
    def of(cls, given: Evaluation | Callable[[Any, Any], Any] | bool) -> Evaluation | None:
        """What the user gave as `evaluate`; None if evaluation is not asked about. Raises `UsageError` for anything else."""
        if isinstance(given, bool):
            return cls() if given else None
        if isinstance(given, Evaluation):
            return given
        if not callable(given):
            raise UsageError(f"evaluate must be True, or a function evaluate(model, batch) that runs one batch forward, not {given!r}")
        return cls(given)


def measure_evaluation(
    jobs: Sequence[Job],
    device: Device,
    evaluation: Evaluation,
    samples: int,
    trained: int,
    *,
    allowed: Budget,
    enforce: bool,
    aside_bytes: int = 0,
    timeout_s: float | None = None,
    on_phase: PhaseCallback | None = None,
) -> Reading:
    """Trains one micro-batch, so that the optimizers hold their state, then runs `samples` samples forward, and returns the peak of that.

    trained: the size of the micro-batch that trains first, as a window of one; it must fit.
    The other arguments, the state afterwards and what is raised are those of `trial.measure`.
    """
    base_bytes: int | None = None
    forward_bytes: int | None = None

    def evaluate(listener: trial.PhaseListener) -> None:
        nonlocal base_bytes, forward_bytes
        held = trial.step_once(jobs, device, trained, listener)
        device.release()
        listener.watch.restart()  # a library's search for kernels in the step is not evaluation's
        base_bytes = device.live_bytes() - aside_bytes
        listener.watch.lap_bytes()
        listener("evaluate", 0)
        batch = jobs[0].batch_of(samples) if evaluation.make_batch is None else evaluation.make_batch(samples)
        searches = device.facts.kind == "cuda" and torch.backends.cudnn.benchmark
        _forward(jobs, evaluation, batch)
        device.synchronize()
        if searches or listener.watch.retries():
            # The first forward of a shape may have searched for kernels, with all memory that was free. Evaluation goes on without.
            device.release()
            listener.watch.restart()
            _forward(jobs, evaluation, batch)
            device.synchronize()
        forward_bytes = listener.watch.lap_bytes() - aside_bytes
        del held

    with torch.compiler.set_stance("force_eager" if any(job.is_compiled for job in jobs) else "default"):  # it would compile for every size
        ended = trial.attempt(
            jobs, device, evaluate, samples, allowed=allowed, enforce=enforce, aside_bytes=aside_bytes, timeout_s=timeout_s, on_phase=on_phase
        )
    return Reading(
        samples,
        1,
        ended.outcome,
        ended.phase,
        ended.peak_bytes,
        ended.seconds,
        base_bytes=base_bytes,
        activation_bytes=forward_bytes,  # a step of a small micro-batch may peak above a small evaluation
        budget_bytes=allowed.budget_bytes,
    )


def _forward(jobs: Sequence[Job], evaluation: Evaluation, batch: Any) -> None:
    for job in jobs:
        with in_eval_mode(job), torch.no_grad(), torch.autocast(job.device.type, dtype=job.autocast, enabled=job.autocast is not None):
            (evaluation.run or job.loss)(job.model, batches.move(batch, job.device))


@contextmanager
def in_eval_mode(job: Job) -> Iterator[None]:
    """The job's model in eval mode; afterwards every module is in its own mode again."""
    modes = [(module, module.training) for module in job.model.modules()]
    job.model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
