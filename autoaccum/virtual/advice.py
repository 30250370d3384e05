"""Advice for a job that does not fit a card: changes that make it need less memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from autoaccum.units import in_words
from autoaccum.virtual.estimate import Estimate
from autoaccum.window import Job


def advice(estimate: Estimate, job: Job) -> tuple[str, ...]:
    """Changes that make the job need less memory, each with the peak that remains, from the estimate's breakdown.

    A change is left out if the job already has it, or if it saves less than 2 % of the peak.
    """
    parts, peak, optimizer = estimate.breakdown, estimate.peak_bytes, job.optimizers[0]
    wide = sum(parameter.nbytes for parameter in job.model.parameters() if parameter.element_size() > 2)
    halved = wide < 0.1 * sum(parameter.nbytes for parameter in job.model.parameters())  # adapters in single precision are not worth the word
    messages = []

    def would(saved: int, change: str) -> None:
        if saved > 0.02 * peak:
            left = peak - saved
            verdict = "fits" if left <= estimate.budget_bytes else "still too much"
            messages.append(f"{change}: about {in_words(left)} ({verdict})")

    would(parts["step"], "fused=True, without which a step takes that much for a moment")
    if parts["optimizer"] > 0:
        would(parts["optimizer"] + parts["step"], f"an optimizer without state (SGD, fused) for {type(optimizer).__name__}")
        would(int(parts["optimizer"] * 0.75), "optimizer state in 8 bits")
    if job.autocast is None and not halved:
        would(parts["activations"] // 2, "bfloat16 autocast, if the loss has none of its own: activations down to half")
    would(int(parts["activations"] * 0.7), "gradient checkpointing, where there is none yet: activations about a third")
    if not halved:
        would(sum(parts[kind] for kind in ("parameters", "gradients", "optimizer", "step", "activations")) // 2, "the model in bfloat16, and with it all else")
    return tuple(messages)


def with_advice(estimate: Estimate, jobs: Sequence[Job]) -> Estimate:
    """The estimate, with advice if the job does not fit."""
    return estimate if estimate.fits else replace(estimate, advice=advice(estimate, jobs[0]))
