"""`PlanRecord`: the figures of a plan. Reports, framework arguments and pictures are made from it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from autoaccum.distributed import Fleet

if TYPE_CHECKING:
    from typing_extensions import Self

SCHEMA = "autoaccum.plan/1"


@dataclass(frozen=True)
class PlannedDevice:
    """The device that a plan was made on. The bytes are those read before the first trial."""

    kind: str
    name: str
    uuid: str | None
    total_bytes: int
    free_bytes: int
    index: int | None = None

    @property
    def label(self) -> str:
        """The name for `torch.device`: `"cuda:0"`."""
        return self.kind if self.index is None else f"{self.kind}:{self.index}"


@dataclass(frozen=True)
class TrialRecord:
    """One trial, as the plan stores it. `Reading` describes the fields.

    samples_per_second: of a whole window in a `full` run, otherwise of its first two micro-batches and a step.
    """

    micro_batch: int
    accumulation_steps: int
    outcome: str
    phase: str
    peak_bytes: int | None
    seconds: float
    cached: bool = False
    full: bool = False
    samples_per_second: float | None = None


_WHOLE = ("target_batch", "micro_batch", "accumulation_steps", "share", "rank", "world_size", "largest_fit", "budget_bytes", "headroom_bytes")
_WHOLE_OR_NONE = (
    "smallest_refused", "peak_bytes", "outside_bytes", "predicted_refusal", "target_tokens", "micro_tokens", "eval_batch", "eval_peak_bytes",
)  # fmt: skip


def _check_types(values: dict[str, Any]) -> None:
    """Raises `TypeError` for a figure of a plan that is no number, and for a word that is no text."""
    device, trials = values["device"], values["trials"]
    whole = [(name, values[name]) for name in _WHOLE]
    whole += [(name, values[name]) for name in _WHOLE_OR_NONE if values.get(name) is not None]
    whole += [(name, each) for name in ("micro_batches", "shares") for each in values[name]]
    whole += [("device", device.total_bytes), ("device", device.free_bytes), *(("arithmetic", pair[0]) for pair in values["arithmetic"])]
    whole += [("trials", number) for trial in trials for number in (trial.micro_batch, trial.accumulation_steps, trial.peak_bytes) if number is not None]
    for name, value in whole:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} is {str(value)[:40]!r}, not a whole number")
    numbers = [values["seconds"], values["samples_per_second"], *(trial.seconds for trial in trials), *(trial.samples_per_second for trial in trials)]
    if not all(value is None or isinstance(value, (int, float)) for value in numbers):
        raise TypeError("a time is no number")
    texts = [device.kind, device.name, values.get("job", ""), values.get("allocator", ""), values["job_fingerprint"], *values["warnings"], *values["hints"]]
    texts += [word for trial in trials for word in (trial.outcome, trial.phase)] + [pair[1] for pair in values["arithmetic"]]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("a text is none")


@dataclass(frozen=True)
class PlanRecord:
    """How one optimizer step over `target_batch` samples runs on one device, or on this rank's device.

    micro_batches: sizes of the window's micro-batches, larger first; they sum to `share`. Empty for a rank without a share.
    shares: the shares of all ranks; they sum to the target.
    fleet: the ranks and their speed as far as it is known; None for a single rank.
    largest_fit: the largest size that ran and fitted. smallest_refused: the smallest larger size that did not fit.
    budget_bytes: the limit for the peak of a window.
    peak_bytes: the peak of the confirming run; None for a command on a GPU, whose peak cannot be seen from outside.
    outside_bytes: bytes that the process holds outside its allocator; None if unknown.
    shapes: tensor shapes of the largest micro-batch that was measured.
    allocator: the allocator's settings during measurement, in words. Training must use the same settings.
    arithmetic: the parts of the budget as (bytes, word). The first is positive, the others are subtracted.
    eval_batch: the largest batch that ran forward only, with the optimizer's state resident; None if it was not asked for, or if none fits.
    eval_peak_bytes: its peak.
    target_tokens: the effective batch in tokens; None if it is in samples. `target_batch` is then the number of the longest samples that
        have these tokens, and the window that was measured; a window of shorter samples has more of them.
    micro_tokens: the largest micro-batch in tokens, padding included, that was measured; None if the target is in samples.
    learning: True while an `Accumulator` still learns it in training. learned_windows: the windows it was learned in; 0 for a plan of trials.
    per_length: a plan for each requested length, ascending. This plan is the one for the longest.
    """

    target_batch: int
    micro_batch: int
    accumulation_steps: int
    micro_batches: tuple[int, ...]
    share: int
    shares: tuple[int, ...]
    rank: int
    world_size: int
    largest_fit: int
    smallest_refused: int | None
    device: PlannedDevice
    shapes: dict[str, tuple[int, ...]]
    budget_bytes: int
    peak_bytes: int | None
    outside_bytes: int | None
    headroom_bytes: int
    samples_per_second: float | None
    trials: tuple[TrialRecord, ...]
    seconds: float
    versions: dict[str, str]
    job_fingerprint: str
    job: str = ""
    allocator: str = ""
    predicted: bool = False
    predicted_refusal: int | None = None
    arithmetic: tuple[tuple[int, str], ...] = ()
    warnings: tuple[str, ...] = ()
    hints: tuple[str, ...] = field(default=())
    fleet: Fleet | None = None
    objective: str = "fewest-steps"
    per_length: tuple[tuple[int, PlanRecord], ...] = ()
    target_tokens: int | None = None
    micro_tokens: int | None = None
    eval_batch: int | None = None
    eval_peak_bytes: int | None = None
    learning: bool = False
    learned_windows: int = 0

    @property
    def spare_bytes(self) -> int | None:
        """Budget minus peak; None if the peak is unknown."""
        return None if self.peak_bytes is None else self.budget_bytes - self.peak_bytes

    @property
    def effective_batch(self) -> int:
        """The sum of the micro-batches of all ranks, which is the target."""
        return sum(self.shares)

    def as_dict(self) -> dict[str, Any]:
        """The document that `--json` prints, schema autoaccum.plan/1."""
        document: dict[str, Any] = {"schema": SCHEMA}
        first = ("job", "target_batch", "effective_batch", "micro_batch", "accumulation_steps", "micro_batches", "share", "shares")
        for name in (*first, *(each.name for each in fields(self))):
            document.setdefault(name, getattr(self, name))
        document["per_length"] = [[length, plan.as_dict()] for length, plan in self.per_length]
        document["fleet"] = None if self.fleet is None else self.fleet.as_dict()
        document["spare_bytes"] = self.spare_bytes
        document["device"] = asdict(self.device)
        document["trials"] = [asdict(each) for each in self.trials]
        return json.loads(json.dumps(document))  # type: ignore[no-any-return] # turns tuples into lists, as they are read back

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> Self:
        """Reads the record that `as_dict` wrote. Raises `KeyError` or `TypeError` for an incomplete document."""
        values = {each.name: document[each.name] for each in fields(cls) if each.name in document}
        for name in ("micro_batches", "shares", "warnings", "hints"):
            values[name] = tuple(values[name])
        values["device"] = PlannedDevice(**values["device"])
        values["trials"] = tuple(TrialRecord(**each) for each in values["trials"])
        values["shapes"] = {path: tuple(shape) for path, shape in values["shapes"].items()}
        _check_types(values)
        values["fleet"] = Fleet.from_dict(values["fleet"]) if values.get("fleet") else None
        values["per_length"] = tuple((length, cls.from_dict(nested)) for length, nested in values.get("per_length", ()))
        values["arithmetic"] = tuple((bytes_, word) for bytes_, word in values["arithmetic"])
        return cls(**values)
