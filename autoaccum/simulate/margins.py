"""Margins of error of a simulated peak: quantiles of its residuals against peaks that other people measured.

The margins are asymmetric. A wrong "fits" costs an out-of-memory; a wrong "does not fit" costs a smaller micro-batch.
They come from `benchmarks/results/estimate_published.json`, which `benchmarks/estimate_published.py` writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Margin:
    """In nine of ten measured cases, the real peak is between `(1 - low)` and `(1 + high)` times the simulated peak.

    provenance: the source of the margin, in words.
    """

    low: float
    high: float
    provenance: str


# Copied from the file named above; a test compares them. 5 % of a family's rows lie beyond each end.
_FROM = "{rows} published runs of {what}: nine of ten peaks lay between -{low:.1%} and +{high:.1%} of the simulated one (not our measurements)"
SEEN = {
    "convolutions": Margin(0.071, 0.097, _FROM.format(rows=134, what="convolutional nets", low=0.071, high=0.097)),
    "others": Margin(0.104, 0.039, _FROM.format(rows=54, what="transformers and MLPs", low=0.104, high=0.039)),
}
APPROXIMATE = Margin(0.15, 0.30, "a guess: kernels other than the card's were traced, or its allocator has other rules")


def family(operators: Sequence[str]) -> str:
    """`"convolutions"` if more than 1 % of the blocks come from convolutions, else `"others"`.

    A single convolution does not count, because a transformer cuts its patches with one.
    """
    return "convolutions" if sum(operator == "convolution" for operator in operators) > len(operators) / 100 else "others"


def margin_of(operators: Sequence[str], *, approximate: bool = False) -> Margin:
    """The margin for a tape with these operators. approximate: the result is `APPROXIMATE`, for every family."""
    return APPROXIMATE if approximate else SEEN[family(operators)]
