"""One rehearsal of the real window: measured, and undone.

Window 1 is one micro-batch and an optimizer step, so that the optimizer's state exists. Window 2 is
`min(k, 2)` micro-batches and a step, so that gradients are resident while activations peak; with k = 1
there are none then, which is a different peak. The confirming run is the whole window, twice.
"""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from autoaccum import batches, oom, snapshot, window
from autoaccum.devices.base import Budget, Device, Watch, budget
from autoaccum.errors import AutoaccumError, JobError, noted
from autoaccum.job import Job
from autoaccum.reading import Limits, Outcome, Reading, Say, Subject


class _TimedOut(Exception):
    pass


class _Tell:
    """Where the trial is: tells listeners, takes the peak of forward and backward apart from the step's, and
    ends the trial when its time is over.

    In one process a clock can only be looked at between phases; a kernel that hangs needs a child process.
    """

    def __init__(self, watch: Watch, say: Say | None, timeout_s: float | None) -> None:
        self.phase = "batch"
        self.activation_bytes: int | None = None
        self._watch, self._say = watch, say
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s

    def __call__(self, phase: str, index: int) -> None:
        self.phase = phase
        if phase == "step":
            self.activation_bytes = self._watch.lap_bytes()
        if self._say is not None:
            self._say(phase, index)
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise _TimedOut


def measure(
    job: Job,
    device: Device,
    micro_batches: Sequence[int],
    *,
    allowed: Budget,
    full: bool = False,
    enforce: bool = True,
    aside_bytes: int = 0,
    timeout_s: float | None = None,
    say: Say | None = None,
) -> Reading:
    """Runs one trial of the window `micro_batches` (largest first) and says how it went.

    allowed: what it may peak at. full: the whole window twice, instead of its two telling parts.
    aside_bytes: held in the measured memory for the trial's own sake (a snapshot): allowed on top of the
    budget and left out of the peak.
    Leaves gradients empty and the job's state changed; `snapshot.preserved` is around this.
    Raises what the job's own code raised, with a note, and `JobError`.
    """
    largest, steps = micro_batches[0], len(micro_batches)
    windows = [micro_batches, micro_batches] if full else [micro_batches[:1], micro_batches[:2]]
    scaler = _scaler_of_our_own(job, device)
    device.release()
    held_before = device.live_bytes()
    base_bytes = seconds = shapes = None
    remarks: tuple[str, ...] = ()
    stepped = doubtful = False
    outcome: Outcome = "fits"
    started = time.perf_counter()
    with device.watch() as watch:
        tell = _Tell(watch, say, timeout_s)
        try:
            with device.capped(allowed.budget_bytes + aside_bytes) if enforce else nullcontext():
                tell("batch", 0)
                batch, ballast = _batch(job, device, largest, sum(micro_batches))
                shapes = batches.shapes(batch) if job.split is None else {}
                for sizes in windows:
                    watch.lap_bytes()
                    ran, seconds = _window(job, device, batch, sizes, scaler, tell)
                    stepped = stepped or not ran.skipped
                    if base_bytes is None:
                        base_bytes = device.live_bytes() - aside_bytes + (job.gradient_bytes() if steps > 1 else 0)
                        remarks = _remarks(ran, largest)
                    del ran
                del batch, ballast
        except Exception as error:
            # First of all, and with the cap lifted by now: what is left, before anything else is allocated.
            left = allowed.budget_bytes + aside_bytes - device.live_bytes()
            taken = device.live_bytes() - held_before
            if isinstance(error, _TimedOut):
                outcome = "timeout"
            elif oom.is_oom(error, left_bytes=left, taken_bytes=taken):
                outcome, doubtful = "oom", oom.verdict(error) == "ask-device"
            else:
                if not isinstance(error, AutoaccumError):
                    noted(error, f"autoaccum: raised in {tell.phase}, at a micro-batch of {largest}")
                raise
            _forget(job, error)
        batch = ballast = None  # noqa: F841 - lets go of what an out-of-memory left in this frame
        peak_bytes = watch.peak_bytes() - aside_bytes
        crawled = watch.retries() > 0
    device.release()
    if outcome == "fits" and not stepped:
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
        window_seconds=seconds,
        full=full,
        doubtful=doubtful,
        shapes=shapes,
        remarks=remarks,
    )


def _window(job: Job, device: Device, batch: Any, sizes: Sequence[int], scaler: Any, tell: _Tell) -> tuple[window.Ran, float]:
    """One window, and its seconds with the device idle before and after."""
    device.synchronize()
    started = time.perf_counter()
    ran = window.run(
        job,
        job.loss,
        _pieces(job, batch, sizes),
        samples=sum(sizes),
        count=_count(job, batch, sizes),
        device=job.device,
        scaler=scaler,
        say=tell,
    )
    device.synchronize()
    return ran, time.perf_counter() - started


def _remarks(ran: window.Ran, micro_batch: int) -> tuple[str, ...]:
    if torch.isfinite(ran.loss):
        return ()
    return (f"the loss is {ran.loss.item()} at a micro-batch of {micro_batch}: memory is measured all the same, but training would go nowhere",)


