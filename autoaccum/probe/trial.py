"""One trial: it runs the job's real window for one size and measures the memory.

A trial runs two windows. The first is one micro-batch and an optimizer step, so that the optimizer state exists.
The second is `min(k, 2)` micro-batches and a step, where k is the accumulation steps, so that gradients are resident while
activations peak. With k = 1 no gradients are resident then, which gives a different peak.
A confirming run is one micro-batch and a step, and then the window. Of a long window it runs the first two micro-batches and the last, if nothing grows
or varies between them: the others do what these have done.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from autoaccum import oom
from autoaccum.data import batches
from autoaccum.devices import Budget, Device, Watch
from autoaccum.errors import AutoaccumError, JobError, noted
from autoaccum.probe import variation
from autoaccum.probe.readings import Outcome, Reading
from autoaccum.window import Job, PhaseCallback, WindowResult, WindowStart, accumulation, forget, optimizer_step

_SHORT = 4  # micro-batches of a window up to which it is confirmed whole
_SETTLING = 2  # windows whose retries of the allocator do not count; one that still retries in later ones is slow


class _TimedOut(Exception):
    pass


class PhaseListener:
    """Follows the phases of a trial.

    It calls `on_phase`, measures the peak of forward and backward apart from that of the step, and ends the trial after the timeout.
    Inside one process the time can only be checked between phases. To stop a kernel that hangs, the trial needs a child process.
    """

    def __init__(self, watch: Watch, live_bytes: Callable[[], int], on_phase: PhaseCallback | None, timeout_s: float | None) -> None:
        self.phase = "batch"
        self.activation_bytes: int | None = None
        self.taken: list[int] | None = None  # bytes of each micro-batch above what was held before it, while somebody wants to know
        self._held_bytes, self._most_bytes, self._live_bytes = 0, 0, live_bytes
        self.watch, self._on_phase = watch, on_phase
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self.synchronize: Callable[[], None] | None = None  # while micro-batches are timed one by one
        self._began: list[float] = []
        self._bases: list[int] = []

    def ended(self) -> None:
        """Called when a window has ended and the device is idle."""
        if self.synchronize is not None:
            self._began.append(time.perf_counter())

    @property
    def grown_bytes(self) -> int:
        """What the last micro-batch of a window held when it began, above what the one before it did: 0 unless each leaves something behind."""
        grown = self._bases[-1] - self._bases[-2] if len(self._bases) > 2 else 0
        return grown if grown > variation.PAGES_BYTES else 0

    def seconds_of(self, sizes: Sequence[int]) -> float:
        """The seconds of a window of these micro-batches, from those of the last one, of which the first two and the last were timed."""
        first, second, last, step = (after - before for before, after in pairwise(self._began))
        small = sizes.count(sizes[-1]) if sizes[-1] < sizes[0] else 0
        large = min(first, second) if small else min(first, second, last)
        return large * (len(sizes) - small) + last * small + step

    def __call__(self, phase: str, index: int) -> None:
        self.phase = phase
        if self.taken is not None and phase in ("forward", "clip"):
            lap_bytes = self.watch.lap_bytes()
            if index or phase == "clip":
                self.taken.append(lap_bytes - self._held_bytes)
            self._most_bytes = max(self._most_bytes if index or phase == "clip" else 0, lap_bytes)
            self._held_bytes = self._live_bytes()
        if self.synchronize is not None and phase in ("forward", "clip"):
            self.synchronize()
            if phase == "forward" and not index:
                self._began, self._bases = [], []
            self._began.append(time.perf_counter())
            if phase == "forward":
                self._bases.append(self._live_bytes())
        if phase == "clip":
            self.activation_bytes = self.watch.lap_bytes() if self.taken is None else self._most_bytes
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
    smaller_fits: bool = False,
) -> Reading:
    """Runs one trial of the window `micro_batches` (largest first) and returns its reading.

    jobs: they run one after the other in every window. full: run the whole window after one micro-batch, or `windows` times if those are more than
    two, or if there are several jobs.
    allowed, enforce, aside_bytes, timeout_s, on_phase: as in `attempt`.
    The gradients are empty afterwards and the job's state is changed; the caller restores it with `preserved`.
    Raises what the job's own code raises, with a note, and `JobError`.
    """
    largest, steps = micro_batches[0], len(micro_batches)
    shown = (*micro_batches[:2], micro_batches[-1]) if full and windows == 2 and steps > _SHORT and len(jobs) == 1 else micro_batches
    is_short = shown is not micro_batches
    begins_small = full and windows == 2 and steps > 1 and len(jobs) == 1  # for the optimizer's state; several jobs may share a batch unevenly
    to_run: list[Sequence[int]] = [micro_batches] * windows if full and not begins_small else [shown[:1], shown if full else shown[:2]]
    whole_seconds: list[float] = []  # of whole windows, where not all micro-batches ran
    scalers = [_trial_scaler(job, device) for job in jobs]
    base_bytes = shapes = None
    durations: list[float] = []
    remarks: tuple[str, ...] = ()
    stepped = [False] * len(jobs)
    searches = device.facts.kind == "cuda" and torch.backends.cudnn.benchmark
    if searches and len(set(micro_batches[:2])) > 1:
        to_run.append(to_run[-1])  # each size has a search of its own
    held: list[int] = []  # after each whole window
    taken: list[int] = []  # by each of the largest micro-batches, but those of the first window, in which libraries begin

    def train(listener: PhaseListener) -> None:
        nonlocal base_bytes, shapes, remarks, stepped
        batch, ballast = _batch(jobs[0], device, largest, sum(micro_batches))
        history = _missing_history(jobs)
        shapes = batches.shapes(batch) if jobs[0].split is None else {}
        state = WindowStart(jobs)  # training holds one too
        while len(to_run) > len(durations):
            sizes = to_run[len(durations)]
            listener.watch.lap_bytes()
            listener.taken = [] if full and len(jobs) == 1 else None
            state.note()
            drawn = variation.host_draws(jobs[0], device.facts.kind) if is_short else ()
            results, seconds = _window(jobs, device, batch, sizes, scalers, listener, timed=is_short and sizes is shown)
            durations.append(seconds)
            if is_short and sizes is shown:
                whole_seconds.append(listener.seconds_of(micro_batches))
                more = (listener.grown_bytes * (steps - len(shown))) > allowed.budget_bytes + aside_bytes - listener.watch.peak_bytes()
                draws = drawn != variation.host_draws(jobs[0], device.facts.kind)
                if more or draws or variation.is_spread(listener.taken or []):  # what the others would show
                    to_run[len(durations) :] = [micro_batches] * windows
                    whole_seconds.clear()
            stepped = [before or not result.skipped for before, result in zip(stepped, results)]
            if len(durations) <= _SETTLING and (listener.watch.retries() or (searches and len(durations) < len(to_run))):
                # A library's search for kernels takes what is free, once, and may flush the allocator's cache. Training goes on without.
                while len(to_run) < len(durations) + 2:  # one from an empty cache, one from a cache that was used, as in training
                    to_run.append(to_run[-1])
                device.release()
                listener.watch.restart()
            if base_bytes is None:
                base_bytes = device.live_bytes() - aside_bytes + (gradient_bytes(jobs) if steps > 1 else 0)
                remarks = _remarks(results, largest)
            del results
            if full or steps == 1:
                held.append(device.live_bytes())
                if len(held) == 2 and len(to_run) == 2 and variation.slope_bytes(held, shared_with_host=device.shared_with_host):
                    gc.collect()
                    to_run.extend([micro_batches] * (3 if begins_small else 2))  # more windows tell growth from noise
                    if begins_small:
                        held.clear()
                        whole_seconds.clear()
            if listener.taken is not None and len(durations) > 1:
                taken.extend(bytes_ for bytes_, size in zip(listener.taken, sizes) if size == largest)
                if variation.is_spread(taken) and len(to_run) < windows + variation.MORE_WINDOWS:
                    to_run.append(sizes)
        del ballast, history

    # A compiled model would be compiled again for every size. So the search runs it in eager mode. Only a confirming
    # run and a window in one piece compile. The stance is set before the cap, because compilers inherit a memory limit.
    eager, graphs_before = any(job.is_compiled for job in jobs) and not full and steps > 1, _compiled_graphs()
    with torch.compiler.set_stance("force_eager" if eager else "default"):
        ended = attempt(
            jobs,
            device,
            train,
            largest,
            allowed=allowed,
            enforce=enforce,
            aside_bytes=aside_bytes,
            timeout_s=timeout_s,
            on_phase=on_phase,
            smaller_fits=smaller_fits,
        )
    if ended.outcome in ("fits", "over-budget") and not all(stepped):
        raise JobError(
            f"the gradients are inf or nan at a micro-batch of {largest}: the scaler skipped every optimizer step, so the optimizer's memory "
            "could not be measured; give a batch with usual values"
        )
    if ended.remark:
        remarks += (ended.remark,)
    if ended.outcome == "fits":
        remarks += variation.spread_remark(taken, largest, len(durations))
        remarks += variation.growth_remark(held, allowed.budget_bytes - ended.peak_bytes, shared_with_host=device.shared_with_host)
    return Reading(
        largest,
        steps,
        ended.outcome,
        ended.phase,
        ended.peak_bytes,
        ended.seconds,
        base_bytes=base_bytes,
        activation_bytes=ended.activation_bytes,
        window_seconds=statistics.median(whole_seconds or durations[1:] or durations) if durations else None,
        full=full,
        doubtful=ended.doubtful,
        shapes=shapes,
        remarks=remarks,
        budget_bytes=allowed.budget_bytes,
        compiled_graphs=_compiled_graphs() - graphs_before,
    )


@dataclass(frozen=True)
class Ended:
    """How a trial ended. The fields are those of `Reading`. remark: of a trial that a kernel's limit ended, else ""."""

    outcome: Outcome
    phase: str
    peak_bytes: int
    activation_bytes: int | None
    seconds: float
    doubtful: bool
    remark: str


