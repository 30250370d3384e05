"""Out of memory in mid-training: the same window, smaller, exactly.

What a window changes before its optimizer steps is little: gradients, buffers (BatchNorm's statistics),
random number generators, the scaler's marks, and what the job's own `keep` holds. It is noted when a window
starts; when forward or backward runs out of memory, it is put back, and the window runs again in smaller
micro-batches. Once an optimizer has begun to step, weights have changed and nothing can be repeated.
"""

from __future__ import annotations

import gc
import logging
import mmap
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from autoaccum import oom, search
from autoaccum.devices.base import Device
from autoaccum.errors import PlanError, noted
from autoaccum.generators import Generators
from autoaccum.job import Job
from autoaccum.plan import Plan
from autoaccum.reading import Say
from autoaccum.regrouping import Cut, Window
from autoaccum.running_stats import batch_norms
from autoaccum.units import MIB
from autoaccum.window import Ran

log = logging.getLogger("autoaccum")
Sizes = Callable[[int], Sequence[int]]  # a window's micro-batches, none larger than the given


class Attempt(Protocol):
    """Runs a window's micro-batches, and says where it is."""

    def __call__(self, cut: Cut, *, say: Say) -> Ran: ...


_BALLAST_BYTES = 16 * MIB
_SMALL_BYTES = MIB


@dataclass(frozen=True)
class Rescued:
    """What a rescue changed. `str` of it is the line that is logged.

    phase: forward, backward or clip; index: of the micro-batch, from 0. before, after: largest micro-batch of the
    window. accumulation_steps: of the window as it ran in the end. attempts: how often it ran out of memory.
    kept_bytes: what did not come back after the failure, beyond what was held before the window.
    """

    phase: str
    index: int
    before: int
    after: int
    accumulation_steps: int
    attempts: int
    kept_bytes: int

    def __str__(self) -> str:
        times = "" if self.attempts == 1 else f", {self.attempts} times"
        kept = f"; {self.kept_bytes / MIB:.0f} MiB did not come back" if self.kept_bytes > 16 * MIB else ""
        return (
            f"out of memory in {self.phase} of micro-batch {self.index + 1}, at {self.before} samples{times}: "
            f"the window ran again, whole, as {self.after} x {self.accumulation_steps}; micro-batches stay at {self.after} or less{kept}"
        )


