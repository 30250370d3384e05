"""Apple GPUs. Best effort: the backend records no peak, so the peak is sampled, and it cannot report its cap.

The GPU shares memory with the host. So both Metal's recommendation and the host's free memory limit it.
https://pytorch.org/docs/stable/mps.html
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import psutil
import torch

from autoaccum.devices.memory import Facts, Memory
from autoaccum.devices.protocol import Watch
from autoaccum.devices.sampled_peak import SampledPeak
from autoaccum.errors import MemoryUnknown


class Mps:
    """The GPU of this Mac."""

    shared_with_host = False  # the peak counts only what Metal allocated, without copies on the host
    allocator = ""
    exact_peak = False
    enforces = True

    def __init__(self) -> None:
        self.facts = Facts("mps", None, "Apple GPU", None)

    def memory(self, *, who: bool = True) -> Memory:
        try:
            recommended = int(torch.mps.recommended_max_memory())
        except (RuntimeError, AttributeError) as error:
            raise MemoryUnknown(f"nobody said how much memory the Apple GPU may use; asked torch.mps.recommended_max_memory ({error})") from error
        held, available = self.held_bytes(), int(psutil.virtual_memory().available)
        left = max(recommended - held, 0)
        return Memory(recommended, min(left, available), held, 0, (), "Metal's recommendation" if left <= available else "physical")

    def held_bytes(self) -> int:
        return int(torch.mps.driver_allocated_memory())

    def live_bytes(self) -> int:
        return int(torch.mps.current_allocated_memory())

    def watch(self) -> AbstractContextManager[Watch]:
        return SampledPeak(self.held_bytes, self.live_bytes)

    @contextmanager
    def capped(self, budget_bytes: int) -> Iterator[None]:
        # The fraction is relative to the recommended size, at most 2. torch has a setter and no getter, so the default
        # high watermark of 1.7 (PYTORCH_MPS_HIGH_WATERMARK_RATIO) is set afterwards.
        torch.mps.set_per_process_memory_fraction(min(max(budget_bytes / torch.mps.recommended_max_memory(), 0.0), 2.0))
        try:
            yield
        finally:
            torch.mps.set_per_process_memory_fraction(1.7)

    def prepare(self) -> None:
        torch.ones(1, device="mps")

    def synchronize(self) -> None:
        torch.mps.synchronize()

    def release(self) -> None:
        gc.collect()
        torch.mps.empty_cache()
