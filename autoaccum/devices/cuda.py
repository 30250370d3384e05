"""CUDA devices: NVIDIA cards, and AMD cards through ROCm, which torch also calls "cuda".

Free memory comes from `torch.cuda.mem_get_info`: the driver answers for the device that torch uses, also for MIG slices
and for reordered devices. NVML adds the other processes on the device.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from autoaccum.devices import nvml
from autoaccum.devices.memory import Facts, Memory
from autoaccum.devices.protocol import Watch
from autoaccum.errors import MemoryUnknown


class Cuda:
    """One CUDA or ROCm device, by torch's index."""

    shared_with_host = False
    exact_peak = True
    enforces = True

    def __init__(self, index: int) -> None:
        self._index = index
        self._properties: Any = torch.cuda.get_device_properties(index)
        uuid = getattr(self._properties, "uuid", None)
        self._uuid = None if uuid is None else str(uuid)
        self.facts = Facts("cuda", index, self._properties.name, self._uuid)
        # torch reads the older name first: https://pytorch.org/docs/stable/notes/cuda.html
        self.allocator = os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or os.environ.get("PYTORCH_ALLOC_CONF") or ""

    def memory(self, *, who: bool = True) -> Memory:
        driver = nvml.ask(self._uuid, _pci(self._properties)) if torch.version.hip is None else nvml.DriverAnswer(why_not="NVML: not an NVIDIA card")
        reserved = torch.cuda.memory_reserved(self._index)
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
        outside = None if driver.ours_bytes is None else max(driver.ours_bytes - reserved, 0)
        return Memory(total, free, reserved, outside, driver.others if who else (), "physical")

    def held_bytes(self) -> int:
        return int(torch.cuda.memory_reserved(self._index))

    def live_bytes(self) -> int:
        return int(torch.cuda.memory_allocated(self._index))

    @contextmanager
    def watch(self) -> Iterator[Watch]:
        yield _Peak(self._index)

    @contextmanager
    def capped(self, budget_bytes: int) -> Iterator[None]:
        """Inside, the caching allocator refuses to reserve more than `budget_bytes`. The CUDA context does not count."""
        before = _fraction(self._index)
        fraction = min(max(budget_bytes / self._properties.total_memory, 0.0), 1.0)
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

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._index)

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()


class _Peak:
    def __init__(self, index: int) -> None:
        self._index, self._most = index, 0
        torch.cuda.reset_peak_memory_stats(index)
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


def _fraction(index: int) -> float:
    """The memory fraction that is set now; 1.0 (no cap) for torch before 2.8, which cannot read it."""
    get: Any = getattr(torch.cuda, "get_per_process_memory_fraction", None)
    return float(get(index)) if get is not None else 1.0


def _pci(properties: Any) -> str | None:
    """The PCI bus id, as in `"00000000:65:00.0"`; None if this torch does not report it."""
    if not hasattr(properties, "pci_bus_id"):
        return None
    return f"{properties.pci_domain_id:08X}:{properties.pci_bus_id:02X}:{properties.pci_device_id:02X}.0"


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
