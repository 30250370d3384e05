"""`WindowStart`: the state that a window changes before its optimizer steps, saved at its start and restored if it runs again.

This state is small: gradients, buffers (BatchNorm's statistics), random number generators, the scaler's record of unscaled
optimizers, and the contents of the job's `keep`.
"""

from __future__ import annotations

import gc
import traceback
import warnings
from collections.abc import Iterable, Sequence
from functools import cache

import torch

from autoaccum import oom
from autoaccum.devices import Cpu
from autoaccum.errors import AutoaccumWarning, DeviceError
from autoaccum.units import MIB, in_words
from autoaccum.window import optimizer_step, snapshot
from autoaccum.window.job import Job
from autoaccum.window.rng_state import RngState

_SMALL_BYTES = MIB


class WindowStart:
    """The part of the jobs' state that forward and backward change, at the start of a window.

    Contiguous buffers up to 1 MiB are copied on their own device before every window. Other buffers (tables, masks, queues) are
    copied to the host, and again only after their version changed. BatchNorm changes its statistics without a change of the
    version, so a buffer's version is trusted only if it has proved right. Modules and tensors in `keep` are treated like buffers.
    Anything else in `keep` is copied completely before every window.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = jobs
        keep = [item for job in jobs for item in job.keep]
        self._generators = RngState(jobs[0].device, [item for item in keep if isinstance(item, torch.Generator)])
        self._others = [item for item in keep if not isinstance(item, (torch.nn.Module, torch.Tensor, torch.Generator))]
        self._modules = [
            module for root in (*(job.model for job in jobs), *(item for item in keep if isinstance(item, torch.nn.Module))) for module in root.modules()
        ]
        self._loose = [item for item in keep if isinstance(item, torch.Tensor)]
        self._loose += [parameter for item in keep if isinstance(item, torch.nn.Module) for parameter in item.parameters()]
        self._snapshot: snapshot.Snapshot | None = None
        self._find()

    def note(self) -> None:
        """Saves the state. Called before the first forward of a window."""
        if self._moved():
            self._find()
        with torch.no_grad():
            for live, flat in self._small:
                torch.cat(live, out=flat)
            for large in self._large:
                large.note()
        self._generators.note()
        self._snapshot = None  # frees the old copy before the new one is made
        if self._others:
            try:
                self._snapshot = snapshot.Snapshot((), keep=self._others)
            except DeviceError as error:
                warnings.warn(f"what is in keep=[...] is not put back if a window has to run again: {error}", AutoaccumWarning, stacklevel=2)
                self._others = []

    def put_back(self) -> None:
        """Restores the state that `note` saved, and sets every gradient to None."""
        for job in self._jobs:
            forget_gradients(job)
            optimizer_step.unmark(job, job.scaler)  # the scale itself changes only in update()
        for owner, names, tensors in self._slots:
            if list(owner) != list(names) or any(owner[name] is not tensor for name, tensor in zip(names, tensors)):
                owner.clear()
                owner.update(zip(names, tensors))
        with torch.no_grad():
            for tensor, alias in self._aliases:
                if tensor.data_ptr() != alias.data_ptr() or tensor.shape != alias.shape:
                    tensor.data = alias
            for live, flat in self._small:
                torch._foreach_copy_(live, flat.split([tensor.numel() for tensor in live]))
            for large in self._large:
                large.put_back()
        if self._snapshot is not None:
            self._snapshot.put_back()
        self._generators.put_back()

    def _moved(self) -> bool:
        """True if a buffer was added, removed, or given another tensor or other memory since `_find`."""
        for owner, _, tensors in self._slots:
            if len(owner) != len(tensors):
                return True
            for now, then in zip(owner.values(), tensors):
                if now is not then:
                    return True
        return [(tensor.data_ptr(), tensor.shape) for tensor, _ in self._aliases] != self._addresses

    def _find(self) -> None:
        # A scripted module keeps its buffers elsewhere, and they stay the same tensors.
        """Finds all buffers, and allocates the copies of the small ones."""
        owners = [module._buffers for module in self._modules]
        self._slots = [(owner, tuple(owner), tuple(owner.values())) for owner in owners if isinstance(owner, dict)]
        tensors = {
            id(tensor): tensor for tensor in (*(buffer for module in self._modules for buffer in module._buffers.values()), *self._loose) if tensor is not None
        }
        self._large: list[_Large | _Unwritable] = []
        self._aliases: list[tuple[torch.Tensor, torch.Tensor]] = []
        groups: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
        for tensor in tensors.values():
            if tensor.is_meta or tensor.is_inference():
                continue
            if tensor.layout != torch.strided or hasattr(tensor, "__tensor_flatten__"):
                self._large.append(_Unwritable(tensor))
                continue
            self._aliases.append((tensor, tensor.detach()))
            if tensor.nbytes <= _SMALL_BYTES and tensor.is_contiguous():
                groups.setdefault((tensor.device, tensor.dtype), []).append(tensor.detach().view(-1))
            else:
                self._large.append(_Large(tensor))
        self._addresses = [(tensor.data_ptr(), tensor.shape) for tensor, _ in self._aliases]
        # One copy per device and dtype: `cat` takes a third of the time of one copy per tensor.
        self._small = [(live, torch.cat(live)) for live in groups.values()]


@cache
def _host() -> Cpu:
    """The host's memory. Made once: making it resets the process's high-water mark, which a trial may be reading."""
    return Cpu()


class _Large:
    """A tensor too large to copy before every window: its memory is copied when its version changed.

    Whether it changed is found out on its own device. Where the host has no memory for the copy, there is none: a window that changes the
    tensor cannot run again then.
    """

    _PROOFS, _AGAIN = 3, 64

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor, self._version = tensor.detach(), -1
        self._content: torch.UntypedStorage | None = None
        self._digest: torch.Tensor | None = None  # of a tensor that is not on the host, and of one without a copy
        self._counted = True  # False once the content changed without a change of the version
        self._notes = 0

    def note(self) -> None:
        self._notes += 1
        version = self._tensor._version
        if self._version >= 0 and version == self._version and self._counted:
            if self._notes > self._PROOFS and self._notes % self._AGAIN:
                return
            self._counted = self._is_same()
            if self._counted:
                return
        storage = self._tensor.untyped_storage()
        self._content, self._version = None, version  # the old copy is freed before the new one is made
        has_room = storage.nbytes() <= _host().memory(who=False).free_bytes
        self._content = snapshot.host_copy(storage) if has_room else None
        self._digest = snapshot.digest(storage) if storage.device.type != "cpu" or not has_room else None

    def put_back(self) -> None:
        if self._content is not None:
            snapshot.write_content(self._tensor.untyped_storage(), self._content)
        elif self._version >= 0 and not self._is_same():
            raise DeviceError(
                f"a window ran out of memory after it had changed a buffer of {in_words(self._tensor.untyped_storage().nbytes())}, which had no copy because the "
                "host had no memory for one, so it cannot run again: load your last checkpoint, and free host memory or train with on_oom='raise'"
            )

    def _is_same(self) -> bool:
        storage = self._tensor.untyped_storage()
        if self._digest is not None:
            now = snapshot.digest(storage)
            return now.shape == self._digest.shape and torch.equal(now, self._digest)
        return self._content is not None and snapshot.same_content(storage, self._content)


class _Unwritable:
    """A sparse or wrapped tensor, whose memory cannot be written directly: it is cloned when its version changed, and copied back as a whole."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor, self._version = tensor, -1

    def note(self) -> None:
        if self._tensor._version != self._version:
            self._clone, self._version = self._tensor.detach().clone(), self._tensor._version

    def put_back(self) -> None:
        if self._tensor._version != self._version:
            self._tensor.detach().copy_(self._clone)
            self._version = self._tensor._version


def forget(error: BaseException, jobs: Iterable[Job], outside: BaseException | None = None) -> None:
    """Frees what a failed window still holds: the frames of its exceptions, gradients, reference cycles.

    outside: an exception that was being handled already when the window began. Its frames and those of its causes are kept.
    """
    for link in oom.chain(error, outside):
        traceback.clear_frames(link.__traceback__)
        link.__traceback__ = None
    for job in jobs:
        forget_gradients(job)
    gc.collect()


def forget_gradients(job: Job) -> None:
    """Sets every gradient of the job to None."""
    for parameter in job.trained():
        parameter.grad = None
