"""Intel GPUs. Best effort: written from torch's documentation, not yet run on an Intel GPU."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from autoaccum.devices.memory import Facts, Memory
from autoaccum.devices.protocol import Watch
from autoaccum.errors import MemoryUnknown


class Xpu:
    """One Intel GPU, by torch's index."""

    shared_with_host = False
    allocator = ""
    exact_peak = True

    def __init__(self, index: int) -> None:
        self._index = index
        self._properties: Any = torch.xpu.get_device_properties(index)
        self.facts = Facts("xpu", index, self._properties.name, None)
        self.enforces = hasattr(torch.xpu, "set_per_process_memory_fraction")

    def memory(self, *, who: bool = True) -> Memory:
        reserved = int(torch.xpu.memory_reserved(self._index))
        try:
            free, total = torch.xpu.mem_get_info(self._index)
        except (RuntimeError, AttributeError) as error:
            raise MemoryUnknown(f"nobody said how much memory xpu:{self._index} ({self.facts.name}) has; asked torch.xpu.mem_get_info ({error})") from error
        return Memory(int(total), int(free), reserved, None, (), "physical")

    def held_bytes(self) -> int:
        return int(torch.xpu.memory_reserved(self._index))

    def live_bytes(self) -> int:
        return int(torch.xpu.memory_allocated(self._index))

    @contextmanager
    def watch(self) -> Iterator[Watch]:
        yield _Peak(self._index)

    @contextmanager
    def capped(self, budget_bytes: int) -> Iterator[None]:
        if not self.enforces:
            yield
            return
        set_fraction: Any = torch.xpu.set_per_process_memory_fraction
        set_fraction(min(max(budget_bytes / self._properties.total_memory, 0.0), 1.0), self._index)
        try:
            yield
        finally:
            set_fraction(1.0, self._index)

    def prepare(self) -> None:
        torch.ones(1, device=f"xpu:{self._index}")

    def synchronize(self) -> None:
        torch.xpu.synchronize(self._index)

    def release(self) -> None:
        gc.collect()
        torch.xpu.empty_cache()


class _Peak:
    def __init__(self, index: int) -> None:
        self._index = index
        self.restart()

    def restart(self) -> None:
        self._most = 0
        torch.xpu.reset_peak_memory_stats(self._index)

    def peak_bytes(self) -> int:
        return max(self._most, int(torch.xpu.max_memory_reserved(self._index)))

    def lap_bytes(self) -> int:
        lap, self._most = int(torch.xpu.max_memory_allocated(self._index)), self.peak_bytes()
        torch.xpu.reset_peak_memory_stats(self._index)
        return lap

    def retries(self) -> int:
        return 0
