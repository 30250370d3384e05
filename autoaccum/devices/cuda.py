"""CUDA devices: NVIDIA cards, and AMD cards through ROCm, which torch also calls "cuda".

Free memory comes from `torch.cuda.mem_get_info`: the driver answers for the device that torch uses, also for MIG slices
and for reordered devices. NVML adds the other processes on the device. A memory fraction that the caller has set is a limit like any other.
"""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import psutil
import torch

from autoaccum.devices import nvml
from autoaccum.devices.memory import FRACTION, HOST, PHYSICAL, Facts, Memory
from autoaccum.devices.protocol import Watch
from autoaccum.devices.sampled_peak import SampledPeak
from autoaccum.errors import MemoryUnknown
from autoaccum.units import GIB

_MOST_CONTEXT_BYTES = 4 * GIB  # a larger difference is another process that took memory at the same time

# What this process holds outside of the allocator, by index, where it was measured: the context is made once in a process.
_contexts: dict[int, int] = {}


class Cuda:
    """One CUDA or ROCm device, by torch's index.

    An allocator that is not torch's own (`CUDAPluggableAllocator`, RMM) keeps no statistics and cannot be capped. Then the driver's figures
    count, `exact_peak` and `enforces` are False.
    """

    shared_with_host = False

    def __init__(self, index: int) -> None:
        self._index = index
        is_first = not _has_context(index)
        self._properties: Any = torch.cuda.get_device_properties(index)
        uuid = getattr(self._properties, "uuid", None)
        self._uuid = None if uuid is None else str(uuid)
        self.facts = Facts("cuda", index, self._properties.name, self._uuid)
        self._used_before = self._driver().used_bytes if is_first else None
        self.exact_peak = self.enforces = self._counts = _counts_memory(index)
        # torch reads the older name first: https://pytorch.org/docs/stable/notes/cuda.html
        settings = os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or os.environ.get("PYTORCH_ALLOC_CONF") or ""
        self.allocator = settings if self._counts else "a pluggable allocator, which keeps no statistics"

    def memory(self, *, who: bool = True) -> Memory:
        driver = self._driver()
        try:
            free, total = torch.cuda.mem_get_info(self._index)
        except (RuntimeError, AttributeError) as error:
            # Some unified-memory systems and old drivers do not answer. NVML's figures are the second choice.
            if driver.total_bytes is None or driver.used_bytes is None:
                raise MemoryUnknown(
                    f"nobody said how much memory cuda:{self._index} ({self.facts.name}) has; asked torch.cuda.mem_get_info ({_first_line(error)}) "
                    f"and {driver.why_not or 'NVML: not supported'}"
                ) from error
            free, total = driver.total_bytes - driver.used_bytes, driver.total_bytes
        others = driver.others if who else ()
        if not self._counts:
            return Memory(total, free, total - free, 0, others, PHYSICAL)
        reserved = torch.cuda.memory_reserved(self._index)
        outside = _contexts.get(self._index) if driver.ours_bytes is None else max(driver.ours_bytes - reserved, 0)
        limits = {PHYSICAL: free, FRACTION: int(_fraction(self._index) * total) - reserved}
        if getattr(self._properties, "is_integrated", False):  # its memory is the host's, where others take and give back, too
            limits[HOST] = psutil.virtual_memory().available
        binding = min(limits, key=lambda limit: limits[limit])
        return Memory(total, max(limits[binding], 0), reserved, outside, others, binding)

    def held_bytes(self) -> int:
        return int(torch.cuda.memory_reserved(self._index)) if self._counts else self._used_bytes()

    def live_bytes(self) -> int:
        return int(torch.cuda.memory_allocated(self._index)) if self._counts else self._used_bytes()

    @contextmanager
    def watch(self) -> Iterator[Watch]:
        with nullcontext(_Peak(self._index)) if self._counts else SampledPeak(self._used_bytes) as watch:
            yield watch

    @contextmanager
    def capped(self, budget_bytes: int) -> Iterator[None]:
        """Inside, the caching allocator refuses to reserve more than `budget_bytes`, or than what the caller's own memory fraction
        leaves. The CUDA context does not count."""
        if not self._counts:
            yield
            return
        before = _fraction(self._index)
        fraction = min(max(budget_bytes / self._properties.total_memory, 0.0), before)
        torch.cuda.set_per_process_memory_fraction(fraction, self._index)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(before, self._index)

    def prepare(self) -> None:
        """Creates the context and loads cuBLAS, so that the first trial does not measure them."""
        with torch.cuda.device(self._index):
            matrix = torch.ones(64, 64, device="cuda")
            (matrix @ matrix).sum().item()
        if self._used_before is not None and self._counts:
            # In a container the driver does not say which processes are ours. What the card holds more than before is ours.
            used = self._driver().used_bytes
            if used is not None and 0 < (grown := used - self._used_before - torch.cuda.memory_reserved(self._index)) < _MOST_CONTEXT_BYTES:
                _contexts[self._index] = grown
            self._used_before = None

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._index)

    def release(self) -> None:
        gc.collect()
        with nullcontext() if self._counts else suppress(RuntimeError):
            torch.cuda.empty_cache()
        # Pinned host memory is cached, too, and is not the card's.
        empty_host_cache = getattr(torch._C, "_host_emptyCache", None)
        if empty_host_cache is not None:
            empty_host_cache()

    def _driver(self) -> nvml.DriverAnswer:
        return nvml.ask(self._uuid, _pci(self._properties)) if torch.version.hip is None else nvml.DriverAnswer(why_not="NVML: not an NVIDIA card")

    def _used_bytes(self) -> int:
        free, total = torch.cuda.mem_get_info(self._index)
        return int(total - free)


