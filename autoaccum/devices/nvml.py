"""What the NVIDIA driver knows beyond torch: other processes, names, MIG slices.

Optional at run time: it may be missing (Jetson), forbidden (containers), or answer "not supported"
(WSL2, GB10). Devices are found by UUID or PCI id, never by index: NVML counts all cards in PCI order,
CUDA only the visible ones, fastest first. https://docs.nvidia.com/deploy/nvml-api/
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psutil

from autoaccum.devices.memory import Consumer


@dataclass(frozen=True)
class DriverAnswer:
    """What NVML told of one device; None for each answer it did not give.

    used_bytes: of all processes. ours_bytes: of this process, its context included. uuid: as NVML writes
    it, "GPU-..." or "MIG-...". why_not: which call failed and how, where nothing was told.
    """

    uuid: str | None = None
    name: str | None = None
    total_bytes: int | None = None
    used_bytes: int | None = None
    ours_bytes: int | None = None
    others: tuple[Consumer, ...] = ()
    why_not: str | None = None


def ask(uuid: str | None, pci: str | None) -> DriverAnswer:
    """What NVML says of the device with this UUID (without prefix) or this PCI bus id."""
    try:
        import pynvml  # from nvidia-ml-py
    except ImportError:
        return DriverAnswer(why_not="NVML: the Python module pynvml is not installed")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return DriverAnswer(why_not=f"NVML: {error}")
    try:
        handle = _handle(pynvml, uuid, pci)
        if handle is None:
            return DriverAnswer(why_not=f"NVML: no device with UUID {uuid} or PCI id {pci}")
        return _told(pynvml, handle)
    finally:
        with suppress(pynvml.NVMLError):  # a lost card must not lose the answer
            pynvml.nvmlShutdown()


def driver_version() -> str:
    """As NVML tells it, "unknown" where it does not."""
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            return str(pynvml.nvmlSystemGetDriverVersion())
        finally:
            pynvml.nvmlShutdown()
    except Exception:  # the module, the library or the permission may be missing
        return "unknown"


def _handle(nvml: Any, uuid: str | None, pci: str | None) -> Any:
    # A MIG slice has a UUID of its own; its PCI id is that of the whole card, so it comes last.
    names = [f"{prefix}{uuid}" for prefix in ("GPU-", "MIG-", "")] if uuid else []
    for find, name in [(nvml.nvmlDeviceGetHandleByUUID, name) for name in names] + ([(nvml.nvmlDeviceGetHandleByPciBusId, pci)] if pci else []):
        try:
            return find(name)
        except nvml.NVMLError:
            continue
    return None


def _told(nvml: Any, handle: Any) -> DriverAnswer:
    memory = _answer(nvml, nvml.nvmlDeviceGetMemoryInfo, handle)
    # Under MIG the processes of a slice are listed with the slice's handle.
    processes = _answer(nvml, nvml.nvmlDeviceGetComputeRunningProcesses, handle) or []
    ours = [each.usedGpuMemory for each in processes if each.pid == os.getpid() and each.usedGpuMemory is not None]
    others = [Consumer(each.pid, each.usedGpuMemory, _name_of(each.pid)) for each in processes if each.pid != os.getpid()]
    return DriverAnswer(
        uuid=_text(_answer(nvml, nvml.nvmlDeviceGetUUID, handle)),
        name=_text(_answer(nvml, nvml.nvmlDeviceGetName, handle)),
        total_bytes=memory.total if memory else None,
        used_bytes=memory.used if memory else None,
        ours_bytes=sum(ours) if ours else None,
        others=tuple(sorted(others, key=lambda other: -(other.bytes or 0))),
    )


def _answer(nvml: Any, call: Any, handle: Any) -> Any:
    try:
        return call(handle)
    except (nvml.NVMLError, nvml.NVMLLibraryMismatchError):  # not supported, no permission, lost, an old driver: each question stands alone
        return None


def _text(answer: Any) -> str | None:
    return answer.decode() if isinstance(answer, bytes) else answer


def _name_of(pid: int) -> str:
    """A process of another container has a number that means nothing here."""
    try:
        process = psutil.Process(pid)
        mine = process.username() == psutil.Process().username()
        return process.name() if mine else f"{process.name()} (another user)"
    except (psutil.Error, KeyError):
        return "another process"
