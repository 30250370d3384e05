"""The `Rehearser` that runs its trials in this process and restores the job's state afterwards."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from autoaccum.data import batches, tokens
from autoaccum.devices import Budget, Device, kept_data_limit, make_budget, part_of_rank, within_part
from autoaccum.errors import JobError, PlanError
from autoaccum.probe import conditions, equivalence
from autoaccum.probe.evaluation import Evaluation, measure_evaluation
from autoaccum.probe.process_copy import CopyDied, CopyHung, CopyRaised, can_copy, in_copy
from autoaccum.probe.readings import Conditions, Equivalence, Limits, Reading, Subject, after_death
from autoaccum.probe.trial import gradient_bytes, measure
from autoaccum.window import (
    Interrupts,
    Job,
    PhaseCallback,
    Snapshot,
    as_jobs,
    batch_norms,
    captured,
    fingerprint,
    per_token,
    preserved,
    put_back_after,
)

_HALVES = (torch.float16, torch.bfloat16)


class Rehearsal:
    """A `Rehearser` of one job, or of several that run in turn, on one device, in this process. Use `rehearsing` to make one.

    `tuner.one_device` uses it in the same way as a `Child`, whose trials run in another process.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        device: Device,
        snapshot: Snapshot,
        interrupts: Interrupts,
        limits: Limits,
        *,
        enforce: bool,
        on_phase: PhaseCallback | None,
        evaluation: Evaluation | None = None,
    ) -> None:
        self._jobs, self._device, self._snapshot, self._interrupts, self._limits, self._on_phase = jobs, device, snapshot, interrupts, limits, on_phase
        if limits.per_token:
            self._jobs = tuple(map(_end_to_end, jobs))
        for job in jobs:
            if (name := captured(job.model, job.loss)) is not None:
                raise JobError(
                    f"{name} was captured by torch.cuda.make_graphed_callables and runs one batch size only, so no other can be tried: tune before it is "
                    "captured, with equal=True, and capture it at plan.micro_batch"
                )
        snapshot.rewind()
        # Memory that only the trials need: the earlier gradients, and the copies if they lie in the measured memory.
        self._aside_bytes = snapshot.gradient_bytes + (snapshot.host_bytes if device.shared_with_host else 0)
        self._floor_bytes = device.held_bytes() - self._aside_bytes
        self._part_bytes = part_of_rank(device, limits.sharing_ranks)
        self._bucket_bytes = gradient_bytes(jobs) if limits.buckets else 0
        # False if nothing stops a trial that is too big. Then only sizes that are predicted to fit may run.
        self.enforces = enforce and device.enforces
        self._evaluation = evaluation or Evaluation()
        self._least_fit = 2**63  # the smallest size that ran so far
        # On a CPU the memory limit is one of the process, in which libraries may die.
        self._copies = self.enforces and device.facts.kind == "cpu" and all(tensor.device.type == "cpu" for job in jobs for tensor in job.trained())
        self._hung = self._values_changed = False

    def subject(self) -> Subject:
        """The job under trial and its device."""
        norm_names = tuple(dict.fromkeys(name for job in self._jobs for name in batch_norms(job.model)))
        remarks = []
        if not all(job.model.training for job in self._jobs):
            remarks.append("the model is in eval mode and was measured so: call model.train() before tuning if that is how it trains")
        if len({parameter.device for job in self._jobs for parameter in job.trained()}) > 1:
            remarks.append(f"the parameters are on several devices; only {self._jobs[0].device} was measured")
        if any(job.autocast is torch.float16 and job.scaler is None for job in self._jobs):
            remarks.append("autocast to float16 without a GradScaler: small gradients vanish, and an inf goes into the weights; give scaler=, or use bfloat16")
        if self._device.facts.kind == "cuda" and not self._device.exact_peak:
            remarks.append(
                "the allocator in use keeps no statistics (CUDAPluggableAllocator, RMM): memory is the driver's figure for the whole card, and nothing stops a "
                "trial that is too big; leave some headroom, or tune with torch's own allocator"
            )
        elif not self._device.exact_peak:
            remarks.append("the peak is sampled on this system, not exact: leave some headroom")
        if self._device.facts.kind == "cuda" and torch.backends.cudnn.benchmark:
            remarks.append(
                "cudnn.benchmark is on: each new size is searched for its quickest kernels, which takes what memory is free; that was left out of the peaks, "
                "and training meets it at every size that is new to it"
            )
        if self._hung:
            remarks.append("a copy of this process hung, probably on a lock that another thread held: trials ran in this process, where running out may end it")
        return Subject(
            self._device.facts,
            gradient_bytes(self._jobs),
            fingerprint(self._jobs),
            norm_names,
            self._snapshot.host_bytes,
            self._device.allocator,
            tuple(remarks),
            compiled=any(job.is_compiled for job in self._jobs),
            half=all(job.autocast in _HALVES or all(parameter.dtype in _HALVES for parameter in job.trained()) for job in self._jobs),
        )

    def budget(self, *, limited: bool = True) -> Budget:
        """The largest allowed peak of a window, read now. limited: False for the budget without the user's limit."""
        memory = within_part(self._device.memory(), self._part_bytes)
        job_memory = replace(memory, ours_bytes=memory.ours_bytes - self._aside_bytes)
        limit = self._limits.memory_bytes if limited else None
        floor = self._floor_bytes if self._device.shared_with_host else 0
        budget = make_budget(job_memory, kind=self._device.facts.kind, limit_bytes=limit, headroom=self._limits.headroom, floor_bytes=floor)
        return replace(budget, budget_bytes=budget.budget_bytes - self._bucket_bytes, bucket_bytes=self._bucket_bytes)

    def measure(self, micro_batches: Sequence[int], *, full: bool = False, limited: bool = True, windows: int = 2) -> Reading:
        """Runs one trial and restores the job's state."""

        def trial(on_phase: PhaseCallback | None) -> Reading:
            return measure(
                self._jobs,
                self._device,
                micro_batches,
                allowed=self.budget(limited=limited),
                full=full,
                windows=windows,
                enforce=self.enforces,
                aside_bytes=self._aside_bytes,
                timeout_s=self._limits.timeout_of(len(micro_batches), full=full, windows=windows),
                on_phase=on_phase,
                smaller_fits=self._least_fit < micro_batches[0],
            )

        # A copy would compile for itself alone, and training again.
        reading = self._ran(trial, micro_batches[0], len(micro_batches), full=full, in_place=full and any(job.is_compiled for job in self._jobs))
        if reading.fits:
            self._least_fit = min(self._least_fit, micro_batches[0])
        return reading

    def evaluate(self, samples: int, trained: int) -> Reading:
        """Runs one trial of an evaluation: `samples` samples forward, after a step of `trained`. Restores the job's state."""

        def trial(on_phase: PhaseCallback | None) -> Reading:
            return measure_evaluation(
                self._jobs,
                self._device,
                self._evaluation,
                samples,
                trained,
                allowed=self.budget(),
                enforce=self.enforces,
                aside_bytes=self._aside_bytes,
                timeout_s=self._limits.timeout_s,
                on_phase=on_phase,
            )

        return self._ran(trial, samples, 1)

    def _ran(self, trial: Callable[[PhaseCallback | None], Reading], size: int, steps: int, *, full: bool = False, in_place: bool = False) -> Reading:
        """Runs a trial in a copy of this process if there may be one, else here, and restores the job's state."""
        started = time.perf_counter()
        try:
            answer = None if in_place else self._in_copy(lambda on_phase: trial(on_phase).as_dict(), self._on_phase)
        except CopyDied as death:
            return after_death(Reading(size, steps, "oom", death.phase, None, time.perf_counter() - started, full=full), death.code)
        if answer is not None:
            return Reading.from_dict(answer)
        has_moved = self._values_changed  # by earlier trials
        try:
            with self._here(trains=True):
                reading = trial(self._on_phase)
            if not has_moved or not any(remark.startswith("the loss is ") for remark in reading.remarks):
                return reading
        except Exception:
            if not has_moved or not self._is_far_off():
                raise
        with self._here():  # with the job's own values: those of many trials may be far off
            return trial(self._on_phase)

    def _in_copy(self, work: Callable[[PhaseCallback], dict[str, Any]], on_phase: PhaseCallback | None) -> dict[str, Any] | None:
        """What `work` returned in a copy of this process; None if it has to run here. Raises `CopyDied`."""
        if not self._copies or not can_copy():
            return None
        with self._interrupts.allowed():
            try:
                return in_copy(work, on_phase)
            except CopyHung:
                self._copies, self._hung = False, True
            except CopyRaised:
                pass  # once more here, for the exception itself
        return None

    def _is_far_off(self) -> bool:
        """True if trials have driven the weights to where the job's code may fail though it does not at its own. Writes the job's own back."""

        def largest() -> float:
            with torch.no_grad():
                return max((float(tensor.detach().abs().max()) for job in self._jobs for tensor in job.trained() if tensor.numel()), default=0.0)

        now = largest()
        self._snapshot.rewind()
        return not now <= _FAR_OFF * largest()

    @contextmanager
    def _here(self, *, trains: bool = False) -> Iterator[None]:
        """Context in which the job's code runs in this process; its state is restored at the end.

        trains: True for trials, of which memory is what counts: values that train are written back only before something else runs.
        """
        if self._values_changed and not trains:
            self._snapshot.rewind()
            self._values_changed = False
        self._snapshot.used()
        with put_back_after(partial(self._snapshot.rewind, values=not trains)), self._interrupts.allowed():
            self._values_changed = self._values_changed or trains
            yield

    def sample_tokens(self) -> int:
        """The tokens of one of the job's samples, padding included. Restores the job's state, because it makes a batch."""
        with self._here():
            return tokens.per_sample(self._jobs[0].batch_of(2), 2)

    def compare(self, samples: int) -> Equivalence | None:
        """Compares split and whole gradient on a few of the job's own samples, and restores the job's state."""

        def compared() -> Equivalence:
            with self._device.capped(self.budget().budget_bytes + self._aside_bytes) if self.enforces else nullcontext():
                return equivalence.compare(self._jobs, samples)

        try:
            answer = self._in_copy(lambda _: compared().as_dict(), None)
        except CopyDied:
            return None
        if answer is not None:
            return Equivalence.from_dict(answer)
        with self._here():
            return compared()

    def conditions(self) -> Conditions:
        """Everything that readings depend on. Restores the job's state, because it makes a batch."""
        with self._here():
            counts_samples = self._device.shared_with_host and self._jobs[0].split is None
            return Conditions(conditions.of(self._jobs), self._floor_bytes, conditions.sample_bytes(self._jobs[0]) if counts_samples else 0)

    def fresh(self) -> None:
        """Does nothing: trials run in this process, so there is no new process to start."""


