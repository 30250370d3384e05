"""What a trial shows, and what it is told: records that parent and child hand each other. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from autoaccum.devices import Budget, Facts

Outcome = Literal["fits", "over-budget", "oom", "killed", "timeout"]
COMPARED_SAMPLES = 8  # enough to tell weights apart, few enough to cost nothing


@dataclass(frozen=True)
class Limits:
    """What the user allows: a memory limit in bytes, headroom as given, seconds per trial.

    sharing_ranks: how many ranks of the job share the device's free memory, this one included. buckets: True where the model will be
    wrapped in DistributedDataParallel, whose copy of the gradients is kept free.
    """

    memory_bytes: int | None = None
    headroom: str | int = "3%"
    timeout_s: float | None = None
    sharing_ranks: int = 1
    buckets: bool = False

    def timeout_of(self, steps: int, *, full: bool, windows: int = 2) -> float | None:
        """Seconds that a trial may take; a run of whole windows as many times more as it has more micro-batches than three."""
        return self.timeout_s if self.timeout_s is None or not full else self.timeout_s * max(windows * steps / 3, 1.0)


@dataclass(frozen=True)
class Reading:
    """What one trial showed.

    micro_batch, accumulation_steps: the size that was tried and the window it stands for.
    phase: the last phase that was reached: "batch", "forward", "backward", "clip" (unscaling and clipping), "step".
    peak_bytes: the most held, None where the process did not live to tell; base_bytes: what is held between
    micro-batches (parameters, optimizer state, resident gradients), as far as known.
    activation_bytes: the most that was live in forward and backward, which is what grows with the micro-batch;
    the optimizer's step may peak above it, whatever the size. None where the trial did not get so far.
    seconds: the whole trial; window_seconds: a window, the median of all but the first.
    least_bytes: what the size takes whatever an allocator makes of it, known where it was simulated. budget_bytes: what it was allowed.
    limited: False for a run without the user's limit, for its figure. full: True for a confirming run, the whole window at least twice. doubtful: True for an out-of-memory that a library
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
    least_bytes: int | None = None
    budget_bytes: int | None = None

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
class Equivalence:
    """Does the gradient of a split batch equal that of the whole one? Compared on a few samples, dropout turned off.

    exact: True or False; None where it could not be compared, and `message` says why.
    sizes: the pieces compared, of `samples` at once. relative_error: of their gradient, BatchNorm in eval mode.
    cause: "sum", "token-mean", "weights", "mixed" (a layer or the loss looks at several samples), "batch-norm", "random",
    "" where it is exact. layers: names of those that break it. batch_norm_error: as relative_error, with
    BatchNorm as it trains.
    message: one sentence, with the cure.
    """

    exact: bool | None
    samples: int
    sizes: tuple[int, ...]
    relative_error: float | None
    cause: str
    layers: tuple[str, ...]
    message: str
    batch_norm_error: float | None = None

    def __str__(self) -> str:
        return self.message

    def as_dict(self) -> dict[str, Any]:
        """The document that `check --equivalence --json` prints, schema autoaccum.equivalence/1."""
        return {"schema": "autoaccum.equivalence/1", **asdict(self)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Equivalence:
        told = {name: value for name, value in fields.items() if name != "schema"}
        return cls(**{**told, "sizes": tuple(told["sizes"]), "layers": tuple(told["layers"])})


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
    predicted: True where trials are simulated.
    """

    device: Facts
    gradient_bytes: int
    fingerprint: str
    batch_norms: tuple[str, ...]
    snapshot_bytes: int
    allocator: str
    remarks: tuple[str, ...]
    predicted: bool = False

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Subject:
        tidy = {"device": Facts(**fields["device"]), "batch_norms": tuple(fields["batch_norms"]), "remarks": tuple(fields["remarks"])}
        return cls(**{**fields, **tidy})


@dataclass(frozen=True)
class Conditions:
    """What readings depend on, so that they can be remembered.

    key: by what it is about, in digests; readings under another key say nothing here. floor_bytes: what the process holds before the first
    trial, in the terms of the peak. sample_bytes: what each sample of a window takes of the measured memory while it waits on the host.
    """

    key: dict[str, str]
    floor_bytes: int
    sample_bytes: int


class Rehearser(Protocol):
    """Runs trials of one job on one device, in this process or in another."""

    @property
    def enforces(self) -> bool:
        """False where nothing stops a trial that is too big: then only what is predicted to fit may run."""

    def subject(self) -> Subject:
        """What is rehearsed."""

    def budget(self, *, limited: bool = True) -> Budget:
        """What a window may peak at, read now; without `limited`, what the device itself would allow."""

    def measure(self, micro_batches: Sequence[int], *, full: bool = False, limited: bool = True, windows: int = 2) -> Reading:
        """One trial of the window `micro_batches`, undone. `full`: the whole window, `windows` times."""

    def compare(self, samples: int) -> Equivalence | None:
        """Whether splitting `samples` of the job's own changes the gradient, undone; None where it cannot be asked here."""

    def conditions(self) -> Conditions | None:
        """What readings depend on; None where they are not worth remembering."""

    def fresh(self) -> None:
        """Makes the next trial start as training will: in a new process, where trials have one."""
