"""What a device answers: a Protocol, and the records it hands out."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from autoaccum.units import MIB, parse_headroom


@dataclass(frozen=True)
class Consumer:
    """A process that holds memory of the device. `bytes` is None where nobody would say."""

    pid: int
    bytes: int | None
    name: str


@dataclass(frozen=True)
class Memory:
    """One reading of a device, in bytes.

    total_bytes: what the device has (on a MIG slice: the slice).
    free_bytes: what this process could still take: the least that any limit leaves.
    ours_bytes: held by this process: the allocator's reserved bytes on a GPU, resident bytes on a CPU.
    outside_bytes: held by this process beyond its allocator (context, libraries); None if unknown.
    others: other processes that hold memory of the device, largest first, as far as anyone would say.
    binding_limit: what binds: "physical", a cgroup's path, "cap".
    """

    total_bytes: int
    free_bytes: int
    ours_bytes: int
    outside_bytes: int | None
    others: tuple[Consumer, ...]
    binding_limit: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Memory:
        return cls(**{**fields, "others": tuple(Consumer(**other) for other in fields["others"])})


@dataclass(frozen=True)
class Facts:
    """Which device it is. `uuid` is None where the device has none."""

    kind: str
    index: int | None
    name: str
    uuid: str | None

    @property
    def label(self) -> str:
        """`"cuda:0"`, `"cpu"`: what `torch.device` takes."""
        return self.kind if self.index is None else f"{self.kind}:{self.index}"


class Watch(Protocol):
    """Watches the peak between `device.watch()` and `peak_bytes()`."""

    def peak_bytes(self) -> int:
        """The most that was held since: reserved bytes on a GPU, resident bytes on a CPU."""

    def lap_bytes(self) -> int:
        """The most that live tensors took since the last lap (as `live_bytes`); a new lap begins."""

    def retries(self) -> int:
        """How often the allocator had to flush its cache and ask again since."""


class SampledPeak:
    """A `Watch` for systems that keep no peak themselves: a thread reads what is held, and what is live, every 2 ms."""

    def __init__(self, held: Callable[[], int], live: Callable[[], int] | None = None, every_s: float = 0.002) -> None:
        self._held, self._live, self._every_s = held, live or held, every_s
        self._over, self._lock = threading.Event(), threading.Lock()
        self._most = self._lap = 0
        self._thread = threading.Thread(target=self._sample, name="autoaccum-peak", daemon=True)

    def __enter__(self) -> SampledPeak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def peak_bytes(self) -> int:
        self._read()
        return self._most

    def lap_bytes(self) -> int:
        self._read()
        with self._lock:
            lap, self._lap = self._lap, 0
        return lap

    def retries(self) -> int:
        return 0

    def _read(self) -> None:
        with self._lock:
            self._most, self._lap = max(self._most, self._held()), max(self._lap, self._live())

    def _sample(self) -> None:
        while not self._over.wait(self._every_s):
            self._read()


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


@dataclass(frozen=True)
class Budget:
    """What a window may peak at, and what that was made of; all bytes.

    cap_bytes is the limit that the user gave, None without one. bucket_bytes: kept free for what other ranks' engine will take.
    """

    budget_bytes: int
    headroom_bytes: int
    memory: Memory
    cap_bytes: int | None
    bucket_bytes: int = 0


SHARED = "shared by ranks"  # as a binding limit: of what is free, other ranks of the job have their parts
LEAST_GPU_HEADROOM = 256 * MIB
# Used only where a cap is given and nobody can tell what the context holds: about what a CUDA context
# with cuBLAS and cuDNN loaded takes on recent cards.
ASSUMED_OUTSIDE = 512 * MIB


def budget(memory: Memory, *, kind: str, limit_bytes: int | None = None, headroom: str | int = "3%") -> Budget:
    """`min(cap - outside, ours + free) - headroom`, in the terms of the peak.

    The headroom is a size or a percentage of what there is; on a GPU a percentage keeps at least 256 MiB.
    The result may be zero or less where nothing is left; the caller says so. Raises `UsageError` for a headroom
    that cannot be read.
    """
    there_is = memory.ours_bytes + memory.free_bytes
    if limit_bytes is not None:
        outside = ASSUMED_OUTSIDE if memory.outside_bytes is None else memory.outside_bytes
        there_is = min(there_is, limit_bytes - outside)
    kept = parse_headroom(headroom, max(there_is, 0))
    if kind != "cpu" and "%" in str(headroom):
        kept = max(kept, LEAST_GPU_HEADROOM)
    return Budget(there_is - kept, kept, memory, limit_bytes)