def _end_to_end(job: Job) -> Job:
    """The job with `samples`, if its `make_batch` puts samples one after the other, so that the first dimension does not count them."""
    if not callable(job.batch) or job.split is not None or job.samples is not None:
        return job
    two, four = job.batch(2), job.batch(4)
    with suppress(PlanError):
        if batches.count(two) == 2:
            return job
    one = tokens.per_sample(two, 2)
    if tokens.positions(four) != 4 * one:
        return job
    return replace(job, samples=lambda batch: tokens.positions(batch) // one)


@contextmanager
def rehearsing(
    jobs: Job | Sequence[Job],
    device: Device,
    limits: Limits,
    *,
    parameters: bool = True,
    enforce: bool = True,
    on_phase: PhaseCallback | None = None,
    evaluation: Evaluation | None = None,
) -> Iterator[Rehearsal]:
    """A context with a `Rehearsal` of the jobs. On exit, the jobs' state is restored.

    parameters: False if the weights are not needed afterwards; they are then not copied and restored.
    enforce: enforce the budget while a trial runs, if the device can.
    on_phase: called with each phase of a trial. evaluation: what evaluation runs; None for the losses of the jobs.
    """
    device.prepare()
    with _earlier_objects_frozen(), kept_data_limit():
        try:
            jobs = tuple(map(per_token, as_jobs(jobs))) if limits.per_token else as_jobs(jobs)
            with preserved(jobs, parameters=parameters) as (snapshot, interrupts):
                yield Rehearsal(jobs, device, snapshot, interrupts, limits, enforce=enforce, on_phase=on_phase, evaluation=evaluation)
        finally:
            device.release()


_FAR_OFF = 10.0  # times the largest weight
_FROZEN_AT_START = 1000  # Python 3.12 itself starts with 375 frozen objects


@contextmanager
def _earlier_objects_frozen() -> Iterator[None]:
    """Freezes all objects that exist now, so that a garbage collection inside the context looks only at newer ones.

    A collection runs before and after every trial. With torch loaded a full one takes 0.15 s, which was half the time of a
    small model's search.
    """
    if gc.get_freeze_count() > _FROZEN_AT_START:  # the caller has frozen objects, perhaps before a fork; that state could not be restored
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
