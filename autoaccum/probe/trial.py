"""One rehearsal of the real window: measured, and undone.

Window 1 is one micro-batch and an optimizer step, so that the optimizer's state exists. Window 2 is
`min(k, 2)` micro-batches and a step, so that gradients are resident while activations peak; with k = 1
there are none then, which is a different peak. The confirming run is the whole window, twice.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from autoaccum import oom
from autoaccum.data import batches
from autoaccum.devices import Budget, Device, Watch
from autoaccum.errors import AutoaccumError, JobError, noted
from autoaccum.probe.readings import Outcome, Reading
from autoaccum.window import Job, PhaseCallback, WindowResult, WindowStart, accumulation, forget, is_compiled, optimizer_step


class _TimedOut(Exception):
    pass


class _Tell:
    """Where the trial is: tells listeners, takes the peak of forward and backward apart from the step's, and
    ends the trial when its time is over.

    In one process a clock can only be looked at between phases; a kernel that hangs needs a child process.
    """

    def __init__(self, watch: Watch, on_phase: PhaseCallback | None, timeout_s: float | None) -> None:
        self.phase = "batch"
        self.activation_bytes: int | None = None
        self._watch, self._on_phase = watch, on_phase
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s

    def __call__(self, phase: str, index: int) -> None:
        self.phase = phase
        if phase == "clip":
            self.activation_bytes = self._watch.lap_bytes()
        if self._on_phase is not None:
            self._on_phase(phase, index)
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise _TimedOut


def measure(
    jobs: Sequence[Job],
    device: Device,
    micro_batches: Sequence[int],
    *,
    allowed: Budget,
    full: bool = False,
    windows: int = 2,
    enforce: bool = True,
    aside_bytes: int = 0,
    timeout_s: float | None = None,
    on_phase: PhaseCallback | None = None,
) -> Reading:
    """Runs one trial of the window `micro_batches` (largest first) and says how it went.

    jobs: run one after the other in every window. allowed: what it may peak at. full: the whole window, `windows` times, instead of its two telling parts.
    aside_bytes: held in the measured memory for the trial's own sake (a snapshot): allowed on top of the
    budget and left out of the peak.
    Leaves gradients empty and the job's state changed; `snapshot.preserved` is around this.
    Raises what the job's own code raised, with a note, and `JobError`.
    """
    largest, steps = micro_batches[0], len(micro_batches)
    to_run = [micro_batches] * windows if full else [micro_batches[:1], micro_batches[:2]]
    scalers = [_scaler_of_our_own(job, device) for job in jobs]
    device.release()
    held_before = device.live_bytes()
    base_bytes = shapes = None
    took: list[float] = []
    remarks: tuple[str, ...] = ()
    stepped, doubtful = [False] * len(jobs), False
    outcome: Outcome = "fits"
    started = time.perf_counter()
    with device.watch() as watch:
        tell = _Tell(watch, on_phase, timeout_s)
        try:
            # A compiled model would be compiled anew for every size that is tried: the search runs it as it was
            # written, and only what confirms compiles. Compilers inherit a memory limit, so this comes first.
            eager = is_compiled(jobs) and not full and steps > 1
            with (
                torch.compiler.set_stance("force_eager" if eager else "default"),
                device.capped(allowed.budget_bytes + aside_bytes) if enforce else nullcontext(),
            ):
                tell("batch", 0)
                batch, ballast = _batch(jobs[0], device, largest, sum(micro_batches))
                history = _history_to_come(jobs)
                shapes = batches.shapes(batch) if jobs[0].split is None else {}
                state = WindowStart(jobs)  # training holds one, too
                for sizes in to_run:
                    watch.lap_bytes()
                    state.note()
                    ran, seconds = _window(jobs, device, batch, sizes, scalers, tell)
                    took.append(seconds)
                    stepped = [before or not each.skipped for before, each in zip(stepped, ran)]
                    if base_bytes is None:
                        base_bytes = device.live_bytes() - aside_bytes + (gradient_bytes(jobs) if steps > 1 else 0)
                        remarks = _remarks(ran, largest)
                    del ran
                del batch, ballast, state, history
        except Exception as error:
            # By the peak: on its way here the exception may have let go of all that filled the budget, as a backward does.
            left = allowed.budget_bytes + aside_bytes - watch.peak_bytes()
            taken = watch.peak_bytes() - held_before
            if isinstance(error, _TimedOut):
                outcome = "timeout"
            elif oom.is_oom(error, left_bytes=left, taken_bytes=taken):
                outcome, doubtful = "oom", oom.verdict(error) == "ask-device"
            else:
                if not isinstance(error, AutoaccumError):
                    noted(error, f"autoaccum: raised in {tell.phase}, at a micro-batch of {largest}")
                raise
            forget(error, jobs)
        batch = ballast = state = history = None  # type: ignore[assignment]  # noqa: F841 - lets go of what an out-of-memory left in this frame
        peak_bytes = watch.peak_bytes() - aside_bytes
        crawled = watch.retries() > 0
    device.release()
    if outcome == "fits" and not all(stepped):
        raise JobError(
            f"the gradients are inf or nan at a micro-batch of {largest}: the scaler skipped every optimizer step, so the optimizer's memory "
            "could not be measured; give a batch with usual values"
        )
    if outcome == "fits" and (peak_bytes > allowed.budget_bytes or crawled):
        outcome = "over-budget"
    return Reading(
        largest,
        steps,
        outcome,
        tell.phase,
        peak_bytes,
        time.perf_counter() - started,
        base_bytes=base_bytes,
        activation_bytes=None if outcome in ("oom", "timeout") or tell.activation_bytes is None else tell.activation_bytes - aside_bytes,
        window_seconds=statistics.median(took[1:] or took) if took else None,
        full=full,
        doubtful=doubtful,
        shapes=shapes,
        remarks=remarks,
        budget_bytes=allowed.budget_bytes,
    )


def _window(jobs: Sequence[Job], device: Device, batch: Any, sizes: Sequence[int], scalers: Sequence[Any], tell: _Tell) -> tuple[list[WindowResult], float]:
    """One window of every job, and the seconds with the device idle before and after."""
    device.synchronize()
    started = time.perf_counter()
    with optimizer_step.only_we_step(tell) as on_phase:
        ran = [
            accumulation.run(
                job,
                job.loss,
                _Pieces(jobs[0], batch, sizes),
                samples=sum(sizes),
                device=job.device,
                scaler=scaler,
                on_phase=on_phase,
            )
            for job, scaler in zip(jobs, scalers)
        ]
    device.synchronize()
    return ran, time.perf_counter() - started


def _remarks(ran: Sequence[WindowResult], micro_batch: int) -> tuple[str, ...]:
    return tuple(
        f"the loss is {each.loss.item()} at a micro-batch of {micro_batch}: memory is measured all the same, but training would go nowhere"
        for each in ran
        if not torch.isfinite(each.loss)
    )


def gradient_bytes(jobs: Sequence[Job]) -> int:
    """What stays resident between micro-batches: the gradients of the job that has most."""
    return max(job.gradient_bytes() for job in jobs)


def _batch(job: Job, device: Device, samples: int, share: int) -> tuple[Any, torch.Tensor | None]:
    """A micro-batch to cut the window's pieces from, and on a CPU the weight of the rest of the window.

    In training the whole effective batch lies in host memory, which on a CPU is the memory that is measured.
    """
    batch = job.batch_of(samples)
    if not device.shared_with_host or job.split is not None:
        return batch, None
    rest = batches.nbytes(batch) * (share - samples) // samples
    return batch, torch.ones(rest, dtype=torch.uint8)


def _history_to_come(jobs: Sequence[Job]) -> list[torch.Tensor]:
    """The weight of what an optimizer with a history (LBFGS) has not gathered yet: two vectors as long as all
    parameters, `history_size` times. The steps of a trial fill but a part of it."""
    held = []
    for job in jobs:
        for optimizer in job.optimizers:
            past = sum(len(state.get("old_dirs") or ()) for state in optimizer.state.values())
            missing = max(optimizer.defaults.get("history_size", 0) - past, 0)
            held.append(torch.ones(2 * missing * job.gradient_bytes(), dtype=torch.uint8, device=job.device))
    return held


class _Pieces:
    """Pieces of the window, all cut from one batch of the largest; made when their turn comes."""

    def __init__(self, job: Job, batch: Any, sizes: Sequence[int]) -> None:
        self._job, self._batch, self._sizes = job, batch, sizes

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        largest = self._sizes[0]
        for size in self._sizes:
            if size == largest:
                yield self._batch, size
            elif self._job.split is not None:
                yield self._job.split(self._batch, [size, largest - size])[0], size
            else:
                yield batches.resize(self._batch, size), size


def _scaler_of_our_own(job: Job, device: Device) -> Any:
    """At scale 1: a fresh scaler's 65536 overflows, skips the steps, and leaves no optimizer state to measure.

    The user's own is left alone also because its `load_state_dict` cannot undo "unscale_() has already
    been called" after a trial that ran out of memory past that point.
    """
    if job.scaler is None:
        return None
    return torch.amp.GradScaler(device.facts.kind, init_scale=1.0, growth_interval=10**9)