class _Peak:
    def __init__(self, index: int) -> None:
        self._index = index
        self.restart()

    def restart(self) -> None:
        self._most = 0
        torch.cuda.reset_peak_memory_stats(self._index)
        self._retries_before = self._stat("num_alloc_retries")

    def peak_bytes(self) -> int:
        return max(self._most, int(torch.cuda.max_memory_reserved(self._index)))

    def lap_bytes(self) -> int:
        lap, self._most = int(torch.cuda.max_memory_allocated(self._index)), self.peak_bytes()
        torch.cuda.reset_peak_memory_stats(self._index)
        return lap

    def retries(self) -> int:
        return self._stat("num_alloc_retries") - self._retries_before

    def _stat(self, name: str) -> int:
        return int(torch.cuda.memory_stats(self._index).get(name, 0))


def _has_context(index: int) -> bool:
    """True if this process has a CUDA context on the device, or if it cannot be told."""
    has = getattr(torch._C, "_cuda_hasPrimaryContext", None)
    return has is None or (torch.cuda.is_initialized() and bool(has(index)))


def _counts_memory(index: int) -> bool:
    """False if the allocator in use keeps no statistics: https://docs.pytorch.org/docs/stable/notes/cuda.html (custom allocators)."""
    try:
        torch.cuda.memory_reserved(index)
    except RuntimeError as error:
        if "does not yet support" in str(error) or "not supported" in str(error):
            return False
        raise
    return True


_ENVIRONMENTS_FRACTION = re.compile(r"per_process_memory_fraction:\s*([0-9.]+)")


def _fraction(index: int) -> float:
    """The memory fraction that is set now, 1.0 without one. torch before 2.8 cannot read it: there only that of the environment is known."""
    get: Any = getattr(torch.cuda, "get_per_process_memory_fraction", None)
    if get is not None:
        return min(float(get(index)), 1.0)  # other backends of the allocator say much more where none is set
    told = _ENVIRONMENTS_FRACTION.search(os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or os.environ.get("PYTORCH_ALLOC_CONF") or "")
    return float(told[1]) if told else 1.0


def _pci(properties: Any) -> str | None:
    """The PCI bus id, as in `"00000000:65:00.0"`; None if this torch does not report it."""
    if not hasattr(properties, "pci_bus_id"):
        return None
    return f"{properties.pci_domain_id:08X}:{properties.pci_bus_id:02X}:{properties.pci_device_id:02X}.0"


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
