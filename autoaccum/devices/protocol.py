"""What a device answers: a Protocol, and the records it hands out."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from autoaccum.devices.memory import Facts, Memory


class Watch(Protocol):
    """Watches the peak between `device.watch()` and `peak_bytes()`."""

    def peak_bytes(self) -> int:
        """The most that was held since: reserved bytes on a GPU, resident bytes on a CPU."""

    def lap_bytes(self) -> int:
        """The most that live tensors took since the last lap (as `live_bytes`); a new lap begins."""

    def retries(self) -> int:
        """How often the allocator had to flush its cache and ask again since."""


class Device(Protocol):
    """One device. All figures are bytes; nothing here is cached between calls."""

    facts: Facts
    allocator: str  # settings of the allocator that change peaks, in words; "" for its defaults
    exact_peak: bool  # False where the peak is sampled
    enforces: bool  # True where `capped` really refuses memory above the cap
    shared_with_host: bool  # True where snapshots of the training state and whole batches sit in the measured memory

    def memory(self, *, who: bool = True) -> Memory:
        """A reading; without `who` other processes are not looked up. Raises `MemoryUnknown`."""

    def held_bytes(self) -> int:
        """What this process holds now, in the terms of the peak."""

    def live_bytes(self) -> int:
        """What live tensors take now: allocated bytes on a GPU, resident bytes on a CPU."""

    def watch(self) -> AbstractContextManager[Watch]:
        """Starts watching the peak."""

    def capped(self, budget_bytes: int) -> AbstractContextManager[object]:
        """Refuses this process more than `budget_bytes`, in the terms of the peak, while inside."""

    def prepare(self) -> None:
        """Whatever must exist before a cap is set: contexts, thread pools, the allocator's settings."""

    def synchronize(self) -> None:
        """Waits until the device is idle. Called around every clock."""

    def release(self) -> None:
        """Gives cached free memory back, so that trials start alike."""