class Rescuer:
    """Runs windows, and those that run out of memory again in smaller micro-batches.

    micro_batch: the most a micro-batch may hold now: the plan's, less after a rescue.
    grow_after: windows without trouble after which a size that a rescue left is tried again; None for never.
    """

    def __init__(self, jobs: Sequence[Job], device: Device, plan: Plan, *, enabled: bool, grow_after: int | None) -> None:
        self._jobs, self._device, self._plan, self._enabled, self._grow_after = jobs, device, plan, enabled, grow_after
        self.micro_batch = plan.micro_batch
        self._left: list[int] = []  # sizes that rescues have left, to grow back to
        self._windows = self._quiet_windows = self._held_bytes = 0
        self._phase, self._index = "forward", 0
        if enabled:
            self._start = WindowStart(jobs)
            self._ballast = Ballast(device)

    def run(self, whole: Window, sizes: Sizes, attempt: Attempt) -> tuple[Ran, Rescued | None]:
        """One window. sizes: micro-batches for a given most. attempt: runs what it is given, up to the optimizer's step.

        Raises what `attempt` raised where it is no out-of-memory, where the optimizer had begun to step, and
        where not even the smallest micro-batch runs; an out-of-memory with a note that says which.
        """
        self._grow()
        if not self._enabled:
            return attempt(whole.cut(sizes(self.micro_batch)), say=self._say), None
        if self._windows < 2 or self._windows % 64 == 0:  # optimizers make their state at the first step
            self._held_bytes = self._device.live_bytes()
        self._windows += 1
        self._start.note()
        before = sizes(self.micro_batch)
        failures: list[tuple[str, int]] = []
        ran, kept_bytes = None, 0
        cut = whole.cut(before)
        outside = sys.exc_info()[1]  # what the caller is handling, if anything: none of our business
        while ran is None:
            try:
                ran = attempt(cut, say=self._say)
            except Exception as error:
                self._ballast.drop()  # first of all: what follows takes memory, too
                failures.append((self._phase, self._index))
                cut = self._smaller(error, whole, sizes)
                forget(error, self._jobs, outside)
            if ran is None:
                # Not in the handler: there the exception, and through it the failed window, is still held.
                self._start.put_back()
                self._device.release()
                kept_bytes = self._device.live_bytes() - self._held_bytes
                self._ballast.take()
        if not failures:
            self._quiet_windows += 1
            return ran, None
        self._quiet_windows = 0
        rescued = Rescued(*failures[0], max(before), max(sizes(self.micro_batch)), ran.micro_batches, len(failures), kept_bytes)
        log.warning("%s", rescued)
        return ran, rescued

    def _smaller(self, error: Exception, whole: Window, sizes: Sizes) -> Cut:
        """The window in the next smaller micro-batches. Raises `error` itself where it must not or cannot be run again."""
        if not self._is_oom(error):
            self._ballast.take()
            raise error
        if self._phase == "step":
            raise noted(
                error,
                "autoaccum: ran out of memory in the optimizer's step: weights may have changed, so the window was not run again; load your last checkpoint",
            )
        smallest = 2 if any(batch_norms(job.model) for job in self._jobs) else 1  # which forbids a sample alone
        now = sizes(self.micro_batch)
        for most in search.sizes(self._plan.share, smallest=smallest)[::-1]:
            then = sizes(most)
            if most >= self.micro_batch or max(then) >= max(now) or min(then) < min(smallest, *now):
                continue
            cut = _cut(whole, then)
            if cut is None:
                break
            self._left.append(self.micro_batch)
            self.micro_batch = most
            return cut
        self._start.put_back()
        raise noted(error, f"autoaccum: ran out of memory in {self._phase} of a micro-batch of {max(now)}, and the window cannot be cut smaller")

    def _is_oom(self, error: Exception) -> bool:
        if oom.verdict(error) != "ask-device":
            return oom.verdict(error) == "oom"
        try:
            live_bytes, free_bytes = self._device.live_bytes(), self._device.memory(who=False).free_bytes
        except Exception:  # a device that lost its context answers nothing: then that is the trouble
            return False
        left_bytes = min(self._plan.budget_bytes + self._plan.headroom_bytes - live_bytes, free_bytes)
        return oom.is_oom(error, left_bytes=left_bytes, taken_bytes=live_bytes - self._held_bytes)

    def _grow(self) -> None:
        if self._left and self._grow_after is not None and self._quiet_windows >= self._grow_after:
            self.micro_batch, self._quiet_windows = self._left.pop(), 0
            log.info("trying micro-batches of %d again, after %d windows without trouble", self.micro_batch, self._grow_after)

    def _say(self, phase: str, index: int) -> None:
        self._phase, self._index = phase, index


