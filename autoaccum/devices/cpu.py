"""The CPU as a device: a measured peak, an allocator with repeatable peaks, and an enforced cap.

Three quantities of /proc/self/status differ. VmRSS is the resident bytes: a container counts them, and budgets and peaks
are in this unit. VmData is the size that RLIMIT_DATA limits; it includes pages that were never touched. VmHWM is the
peak of VmRSS.
https://man7.org/linux/man-pages/man5/proc_pid_status.5.html
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import TracebackType

import psutil

from autoaccum.devices import cgroup
from autoaccum.devices.malloc import LINUX, steady_malloc
from autoaccum.devices.memory import RLIMIT, Consumer, Facts, Memory
from autoaccum.devices.protocol import Watch
from autoaccum.devices.sampled_peak import SampledPeak
from autoaccum.errors import MemoryUnknown
from autoaccum.units import KIB, MIB

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def fill_thread_pools() -> None:
    """Starts torch's worker threads before a memory limit is set.

    Under a memory limit libgomp ends the process if it cannot create a thread ("libgomp: Thread creation failed").
    Nothing can catch that. Forward and backward have separate pools, so both run once. Elementwise kernels run in
    parallel from 32,768 elements on (at::internal::GRAIN_SIZE).
    """
    import torch

    with torch.enable_grad(), torch.device("cpu"), torch.random.fork_rng(devices=[]):
        weight = torch.ones(128, 1024, requires_grad=True)
        (torch.ones(1024, 1024) @ weight.T).relu().sum().backward()


class Cpu:
    """The CPU and the memory of this process."""

    shared_with_host = True

    def __init__(self) -> None:
        self.facts = Facts("cpu", None, _name(), None)
        self.enforces = LINUX
        self.allocator = ""
        self.exact_peak = LINUX and _can_reset_peak()

    def memory(self, *, who: bool = True) -> Memory:
        try:
            host = psutil.virtual_memory()
        except (OSError, RuntimeError) as error:
            raise MemoryUnknown(f"the system did not say how much memory there is (asked psutil: {error})") from error
        total, free, binds = host.total, host.available, "physical"
        limit = cgroup.tightest() if LINUX else None
        if limit and limit.limit_bytes < total:
            total = limit.limit_bytes
        if limit and limit.left_bytes < free:
            free, binds = limit.left_bytes, f"cgroup {limit.path}"
        if (left := _left_of_rlimit()) is not None and left < free:
            free, binds = left, RLIMIT
        return Memory(total, free, self.held_bytes(), 0, _largest_others() if who else (), binds)

    def held_bytes(self) -> int:
        return _status("VmRSS") if LINUX else int(psutil.Process().memory_info().rss)

    def live_bytes(self) -> int:
        return self.held_bytes()

    def watch(self) -> AbstractContextManager[Watch]:
        return _resettable() if self.exact_peak else _sampled()

    def capped(self, budget_bytes: int) -> AbstractContextManager[object]:
        return _DataLimit(budget_bytes) if self.enforces else nullcontext()

    def prepare(self) -> None:
        self.allocator = "steady malloc" if steady_malloc() else "default malloc"
        fill_thread_pools()

    def synchronize(self) -> None:
        """CPU kernels have finished when they return."""

    def release(self) -> None:
        gc.collect()
        if LINUX and platform.libc_ver()[0] == "glibc":
            ctypes.CDLL(None).malloc_trim(0)


class _DataLimit:
    """A context manager that sets RLIMIT_DATA so that resident bytes stay within the budget.

    It changes only the soft limit, because a lowered hard limit cannot be raised again. It is a class and not a
    generator, because there may be no memory left when it exits: the exit is one system call.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes

    def __enter__(self) -> None:
        import resource

        self._setrlimit, self._data = resource.setrlimit, resource.RLIMIT_DATA
        self._before = resource.getrlimit(resource.RLIMIT_DATA)
        # Resident pages that are not data (libraries) count against the budget. Data that was never touched does
        # not. So the process may add the budget minus the resident bytes.
        cap = max(_status("VmData") + self.budget_bytes - _status("VmRSS"), 0)
        soft, hard = self._before
        for bound in (soft, hard):
            cap = cap if bound == resource.RLIM_INFINITY else min(cap, bound)
        self._setrlimit(self._data, (cap, hard))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._setrlimit(self._data, self._before)


@contextmanager
def kept_data_limit() -> Iterator[None]:
    """Context after which RLIMIT_DATA is what it was before, also if an interrupt came just as a cap was set."""
    if not LINUX:
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        yield
    finally:
        if resource.getrlimit(resource.RLIMIT_DATA) != before:
            resource.setrlimit(resource.RLIMIT_DATA, before)


class _Peak:
    """The kernel's high-water mark VmHWM, which each lap resets."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._most = 0
        _CLEAR_REFS.write_text("5")  # resets VmHWM to VmRSS

    def peak_bytes(self) -> int:
        return max(self._most, _status("VmHWM"))

    def lap_bytes(self) -> int:
        lap = _status("VmHWM")
        self._most = max(self._most, lap)
        _CLEAR_REFS.write_text("5")
        return lap

    def retries(self) -> int:
        return 0


@contextmanager
def _resettable() -> Iterator[Watch]:
    yield _Peak()


@contextmanager
def _sampled() -> Iterator[Watch]:
    with SampledPeak(lambda: int(psutil.Process().memory_info().rss)) as peak:
        yield peak


def _left_of_rlimit() -> int | None:
    """Bytes of data left below this process's RLIMIT_DATA; None without a limit."""
    if not LINUX:
        return None
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
    return None if soft == resource.RLIM_INFINITY else max(soft - _status("VmData"), 0)


def _can_reset_peak() -> bool:
    """True if the peak can be reset. The kernel refuses /proc/self/clear_refs to processes that may not be dumped."""
    try:
        _CLEAR_REFS.write_text("5")
        return _status("VmHWM") > 0
    except OSError:
        return False


def _status(field: str) -> int:
    """One field of /proc/self/status, in bytes."""
    for line in _STATUS.read_bytes().splitlines():
        if line.startswith(field.encode() + b":"):
            return int(line.split()[1]) * KIB
    return 0


def _largest_others(count: int = 3, least_bytes: int = 256 * MIB) -> tuple[Consumer, ...]:
    """The other processes with the most resident memory, largest first."""
    consumers = []
    for process in psutil.process_iter(["name", "memory_info"]):
        info = process.info["memory_info"]
        if process.pid != os.getpid() and info is not None and info.rss >= least_bytes:
            consumers.append(Consumer(process.pid, info.rss, process.info["name"] or "?"))
    return tuple(sorted(consumers, key=lambda consumer: -(consumer.bytes or 0))[:count])


def _name() -> str:
    if LINUX:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
