"""The protocol that each kind of device implements, and the protocol of its peak watch."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from autoaccum.devices.memory import Facts, Memory


class Watch(Protocol):
    """Records the peak memory since `device.watch()`."""

    def peak_bytes(self) -> int:
        """The peak since the watch started: reserved bytes on a GPU, resident bytes on a CPU."""

    def lap_bytes(self) -> int:
        """The peak of `live_bytes` since the last lap. Starts a new lap."""

    def restart(self) -> None:
        """Forgets the peaks and the retries so far."""

    def retries(self) -> int:
        """How many times the allocator flushed its cache and retried an allocation since the watch started."""


class Device(Protocol):
    """One device. All sizes are bytes. No figure is cached between calls."""

    facts: Facts
    allocator: str  # settings of the allocator that change peaks, as text; "" for the defaults
    exact_peak: bool  # False if the peak is sampled
    enforces: bool  # True if `capped` really refuses memory above the cap
    shared_with_host: bool  # True if the measured memory also holds snapshots of the training state and full batches

    def memory(self, *, who: bool = True) -> Memory:
        """A reading of the memory. `who=False` does not look up other processes. Raises `MemoryUnknown`."""

    def held_bytes(self) -> int:
        """Bytes that this process holds now: reserved bytes on a GPU, resident bytes on a CPU, as in `Watch.peak_bytes`."""

    def live_bytes(self) -> int:
        """Bytes of live tensors now: allocated bytes on a GPU, resident bytes on a CPU."""

    def watch(self) -> AbstractContextManager[Watch]:
        """A context in which the peak is recorded."""

    def capped(self, budget_bytes: int) -> AbstractContextManager[object]:
        """A context in which this process cannot hold more than `budget_bytes`, in the unit of `held_bytes`."""

    def prepare(self) -> None:
        """Creates what must exist before a cap is set: contexts, thread pools, the allocator's settings."""

    def synchronize(self) -> None:
        """Waits until the device is idle. Called before and after each timing."""

    def release(self) -> None:
        """Returns cached free memory to the system, so that every trial starts from the same state."""