def attempt(
    jobs: Sequence[Job],
    device: Device,
    work: Callable[[PhaseListener], None],
    samples: int,
    *,
    allowed: Budget,
    enforce: bool,
    aside_bytes: int,
    timeout_s: float | None,
    on_phase: PhaseCallback | None,
    smaller_fits: bool = False,
) -> Ended:
    """Runs `work`, which may run out of memory, and returns its peak and how it ended.

    samples: the size that is tried, for messages. allowed: the budget.
    enforce: cap the device's memory at the budget while the trial runs.
    aside_bytes: measured memory that only the trial needs (a snapshot). It is added to the budget and left out of the peak.
    timeout_s: seconds until the trial ends with the outcome "timeout".
    smaller_fits: a smaller size ran before, so that what a kernel cannot count is a limit of the size; else it is an error of the job.
    Raises what `work` raises, with a note, unless it is an out-of-memory.
    """
    device.release()
    held_before = device.live_bytes()
    outcome: Outcome = "fits"
    doubtful, remark = False, ""
    started = time.perf_counter()
    with device.watch() as watch:
        listener = PhaseListener(watch, device.live_bytes, on_phase, timeout_s)
        try:
            with device.capped(allowed.budget_bytes + aside_bytes) if enforce else nullcontext():
                listener("batch", 0)
                work(listener)
        except Exception as error:
            # The peak counts, not the live memory: the exception may have released everything on its way here, as in backward.
            left_bytes = allowed.budget_bytes + aside_bytes - watch.peak_bytes()
            taken_bytes = watch.peak_bytes() - held_before
            if isinstance(error, _TimedOut):
                outcome = "timeout"
            elif smaller_fits and oom.is_kernel_limit(error):
                outcome, remark = "kernel-limit", f"a kernel cannot take a micro-batch of {samples}, whatever memory there is ({_first_line(error)})"
            elif oom.is_oom(error, left_bytes=left_bytes, taken_bytes=taken_bytes):
                outcome, doubtful = "oom", oom.verdict(error) == "ask-device"
            else:
                if not isinstance(error, AutoaccumError):
                    noted(error, f"autoaccum: raised in {listener.phase}, at a micro-batch of {samples}")
                raise
            forget(error, jobs)
        peak_bytes = watch.peak_bytes() - aside_bytes
        retried = watch.retries() > 0
    device.release()
    if outcome == "fits" and (peak_bytes > allowed.budget_bytes or retried):
        outcome = "over-budget"
    activation_bytes = None if outcome in ("oom", "timeout", "kernel-limit") or listener.activation_bytes is None else listener.activation_bytes - aside_bytes
    return Ended(outcome, listener.phase, peak_bytes, activation_bytes, time.perf_counter() - started, doubtful, remark)


