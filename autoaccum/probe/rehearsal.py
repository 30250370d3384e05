"""Trials of one job on one device, in this process; afterwards the job is as it was."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch

from autoaccum.devices import RLIMIT, SHARED, Budget, Device, make_budget
from autoaccum.probe import conditions, equivalence
from autoaccum.probe.readings import Conditions, Equivalence, Limits, Reading, Subject
from autoaccum.probe.trial import gradient_bytes, measure
from autoaccum.window import Interrupts, Job, PhaseCallback, Snapshot, as_jobs, batch_norms, fingerprint, preserved


class Rehearsal:
    """Trials of one job, or of several that run in turn, on one device, in this process. Made by `rehearsal`.

    A `reading.Rehearser`, as `child.Child` is: the line does not know where its trials run.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        device: Device,
        kept: Snapshot,
        interrupts: Interrupts,
        limits: Limits,
        *,
        enforce: bool,
        on_phase: PhaseCallback | None,
    ) -> None:
        self._jobs, self._device, self._kept, self._interrupts, self._limits, self._on_phase = jobs, device, kept, interrupts, limits, on_phase
        # Held for the trials' own sake: copies, where they sit in the measured memory, and earlier gradients.
        self._aside_bytes = kept.gradient_bytes + (kept.host_bytes if device.shared_with_host else 0)
        self._floor_bytes = device.held_bytes() - self._aside_bytes
        # Of a device that ranks share, this one's part of what was free before the first trial.
        memory = device.memory(who=False) if limits.sharing_ranks > 1 else None
        self._part_bytes = None if memory is None or memory.binding_limit == RLIMIT else memory.ours_bytes + memory.free_bytes // limits.sharing_ranks
        self._bucket_bytes = gradient_bytes(jobs) if limits.buckets else 0
        # False where nothing stops a trial that is too big: then only what is predicted to fit may run.
        self.enforces = enforce and device.enforces

    def subject(self) -> Subject:
        """What is rehearsed."""
        normed = tuple(dict.fromkeys(name for job in self._jobs for name in batch_norms(job.model)))
        remarks = []
        if not all(job.model.training for job in self._jobs):
            remarks.append("the model is in eval mode and was measured so: call model.train() before tuning if that is how it trains")
        if len({parameter.device for job in self._jobs for parameter in job.trained()}) > 1:
            remarks.append(f"the parameters are on several devices; only {self._jobs[0].device} was measured")
        if any(job.autocast is torch.float16 and job.scaler is None for job in self._jobs):
            remarks.append("autocast to float16 without a GradScaler: small gradients vanish, and an inf goes into the weights; give scaler=, or use bfloat16")
        if not self._device.exact_peak:
            remarks.append("the peak is sampled on this system, not exact: leave some headroom")
        return Subject(
            self._device.facts,
            gradient_bytes(self._jobs),
            fingerprint(self._jobs),
            normed,
            self._kept.host_bytes,
            self._device.allocator,
            tuple(remarks),
        )

    def budget(self, *, limited: bool = True) -> Budget:
        """What a window may peak at, read now; without `limited`, what the device itself would allow."""
        memory = self._device.memory()
        if self._part_bytes is not None:
            memory = replace(memory, free_bytes=max(min(memory.free_bytes, self._part_bytes - memory.ours_bytes), 0), others=(), binding_limit=SHARED)
        ours = replace(memory, ours_bytes=memory.ours_bytes - self._aside_bytes)
        limit = self._limits.memory_bytes if limited else None
        found = make_budget(ours, kind=self._device.facts.kind, limit_bytes=limit, headroom=self._limits.headroom)
        return replace(found, budget_bytes=found.budget_bytes - self._bucket_bytes, bucket_bytes=self._bucket_bytes)

    def measure(self, micro_batches: Sequence[int], *, full: bool = False, limited: bool = True, windows: int = 2) -> Reading:
        """One trial, and the job's state put back."""
        try:
            with self._interrupts.allowed():
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
                    on_phase=self._on_phase,
                )
        finally:
            self._kept.rewind()

    def compare(self, samples: int) -> Equivalence:
        """Whether splitting a few of the job's own samples changes the gradient, and the job's state put back."""
        try:
            with self._interrupts.allowed(), self._device.capped(self.budget().budget_bytes + self._aside_bytes) if self.enforces else nullcontext():
                return equivalence.compare(self._jobs, samples)
        finally:
            self._kept.rewind()

    def conditions(self) -> Conditions:
        """What readings depend on."""
        try:
            waits = self._device.shared_with_host and self._jobs[0].split is None
            return Conditions(conditions.of(self._jobs), self._floor_bytes, conditions.sample_bytes(self._jobs[0]) if waits else 0)
        finally:
            self._kept.rewind()

    def fresh(self) -> None:
        """Where trials have a process of their own, the next one gets a new one. Here there is none."""


@contextmanager
def rehearsing(
    jobs: Job | Sequence[Job],
    device: Device,
    limits: Limits,
    *,
    parameters: bool = True,
    enforce: bool = True,
    on_phase: PhaseCallback | None = None,
) -> Iterator[Rehearsal]:
    """Trials inside, and afterwards all is as it was.

    parameters: False in a process whose weights nobody needs afterwards.
    enforce: whether the budget is enforced while a trial runs, where the device can.
    """
    device.prepare()
    with _garbage_of_trials_alone():
        try:
            jobs = as_jobs(jobs)
            with preserved(jobs, parameters=parameters) as (kept, interrupts):
                yield Rehearsal(jobs, device, kept, interrupts, limits, enforce=enforce, on_phase=on_phase)
        finally:
            device.release()


_FROZEN_AT_START = 1000  # Python 3.12 begins with 375 objects of its own


@contextmanager
def _garbage_of_trials_alone() -> Iterator[None]:
    """Inside, a collection looks only at what has come since. One is due before and after every trial, and with torch
    loaded a whole one takes 0.15 s, which was half the time of a small model's search."""
    if gc.get_freeze_count() > _FROZEN_AT_START:  # the caller's own, from before a fork perhaps: it cannot be put back as it was
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
