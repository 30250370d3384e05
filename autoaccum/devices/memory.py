"""One reading of a device's memory, and who holds it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


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
