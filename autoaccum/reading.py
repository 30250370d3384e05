"""What a trial shows, and what it is told: records that parent and child hand each other. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from autoaccum.devices.base import Budget, Facts

Outcome = Literal["fits", "over-budget", "oom", "killed", "timeout"]
# Called with the phase that begins ("batch", "forward", "backward", "clip", "step") and the micro-batch's index.
Say = Callable[[str, int], None]


@dataclass(frozen=True)
class Limits:
    """What the user allows: a memory limit in bytes, headroom as given, seconds per trial."""

    memory_bytes: int | None = None
    headroom: str | int = "3%"
    timeout_s: float | None = None

    def timeout_of(self, steps: int, *, full: bool) -> float | None:
        """Seconds that a trial may take; a confirming run as many times more as it has more micro-batches than three."""
        return self.timeout_s if self.timeout_s is None or not full else self.timeout_s * max(2 * steps / 3, 1.0)


@dataclass(frozen=True)
class Reading:
    """What one trial showed.

    micro_batch, accumulation_steps: the size that was tried and the window it stands for.
    phase: the last phase that was reached: "batch", "forward", "backward", "clip" (unscaling and clipping), "step".
    peak_bytes: the most held, None where the process did not live to tell; base_bytes: what is held between
    micro-batches (parameters, optimizer state, resident gradients), as far as known.
    activation_bytes: the most that was live in forward and backward, which is what grows with the micro-batch;
    the optimizer's step may peak above it, whatever the size. None where the trial did not get so far.
    seconds: the whole trial; window_seconds: its last window.
    limited: False for a run without the user's limit, for its figure. full: True for a confirming run, the whole window twice. doubtful: True for an out-of-memory that a library
    told of in words it also uses for other failures; such a library may refuse the same again in this process,
    whatever memory there is (oneDNN remembers).
    """

    micro_batch: int
    accumulation_steps: int
    outcome: Outcome
    phase: str
    peak_bytes: int | None
    seconds: float
    base_bytes: int | None = None
    activation_bytes: int | None = None
    window_seconds: float | None = None
    full: bool = False
    cached: bool = False
    doubtful: bool = False
    limited: bool = True
    shapes: dict[str, tuple[int, ...]] | None = None
    remarks: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return self.outcome == "fits"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Reading:
        shapes = fields.get("shapes")
        tidy = {"shapes": shapes and {path: tuple(shape) for path, shape in shapes.items()}, "remarks": tuple(fields.get("remarks", ()))}
        return cls(**{**fields, **tidy})


@dataclass(frozen=True)
class Trying:
    """Progress: a trial is under way. `phase` and `index` say where in its window it is."""

    micro_batch: int
    accumulation_steps: int
    full: bool
    phase: str
    index: int


# Called while a trial runs and with its reading when it has ended.
Progress = Callable[[Trying | Reading], None]


@dataclass(frozen=True)
class Subject:
    """What is rehearsed, as far as the line needs to know it.

    gradient_bytes: of all gradients at once. batch_norms: names of BatchNorm layers in training mode.
    snapshot_bytes: host memory that the copies of the training state take. allocator: its settings, in words.
    """

    device: Facts
    gradient_bytes: int
    fingerprint: str
    batch_norms: tuple[str, ...]
    snapshot_bytes: int
    allocator: str
    remarks: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Subject:
        tidy = {"device": Facts(**fields["device"]), "batch_norms": tuple(fields["batch_norms"]), "remarks": tuple(fields["remarks"])}
        return cls(**{**fields, **tidy})


class Rehearser(Protocol):
    """Runs trials of one job on one device, in this process or in another."""

    @property
    def enforces(self) -> bool:
        """False where nothing stops a trial that is too big: then only what is predicted to fit may run."""

    def subject(self) -> Subject:
        """What is rehearsed."""

    def budget(self, *, limited: bool = True) -> Budget:
        """What a window may peak at, read now; without `limited`, what the device itself would allow."""

    def measure(self, micro_batches: Sequence[int], *, full: bool = False, limited: bool = True) -> Reading:
        """One trial of the window `micro_batches`, undone. `full`: the whole window, twice."""

    def fresh(self) -> None:
        """Makes the next trial start as training will: in a new process, where trials have one."""
