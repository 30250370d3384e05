"""Queries to NVML, the NVIDIA driver's library, for facts that torch does not know: other processes, names, MIG slices.

NVML is optional at run time. It may be missing (Jetson), forbidden (containers), or answer "not supported" (WSL2, GB10).
Devices are looked up by UUID or PCI id, never by index: NVML counts all cards in PCI order, CUDA counts only the visible
ones, fastest first. https://docs.nvidia.com/deploy/nvml-api/
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import psutil

from autoaccum.devices.memory import Consumer


@dataclass(frozen=True)
class DriverAnswer:
    """NVML's answers about one device; None for each missing answer.

    uuid: as NVML writes it, "GPU-..." or "MIG-...".
    used_bytes: memory of all processes. ours_bytes: memory of this process, including its context.
    why_not: the reason if NVML gave no answers at all.
    """

    uuid: str | None = None
    name: str | None = None
    total_bytes: int | None = None
    used_bytes: int | None = None
    ours_bytes: int | None = None
    others: tuple[Consumer, ...] = ()
    why_not: str | None = None


def ask(uuid: str | None, pci: str | None) -> DriverAnswer:
    """NVML's answers about the device with this UUID (without prefix) or this PCI bus id."""
    try:
        import pynvml  # from nvidia-ml-py
    except ImportError:
        return DriverAnswer(why_not="NVML: the Python module pynvml is not installed")
    try:
        _begin(pynvml)
    except pynvml.NVMLError as error:
        return DriverAnswer(why_not=f"NVML: {error}")
    handle = _handle(pynvml, uuid, pci)
    if handle is None:
        return DriverAnswer(why_not=f"NVML: no device with UUID {uuid} or PCI id {pci}")
    return _driver_answer(pynvml, handle)


_begun_by = 0  # the process that has initialised the library; a copy of it has to do so again


def _begin(pynvml: Any) -> None:
    """Initialises the library once in a process: it takes 20 ms and more where several cards are. It ends with the process."""
    global _begun_by
    if _begun_by != os.getpid():
        pynvml.nvmlInit()
        _begun_by = os.getpid()


def driver_version() -> str:
    """The driver's version from NVML; "unknown" if NVML does not report it."""
    try:
        import pynvml

        _begin(pynvml)
        return str(pynvml.nvmlSystemGetDriverVersion())
    except Exception:  # the module, the library or the permission may be missing
        return "unknown"


def _handle(nvml: Any, uuid: str | None, pci: str | None) -> Any:
    # The PCI id comes last: a MIG slice has its own UUID, but the PCI id of the full card.
    uuids = [f"{prefix}{uuid}" for prefix in ("GPU-", "MIG-", "")] if uuid else []
    for handle_by, key in [(nvml.nvmlDeviceGetHandleByUUID, key) for key in uuids] + ([(nvml.nvmlDeviceGetHandleByPciBusId, pci)] if pci else []):
        try:
            return handle_by(key)
        except nvml.NVMLError:
            continue
    return None


def _driver_answer(nvml: Any, handle: Any) -> DriverAnswer:
    memory = _answer(nvml, nvml.nvmlDeviceGetMemoryInfo, handle)
    # Under MIG the slice's handle lists the processes of the slice.
    processes = _answer(nvml, nvml.nvmlDeviceGetComputeRunningProcesses, handle) or []
    ours = [process.usedGpuMemory for process in processes if process.pid == os.getpid() and process.usedGpuMemory is not None]
    others = [Consumer(process.pid, process.usedGpuMemory, _name_of(process.pid)) for process in processes if process.pid != os.getpid()]
    return DriverAnswer(
        uuid=_text(_answer(nvml, nvml.nvmlDeviceGetUUID, handle)),
        name=_text(_answer(nvml, nvml.nvmlDeviceGetName, handle)),
        total_bytes=memory.total if memory else None,
        used_bytes=memory.used if memory else None,
        ours_bytes=sum(ours) if ours else None,
        others=tuple(sorted(others, key=lambda consumer: -(consumer.bytes or 0))),
    )


def _answer(nvml: Any, call: Any, handle: Any) -> Any:
    try:
        return call(handle)
    except (nvml.NVMLError, nvml.NVMLLibraryMismatchError):  # not supported, no permission, a lost card, an old driver: other calls may still work
        return None


def _text(answer: Any) -> str | None:
    return answer.decode() if isinstance(answer, bytes) else answer


def _name_of(pid: int) -> str:
    """The name of a process. A pid from another container means nothing here, so the process may be unknown."""
    try:
        process = psutil.Process(pid)
        mine = process.username() == psutil.Process().username()
        return process.name() if mine else f"{process.name()} (another user)"
    except (psutil.Error, KeyError):
        return "another process"