def _compiled_graphs() -> int:
    """The graphs that this process has compiled so far."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return 0 if dynamo is None else int(dynamo.counters["stats"]["unique_graphs"])


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def step_once(jobs: Sequence[Job], device: Device, samples: int, listener: PhaseListener) -> list[torch.Tensor]:
    """Runs one optimizer step on a window of one micro-batch, and returns what an optimizer will hold later besides (see `_missing_history`)."""
    batch = jobs[0].batch_of(samples)
    _window(jobs, device, batch, [samples], [_trial_scaler(job, device) for job in jobs], listener)
    return _missing_history(jobs)


def _window(
    jobs: Sequence[Job], device: Device, batch: Any, sizes: Sequence[int], scalers: Sequence[Any], listener: PhaseListener, *, timed: bool = False
) -> tuple[list[WindowResult], float]:
    """Runs one window of every job. Returns the results and the seconds, with the device idle before and after.

    timed: time each micro-batch too, with the device idle between them.
    """
    device.synchronize()
    listener.synchronize = device.synchronize if timed else None
    started = time.perf_counter()
    with optimizer_step.only_we_step(jobs, listener) as on_phase:
        results = [
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
    listener.ended()
    return results, time.perf_counter() - started


def _remarks(results: Sequence[WindowResult], micro_batch: int) -> tuple[str, ...]:
    return tuple(
        f"the loss is {result.loss.item()} at a micro-batch of {micro_batch}: memory is measured all the same, but training would go nowhere"
        for result in results
        if not torch.isfinite(result.loss)
    )


def gradient_bytes(jobs: Sequence[Job]) -> int:
    """The bytes of gradients that stay resident between micro-batches: those of the job with the most."""
    return max(job.gradient_bytes() for job in jobs)


def _batch(job: Job, device: Device, samples: int, window_samples: int) -> tuple[Any, torch.Tensor | None]:
    """A micro-batch to cut the window's pieces from, and on a CPU a tensor as large as the rest of the window.

    In training the whole effective batch lies in host memory. On a CPU this is the measured memory.
    """
    batch = job.batch_of(samples)
    if not device.shared_with_host or job.split is not None:
        return batch, None
    rest = batches.nbytes(batch) * (window_samples - samples) // samples
    return batch, torch.ones(rest, dtype=torch.uint8)


def _missing_history(jobs: Sequence[Job]) -> list[torch.Tensor]:
    """Tensors as large as the history that an optimizer such as LBFGS has not gathered yet.

    The full history is two vectors as long as all parameters, `history_size` times. The steps of a trial fill only a part of it.
    """
    tensors = []
    for job in jobs:
        for optimizer in job.optimizers:
            gathered = sum(len(state.get("old_dirs") or ()) for state in optimizer.state.values())
            missing = max(optimizer.defaults.get("history_size", 0) - gathered, 0)
            tensors.append(torch.ones(2 * missing * job.gradient_bytes(), dtype=torch.uint8, device=job.device))
    return tensors


class _Pieces:
    """The pieces of the window. Each is cut from one batch of the largest size when it is needed."""

    def __init__(self, job: Job, batch: Any, sizes: Sequence[int]) -> None:
        self._job, self._batch, self._sizes = job, batch, sizes

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        largest = self._sizes[0]
        for size in self._sizes:
            if size == largest:
                yield self._batch, size
            elif self._job.split is not None:
                yield self._job.split(self._batch, [size, largest - size])[0], size
            elif self._job.samples is not None and callable(self._job.batch):
                yield self._job.batch_of(size), size
            else:
                yield batches.resize(self._batch, size), size


def _trial_scaler(job: Job, device: Device) -> Any:
    """A scaler for the trial, with scale 1; None if the job has no scaler.

    The scale of a new scaler is 65536. It overflows, so the steps are skipped and there is no optimizer state to measure.
    The user's scaler is not used, also because its `load_state_dict` cannot undo "unscale_() has already been called" after a
    trial that ran out of memory past that point.
    """
    if job.scaler is None:
        return None
    return torch.amp.GradScaler(device.facts.kind, init_scale=1.0, growth_interval=10**9)
