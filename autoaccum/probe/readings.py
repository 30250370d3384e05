"""The records of trials: limits, readings, progress, and the `Rehearser` protocol.

Parent and child process send each other these records. Importing this file does not load torch.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol

from autoaccum.devices import Budget, Facts
from autoaccum.errors import JobFailed, signal_name

Outcome = Literal["fits", "over-budget", "oom", "killed", "timeout", "kernel-limit"]
COMPARED_SAMPLES = 8  # enough to distinguish the causes, few enough to be cheap


@dataclass(frozen=True)
class Limits:
    """The limits that the user sets.

    memory_bytes: the memory limit. headroom: as the user gave it. timeout_s: seconds per trial.
    sharing_ranks: the number of the job's ranks that share the device's free memory, this rank included.
    per_token: True if windows are counted in tokens, so that every loss is made one per token (`window.per_token`).
    trial_s: seconds of training after which a trial of a command counts as fitting; None for the whole run.
    engine, world: of a simulated job over several ranks, what divides or copies its state (`ddp`, `fsdp2`, `zero1` to `zero3`), and over how many.
    buckets: True if the model will be wrapped in DistributedDataParallel. Memory for its copy of the gradients is then kept free.
    """

    memory_bytes: int | None = None
    headroom: str | int = "3%"
    timeout_s: float | None = None
    trial_s: float | None = None
    sharing_ranks: int = 1
    buckets: bool = False
    per_token: bool = False
    engine: str = ""
    world: int = 1

    def timeout_of(self, steps: int, *, full: bool, windows: int = 2) -> float | None:
        """The timeout of a trial in seconds. For a run of whole windows it grows with their micro-batches: `timeout_s` is for three."""
        return self.timeout_s if self.timeout_s is None or not full else self.timeout_s * max(windows * steps / 3, 1.0)


@dataclass(frozen=True)
class Reading:
    """The result of one trial.

    micro_batch, accumulation_steps: the size that was tried, and the accumulation steps of its window.
    outcome: "kernel-limit" is a size that a kernel cannot count, however much memory there is.
    phase: the last phase that was reached: "batch", "forward", "backward", "clip" (unscaling and clipping), "step".
    peak_bytes: the peak of the trial; None if the process ended before it could report it.
    seconds: the time of the whole trial.
    base_bytes: the memory held between micro-batches (parameters, optimizer state, resident gradients), if it is known.
    activation_bytes: the peak of forward and backward, which grows with the micro-batch. The optimizer step may peak above it,
    at any size. None if the trial did not reach the end of backward.
    window_seconds: the median time of a window, without the first one.
    full: True for a confirming run, which runs the whole window, or as much of it as shows what the rest does.
    doubtful: True for an out-of-memory with a message that the library also uses for other failures. Such a library (oneDNN)
    remembers the failure and may refuse the same size again in this process, even if there is enough memory.
    limited: False for a run without the user's limit, to measure how much the size needs.
    least_bytes: the peak of the requested bytes, without an allocator; known only if the trial was simulated.
    budget_bytes: the budget of the trial. compiled_graphs: the graphs that `torch.compile` compiled in it.
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
    compiled_graphs: int = 0

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
    """The result of comparing the gradient of a split batch with that of the whole batch, on a few samples and without dropout.

    exact: True if the two gradients are equal up to rounding, False if not. None if they could not be compared; `message` then gives the reason.
    samples: the number of samples in the whole batch. sizes: the sizes of the pieces.
    relative_error: the relative error of the split batch's gradient, with BatchNorm in eval mode.
    cause: "sum", "token-mean", "weights", "mixed" (a layer or the loss looks at several samples), "batch-norm", "count" (the second
        part of a returned pair is no count), "state" (forward changes something that later micro-batches see), "random", or "" if exact.
    layers: the names of the layers that cause the difference.
    message: one sentence, with the cure.
    batch_norm_error: like `relative_error`, with BatchNorm in training mode.
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
        values = {name: value for name, value in fields.items() if name != "schema"}
        return cls(**{**values, "sizes": tuple(values["sizes"]), "layers": tuple(values["layers"])})


@dataclass(frozen=True)
class Trying:
    """The progress of a running trial. phase, index: its current phase and micro-batch."""

    micro_batch: int
    accumulation_steps: int
    full: bool
    phase: str
    index: int


# Called with a `Trying` while a trial runs, and with its `Reading` when it has ended.
Progress = Callable[[Trying | Reading], None]


@dataclass(frozen=True)
class Subject:
    """A description of the job under trial and its device, for `tuner.one_device`.

    gradient_bytes: the bytes of all gradients. batch_norms: the names of the BatchNorm layers in training mode.
    snapshot_bytes: the host memory of the copies of the training state. allocator: the allocator's settings, in words.
    predicted: True if trials are simulated. half: True if the job computes in half precision already. compiled: True if
    `torch.compile` compiles a part of it.
    """

    device: Facts
    gradient_bytes: int
    fingerprint: str
    batch_norms: tuple[str, ...]
    snapshot_bytes: int
    allocator: str
    remarks: tuple[str, ...]
    predicted: bool = False
    half: bool = False
    compiled: bool = False

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Subject:
        tidy = {"device": Facts(**fields["device"]), "batch_norms": tuple(fields["batch_norms"]), "remarks": tuple(fields["remarks"])}
        return cls(**{**fields, **tidy})


@dataclass(frozen=True)
class Conditions:
    """Everything that readings depend on. The reading cache uses it.

    key: digests by topic. Readings under another key are not valid here.
    floor_bytes: the memory that the process holds before the first trial, measured like the peak.
    sample_bytes: the measured memory that each sample of a window takes while it waits on the host.
    """

    key: dict[str, str]
    floor_bytes: int
    sample_bytes: int


_DEATHS = (-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT)  # of libraries that do not check an allocation


def after_death(reading: Reading, code: int, *, enforced: bool = True) -> Reading:
    """The reading of a trial whose process ended.

    reading: with the outcome "oom" and the last phase. code: as in `Popen.returncode`. enforced: True if its memory was limited.
    Raises `JobFailed` if the process was not ended as it is where memory runs out.
    """
    if code == -signal.SIGKILL:
        return replace(reading, outcome="killed")
    where = f"in {reading.phase}, at a micro-batch of {reading.micro_batch}"
    if code not in _DEATHS or not enforced:
        how = f"was ended by {signal_name(-code)}" if code < 0 else f"ended the process (exit code {code})"
        raise JobFailed(f"the job {how} {where}")
    said = f"a trial was ended by {signal_name(-code)} {where}, as libraries end that run out of memory: taken as not fitting"
    return replace(reading, remarks=(said,))


class Rehearser(Protocol):
    """Runs trials of one job on one device, in this process or in another."""

    @property
    def enforces(self) -> bool:
        """False if nothing stops a trial that is too big. Then only sizes that are predicted to fit may run."""

    def subject(self) -> Subject:
        """The job under trial and its device."""

    def budget(self, *, limited: bool = True) -> Budget:
        """The largest allowed peak of a window, read now. limited: False for the budget without the user's limit."""

    def measure(self, micro_batches: Sequence[int], *, full: bool = False, limited: bool = True, windows: int = 2) -> Reading:
        """Runs one trial of the window `micro_batches` and restores the job's state. full: run the whole window, after one micro-batch, or
        `windows` times if those are more than two."""

    def evaluate(self, samples: int, trained: int) -> Reading:
        """Runs one trial of an evaluation: `samples` samples forward only, after an optimizer step of `trained` samples. Restores the job's state."""

    def sample_tokens(self) -> int:
        """The tokens of one of the job's samples, padding included."""

    def compare(self, samples: int) -> Equivalence | None:
        """Compares split and whole gradient on `samples` of the job's own samples, and restores the state. None if this cannot be done."""

    def conditions(self) -> Conditions | None:
        """Everything that readings depend on; None if readings are not cached."""

    def fresh(self) -> None:
        """Gives the next trial the same start as training: a new process, if trials run in their own process."""
