"""Apple GPUs. Best effort: the backend keeps no peak, so it is sampled, and it cannot tell its own cap.

Memory is shared with the host: what the system has left bounds it as much as Metal's recommendation does.
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

    shared_with_host = False  # what is measured is what Metal allocated; copies on the host are beside it
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
        # The fraction is of the recommended size, up to 2. There is a setter and no getter: 1.7 is the
        # default high watermark (PYTORCH_MPS_HIGH_WATERMARK_RATIO).
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