def _batch(job: Job, device: Device, samples: int, share: int) -> tuple[Any, torch.Tensor | None]:
    """A micro-batch to cut the window's pieces from, and on a CPU the weight of the rest of the window.

    In training the whole effective batch lies in host memory, which on a CPU is the memory that is measured.
    """
    batch = job.batch_of(samples)
    if not device.shared_with_host or job.split is not None:
        return batch, None
    rest = batches.nbytes(batch) * (share - samples) // samples
    return batch, torch.ones(rest, dtype=torch.uint8)


def _pieces(job: Job, batch: Any, sizes: Sequence[int]) -> Any:
    for size in sizes:
        yield (batch if size == sizes[0] else job.split(batch, [size, sizes[0] - size])[0] if job.split else batches.resize(batch, size)), size


def _count(job: Job, batch: Any, sizes: Sequence[int]) -> float | None:
    return None if job.count is None else sum(float(job.count(piece)) for piece, _ in _pieces(job, batch, sizes))


def _scaler_of_our_own(job: Job, device: Device) -> Any:
    """At scale 1: a fresh scaler's 65536 overflows, skips the steps, and leaves no optimizer state to measure.

    The user's own is left alone also because its `load_state_dict` cannot undo "unscale_() has already
    been called" after a trial that ran out of memory past that point.
    """
    if job.scaler is None:
        return None
    return torch.amp.GradScaler(device.facts.kind, init_scale=1.0, growth_interval=10**9)


def _forget(job: Job, error: BaseException) -> None:
    """Lets go of what a failed trial still holds: frames of the exceptions, gradients, cycles."""
    for link in oom.chain(error):
        traceback.clear_frames(link.__traceback__)
        link.__traceback__ = None
    for parameter in job.trained():
        parameter.grad = None
    gc.collect()


class Rehearsal:
    """Trials of one job on one device, in this process. Made by `rehearsal`.

    A `reading.Rehearser`, as `child.Child` is: the line does not know where its trials run.
    """

    def __init__(
        self, job: Job, device: Device, kept: snapshot.Snapshot, interrupts: snapshot.Interrupts, limits: Limits, *, enforce: bool, say: Say | None
    ) -> None:
        self._job, self._device, self._kept, self._interrupts, self._limits, self._say = job, device, kept, interrupts, limits, say
        # Held for the trials' own sake: copies, where they sit in the measured memory, and earlier gradients.
        self._aside_bytes = kept.gradient_bytes + (kept.host_bytes if device.shared_with_host else 0)
        # False where nothing stops a trial that is too big: then only what is predicted to fit may run.
        self.enforces = enforce and device.enforces

    def subject(self) -> Subject:
        """What is rehearsed."""
        model = self._job.model
        normed = tuple(name for name, module in model.named_modules() if _is_batch_norm(module) and module.training)
        remarks = []
        if not model.training:
            remarks.append("the model is in eval mode and was measured so: call model.train() before tuning if that is how it trains")
        if len({parameter.device for parameter in self._job.trained()}) > 1:
            remarks.append(f"the parameters are on several devices; only {self._job.device} was measured")
        if not self._device.exact_peak:
            remarks.append("the peak is sampled on this system, not exact: leave some headroom")
        return Subject(
            self._device.facts, self._job.gradient_bytes(), self._job.fingerprint(), normed, self._kept.host_bytes, self._device.allocator, tuple(remarks)
        )

    def budget(self, *, limited: bool = True) -> Budget:
        """What a window may peak at, read now; without `limited`, what the device itself would allow."""
        memory = self._device.memory()
        ours = replace(memory, ours_bytes=memory.ours_bytes - self._aside_bytes)
        limit = self._limits.memory_bytes if limited else None
        return budget(ours, kind=self._device.facts.kind, limit_bytes=limit, headroom=self._limits.headroom)

    def measure(self, micro_batches: Sequence[int], *, full: bool = False, limited: bool = True) -> Reading:
        """One trial, and the job's state put back."""
        try:
            with self._interrupts.allowed():
                return measure(
                    self._job,
                    self._device,
                    micro_batches,
                    allowed=self.budget(limited=limited),
                    full=full,
                    enforce=self.enforces,
                    aside_bytes=self._aside_bytes,
                    timeout_s=self._limits.timeout_of(len(micro_batches), full=full),
                    say=self._say,
                )
        finally:
            self._kept.rewind()

    def fresh(self) -> None:
        """Where trials have a process of their own, the next one gets a new one. Here there is none."""


def _is_batch_norm(module: torch.nn.Module) -> bool:
    # A scripted module keeps its class in `original_name` alone.
    return isinstance(module, _BatchNorm) or str(getattr(module, "original_name", "")).startswith(("BatchNorm", "SyncBatchNorm"))


@contextmanager
def rehearsal(
    job: Job,
    device: Device,
    limits: Limits,
    *,
    parameters: bool = True,
    enforce: bool = True,
    say: Say | None = None,
) -> Iterator[Rehearsal]:
    """Trials inside, and afterwards all is as it was.

    parameters: False in a process whose weights nobody needs afterwards.
    enforce: whether the budget is enforced while a trial runs, where the device can.
    """
    device.prepare()
    try:
        with snapshot.preserved(job, parameters=parameters) as (kept, interrupts):
            yield Rehearsal(job, device, kept, interrupts, limits, enforce=enforce, say=say)
    finally:
        device.release()
