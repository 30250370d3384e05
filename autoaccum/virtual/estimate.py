"""Estimates of a job on cards that are not here: `Estimate` for one card, and `Estimates` for a table of cards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from autoaccum.plan import window_notation
from autoaccum.tuner import WhatIf
from autoaccum.units import in_words, number, unit_for

ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")  # what divides or copies the state of ranks
_FIGURES = {"total_bytes": "its memory", "context_bytes": "the size of its CUDA context", "cublas_workspace_bytes": "the size of cuBLAS's workspace"}


@dataclass(frozen=True)
class Estimates:
    """Estimates of one job on several cards, in the order of the request.

    gpus: one `Estimate` for each card. seconds: the time that the estimates took. tape: the tape of one card's window, if requested.
    what_if: by card, the job with changes that make it need less memory, if requested; the quickest first.
    world, shard: the ranks that train together, and what divides or copies their state; each estimate is then of a rank with the largest share.
    """

    job: str
    target_batch: int
    gpus: tuple[Estimate, ...]
    seconds: float
    tape: dict[str, Any] | None = field(default=None, repr=False)
    what_if: dict[str, tuple[WhatIf, ...]] = field(default_factory=dict)
    world: int = 1
    shard: str = ""

    def __str__(self) -> str:
        return self.explain()

    def explain(self) -> str:
        """A table with one card a line, and notes below it."""
        shapes = next((estimate.measured_at for estimate in self.gpus if estimate.measured_at), None) or {}
        shape_text = ", ".join(f"{path} {('n', *shape[1:])}".replace("'", "") for path, shape in list(shapes.items())[:4])
        lines = [
            f"{self.target_batch} samples a step of {self.job}"
            + (f" over {self.world} ranks ({self.shard}), {-(-self.target_batch // self.world)} on each" if self.world > 1 else "")
            + (f", simulated at {shape_text}" if shape_text else "")
            + "; the columns weights to rest add up to the peak (rest: workspaces, the optimizer's temporaries, fragmentation)"
        ]
        lines.append("".join(f"{title:<{width}}" for title, width in _TABLE).rstrip())
        lines += [_row(estimate) for estimate in self.gpus]
        for estimate in self.gpus:
            lines += _notes_on(estimate, traced=estimate.gpu in self.what_if)
        for gpu, rows in self.what_if.items():
            lines += _changed(gpu, rows)
        lines += [f"warning: {warning}" for warning in dict.fromkeys(warning for estimate in self.gpus for warning in estimate.warnings)]
        lines += [f"margin: {margin}" for margin in dict.fromkeys(estimate.margin for estimate in self.gpus)]
        guessed = sorted({name for estimate in self.gpus for name in estimate.estimated if name in _FIGURES})
        if guessed:
            some = ", for some of these cards" if len(self.gpus) > 1 else ""
            words = [_FIGURES[name] for name in guessed]
            lines.append(f"estimated, not measured on a card{some}: {', '.join(words)} (autoaccum profiles show NAME)")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """The document that `estimate --json` prints, schema autoaccum.estimate/1."""
        return {
            "schema": "autoaccum.estimate/1",
            "job": self.job,
            "target_batch": self.target_batch,
            "gpus": [estimate.as_dict() for estimate in self.gpus],
            "seconds": self.seconds,
            **({"world": self.world, "shard": self.shard, "share": -(-self.target_batch // self.world)} if self.world > 1 else {}),
            **({"what_if": {gpu: [asdict(row) for row in rows] for gpu, rows in self.what_if.items()}} if self.what_if else {}),
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


def _row(estimate: Estimate) -> str:
    parts, unit = estimate.breakdown, unit_for(estimate.peak_bytes)
    low, high = estimate.peak_interval_bytes
    cells = [
        estimate.gpu,
        window_notation(estimate.micro_batches) if estimate.fits else "does not fit",
        f"{in_words(estimate.peak_bytes, unit)} ({number(low, unit)} to {number(high, unit)})",
        in_words(estimate.budget_bytes),
        *(in_words(parts[kind]) for kind in ("parameters", "gradients", "optimizer", "activations")),
        in_words(parts["workspace"] + parts["step"] + parts["unused"]),
    ]
    return "".join(f"{cell:<{max(width, len(cell) + 1)}}" for cell, (_, width) in zip(cells, _TABLE)).rstrip()


def _changed(gpu: str, rows: Sequence[WhatIf]) -> Iterator[str]:
    """The table of a job with changes, each traced."""
    yield f"{gpu}, what if: each traced; time is a lower bound, the arithmetic of a sample on this card as a multiple of the unchanged job's"
    wide = max((len(row.words) for row in rows), default=0) + 3
    for row in rows:
        if row.error:
            yield f"  {row.words:<{wide}}could not be traced: {row.error}"
            continue
        plan = window_notation(row.micro_batches) if row.fits else "does not fit"
        yield f"  {row.words:<{wide}}{plan:<22}{in_words(row.peak_bytes):<11}time x {row.times:.2f}"
    if not rows:
        yield "  the job can have none of the changes that are known"


def _notes_on(estimate: Estimate, *, traced: bool = False) -> Iterator[str]:
    if not estimate.fits:
        need, there = in_words(estimate.peak_bytes), in_words(estimate.budget_bytes)
        close = " by the simulation, which may be off by more than what is left" if estimate.peak_bytes <= estimate.budget_bytes else ""
        yield f"{estimate.gpu}: the smallest micro-batch needs {need} of {there}{close}"
        if not traced:
            yield "  --what-if (in Python what_if=True) traces the job with changes that need less memory: bfloat16, checkpointing, LoRA, shorter samples and others"
    elif estimate.largest_micro_batch is not None and estimate.hard_largest_micro_batch is not None:
        flushed = estimate.hard_largest_micro_batch
        more = f", {flushed} if the allocator flushes its cache on the way, which is slow" if flushed > estimate.largest_micro_batch else ""
        yield f"{estimate.gpu}: without headroom and a margin for the simulation's error, {estimate.largest_micro_batch} samples fit at once{more}"


@dataclass(frozen=True)
class Estimate:
    """The plan of a job on a card that is not here, and its memory in bytes.

    fits, micro_batch, accumulation_steps, micro_batches: the plan. Its peak stays below the budget even at the upper end of its
    interval. If not even the smallest micro-batch fits, these are False, None, None and empty, and the other figures are those
    of the smallest micro-batch.
    peak_bytes: the simulated peak reserved bytes.
    peak_interval_bytes: the real peak lies in it in nine of ten published cases of the model's family.
    breakdown: bytes at the peak, by kind: parameters, gradients, optimizer (its state), activations, workspace, step (temporary
    memory of the optimizer step), context (outside the allocator, so not part of the peak), and unused (reserved, and free
    between blocks).
    largest_micro_batch: the largest without a flush of the cache, with gradients resident and the whole card. None if it was not searched: for many
    cards, and for jobs of which every size must be traced.
    hard_largest_micro_batch: the largest that still runs with flushes.
    estimated: names of the card's numbers that are neither measured nor published. margin: the source of the interval.
    measured_at: the shapes of the micro-batch, by path.
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
    measured_at: dict[str, tuple[int, ...]] | None = None

    @property
    def spare_bytes(self) -> int:
        """The budget minus the simulated peak, in bytes."""
        return self.budget_bytes - self.peak_bytes

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "spare_bytes": self.spare_bytes}

    @classmethod
    def from_dict(cls, told: dict[str, Any]) -> Estimate:
        given = {name: value for name, value in told.items() if name != "spare_bytes"}
        for name in ("micro_batches", "peak_interval_bytes", "estimated", "warnings"):
            given[name] = tuple(given[name])
        given["measured_at"] = given["measured_at"] and {path: tuple(shape) for path, shape in given["measured_at"].items()}
        return cls(**given)
