"""A reading of a device's memory, and the processes that hold it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

PHYSICAL, FRACTION, HOST = "physical", "memory fraction", "host memory"  # binding limits
RLIMIT = "RLIMIT_DATA"  # one of this process alone


@dataclass(frozen=True)
class Consumer:
    """A process that holds memory of the device. `bytes` is None if the driver does not report it."""

    pid: int
    bytes: int | None
    name: str


@dataclass(frozen=True)
class Memory:
    """A reading of a device's memory, in bytes.

    total_bytes: memory of the device (of a MIG slice: of the slice).
    free_bytes: memory that this process can still take, under the tightest limit.
    ours_bytes: memory that this process holds: the allocator's reserved bytes on a GPU, resident bytes on a CPU.
    outside_bytes: memory that this process holds outside of its allocator (context, libraries); None if unknown.
    others: other processes that hold memory of the device, largest first; only the known ones.
    binding_limit: the limit that sets free_bytes: "physical", a cgroup's path, "cap", "memory fraction" (that the caller has set),
        "host memory" (of a device that shares it with the host).
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
    """The identity of a device. `uuid` is None if the device has none."""

    kind: str
    index: int | None
    name: str
    uuid: str | None

    @property
    def label(self) -> str:
        """The device's name for `torch.device`: `"cuda:0"`, `"cpu"`."""
        return self.kind if self.index is None else f"{self.kind}:{self.index}"