class WindowStart:
    """The state of jobs when a window starts, as far as forward and backward change it.

    Tensors up to 1 MiB are copied on their own device before every window. Others (tables, masks, queues)
    are copied on the host, and again only after they changed. `num_batches_tracked` and the statistics of
    BatchNorm change without their version being counted, so versions are trusted only where they proved right.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = jobs
        self._device = jobs[0].device
        self._slots: list[tuple[dict[str, Any], str, torch.Tensor]] = []
        self._small: list[tuple[list[torch.Tensor], torch.Tensor]] = []
        self._large: list[_Large] = []
        self._find()

    def note(self) -> None:
        """Called before a window's first forward."""
        for owner, name, tensor in self._slots:
            if owner.get(name) is not tensor:  # a buffer was given another tensor
                self._find()
                break
        with torch.no_grad():
            for live, flat in self._small:
                torch.cat(live, out=flat)
            for large in self._large:
                large.note()
        self._generators.note()

    def put_back(self) -> None:
        """Makes everything as it was at `note`, and gradients empty."""
        for job in self._jobs:
            for parameter in job.trained():
                parameter.grad = None
            if job.scaler is not None:
                # "unscale_() has already been called" is kept here; its scale changes only in update().
                getattr(job.scaler, "_per_optimizer_states", {}).clear()
        for owner, name, tensor in self._slots:
            owner[name] = tensor
        with torch.no_grad():
            for live, flat in self._small:
                torch._foreach_copy_(live, flat.split([tensor.numel() for tensor in live]))
            for large in self._large:
                large.put_back()
        self._generators.put_back()

    def _find(self) -> None:
        self._slots, self._large = [], []
        alike: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
        self._generators = Generators(self._device, [each for job in self._jobs for each in job.keep if isinstance(each, torch.Generator)])
        seen: set[int] = set()
        for job in self._jobs:
            for module in job.model.modules():
                for name, buffer in module._buffers.items():
                    if buffer is not None:
                        if isinstance(module._buffers, dict):  # not so in a scripted module, whose buffers stay the same tensors
                            self._slots.append((module._buffers, name, buffer))
                        self._keep(buffer, seen, alike)
            for kept in job.keep:
                if isinstance(kept, torch.nn.Module):
                    for tensor in (*kept.parameters(), *kept.buffers()):
                        self._keep(tensor, seen, alike)
                elif isinstance(kept, torch.Tensor):
                    self._keep(kept, seen, alike)

        # One copy for all of a kind: `cat` takes a third of the time of copying one by one.
        self._small = [(live, torch.cat(live)) for live in alike.values()]

    def _keep(self, tensor: torch.Tensor, seen: set[int], alike: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]]) -> None:
        if id(tensor) in seen or tensor.is_meta:
            return
        seen.add(id(tensor))
        if tensor.layout != torch.strided or tensor.nbytes > _SMALL_BYTES or not tensor.is_contiguous():
            self._large.append(_Large(tensor))
        else:
            alike.setdefault((tensor.device, tensor.dtype), []).append(tensor.detach().view(-1))


class _Large:
    """A tensor too large to be copied before every window: copied when it changed."""

    _PROOFS = 3

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor, self._version = tensor, -1
        self._copy: torch.Tensor | None = None
        self._counted = not tensor.is_inference()  # whether its version tells of every change, as far as seen
        self._proofs = 0

    def note(self) -> None:
        version = self._tensor._version if self._counted else 0
        if self._copy is not None and version == self._version and self._counted:
            if self._proofs >= self._PROOFS:
                return
            self._proofs += 1
            if torch.equal(self._copy, self._tensor.detach().cpu()):
                return
            self._counted = False
        self._copy, self._version = self._tensor.detach().to("cpu", copy=True), version

    def put_back(self) -> None:
        if self._copy is not None and (not self._counted or self._tensor._version != self._version or self._proofs < self._PROOFS):
            self._tensor.detach().copy_(self._copy)
            self._version = self._tensor._version if self._counted else 0


class Ballast:
    """On a CPU, memory that is given back first of all when memory has run out: handling that takes some, too.

    Its pages are never touched, so it counts under RLIMIT_DATA alone, which is where memory runs out with an
    exception; what a container counts does not show it.
    """

    def __init__(self, device: Device) -> None:
        self._wanted = device.facts.kind == "cpu"
        self._held: mmap.mmap | None = None
        self.take()

    def take(self) -> None:
        if self._wanted and self._held is None:
            with suppress(OSError, MemoryError, ValueError):  # then without
                self._held = mmap.mmap(-1, _BALLAST_BYTES)

    def drop(self) -> None:
        if self._held is not None:
            self._held.close()
            self._held = None


def _cut(whole: Window, sizes: Sequence[int]) -> Cut | None:
    try:
        return whole.cut(sizes)
    except PlanError:  # batches that cannot be cut came as micro-batches
        return None


def forget(error: BaseException, jobs: Iterable[Job], outside: BaseException | None = None) -> None:
    """Lets go of what a failed window still holds: frames of the exceptions, gradients, cycles.

    outside: an exception that was being handled already when the window began; it and what led to it stay whole.
    """
    for link in oom.chain(error):
        if link is outside:
            break
        traceback.clear_frames(link.__traceback__)
        link.__traceback__ = None
    for job in jobs:
        for parameter in job.trained():
            parameter.grad = None
    gc.collect()
