"""What a card that is not here would make of a job, and the table of several cards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from autoaccum.plan import window_notation
from autoaccum.units import in_words, number, unit_for


@dataclass(frozen=True)
class Estimates:
    """Estimates of one job on several cards, in the order they were asked for. `gpus` holds an `Estimate` each."""

    job: str
    target_batch: int
    gpus: tuple[Estimate, ...]
    seconds: float
    tape: dict[str, Any] | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return self.explain()

    def explain(self) -> str:
        """A table of cards, one a line, and what is to be said of them below."""
        shapes = next((each.measured_at for each in self.gpus if each.measured_at), None) or {}
        of = ", ".join(f"{path} {('n', *shape[1:])}".replace("'", "") for path, shape in list(shapes.items())[:4])
        lines = [f"{self.target_batch} samples a step of {self.job}" + (f", simulated at {of}" if of else "") + "; from weights on what is held at the peak"]
        lines[0] += ", the rest being workspaces, a step's own, and free between blocks"
        lines.append("".join(f"{title:<{width}}" for title, width in _TABLE).rstrip())
        lines += [_row(each) for each in self.gpus]
        for each in self.gpus:
            lines += _said_of(each)
        lines += [f"warning: {warning}" for warning in dict.fromkeys(warning for each in self.gpus for warning in each.warnings)]
        lines += [f"margin: {margin}" for margin in dict.fromkeys(each.margin for each in self.gpus)]
        guessed = sorted({name for each in self.gpus for name in each.estimated if name in ("total_bytes", "context_bytes", "cublas_workspace_bytes")})
        if guessed:
            some = ", for some of these cards" if len(self.gpus) > 1 else ""
            lines.append(f"estimated, not measured{some}: {', '.join(guessed)} (autoaccum profiles show NAME)")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """The document that `estimate --json` prints, schema autoaccum.estimate/1."""
        return {
            "schema": "autoaccum.estimate/1",
            "job": self.job,
            "target_batch": self.target_batch,
            "gpus": [each.as_dict() for each in self.gpus],
            "seconds": self.seconds,
        }


_TABLE = (
    ("gpu", 24),
    ("plan", 21),
    ("peak", 26),
    ("budget", 10),
    ("weights", 10),
    ("gradients", 10),
    ("optimizer", 10),
    ("activations", 12),
    ("rest", 10),
)


def _row(each: Estimate) -> str:
    parts, unit = each.breakdown, unit_for(each.peak_bytes)
    low, high = each.peak_interval_bytes
    cells = [
        each.gpu,
        window_notation(each.micro_batches) if each.fits else "does not fit",
        f"{in_words(each.peak_bytes, unit)} ({number(low, unit)} to {number(high, unit)})",
        in_words(each.budget_bytes),
        *(in_words(parts[kind]) for kind in ("parameters", "gradients", "optimizer", "activations")),
        in_words(parts["workspace"] + parts["step"] + parts["unused"]),
    ]
    return "".join(f"{cell:<{max(width, len(cell) + 1)}}" for cell, (_, width) in zip(cells, _TABLE)).rstrip()


def _said_of(each: Estimate) -> Iterator[str]:
    if not each.fits:
        need, there = in_words(each.peak_bytes), in_words(each.budget_bytes)
        close = " by the simulation, which may be off by more than what is left" if each.peak_bytes <= each.budget_bytes else ""
        yield f"{each.gpu}: the smallest micro-batch needs {need} of {there}{close}"
        yield from (f"  with {what}" for what in each.advice)
    elif each.largest_micro_batch is not None and each.hard_largest_micro_batch is not None:
        flushed = each.hard_largest_micro_batch
        more = f", {flushed} if the allocator flushes its cache on the way, which is slow" if flushed > each.largest_micro_batch else ""
        yield f"{each.gpu}: by the simulation alone, without headroom, the largest micro-batch is {each.largest_micro_batch}{more}"


@dataclass(frozen=True)
class Estimate:
    """What a card that is not here would make of a job; bytes.

    fits, micro_batch, accumulation_steps, micro_batches: the plan whose peak stays below the budget even at the upper
    end of its interval; None and empty where not even the smallest micro-batch does, and the figures are then that one's.
    peak_bytes: simulated; peak_interval_bytes: where the real one lies in nine of ten published cases of its family.
    breakdown: what is held at the peak: parameters, gradients, optimizer, activations, workspace, step (what an optimizer's step takes while it
    runs), context (outside of the allocator, so no part of the peak), and unused (reserved, and free between blocks). largest_micro_batch: the largest of all without a
    flush of the cache, with gradients resident and all of the card; hard_largest_micro_batch: the largest that survives
    with flushes. estimated: names of the card's numbers that nobody measured or published. margin: where the interval
    comes from. advice: what would make room.
    """

    gpu: str
    name: str
    total_bytes: int
    budget_bytes: int
    fits: bool
    micro_batch: int | None
    accumulation_steps: int | None
    micro_batches: tuple[int, ...]
    peak_bytes: int
    peak_interval_bytes: tuple[int, int]
    breakdown: dict[str, int]
    largest_micro_batch: int | None
    hard_largest_micro_batch: int | None
    estimated: tuple[str, ...]
    margin: str
    warnings: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()
    measured_at: dict[str, tuple[int, ...]] | None = None

    @property
    def spare_bytes(self) -> int:
        """What the budget leaves above the simulated peak."""
        return self.budget_bytes - self.peak_bytes

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "spare_bytes": self.spare_bytes}

    @classmethod
    def from_dict(cls, told: dict[str, Any]) -> Estimate:
        given = {name: value for name, value in told.items() if name != "spare_bytes"}
        for name in ("micro_batches", "peak_interval_bytes", "estimated", "warnings", "advice"):
            given[name] = tuple(given[name])
        given["measured_at"] = given["measured_at"] and {path: tuple(shape) for path, shape in given["measured_at"].items()}
        return cls(**given)
