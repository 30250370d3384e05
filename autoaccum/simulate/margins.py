"""How far a simulated peak may be from a real one: quantiles of residuals on rows that other people measured.

Asymmetric, because saying "fits" wrongly costs an out-of-memory, and saying "does not fit" wrongly a smaller micro-batch.
From `benchmarks/results/estimate_published.json`, which `benchmarks/estimate_published.py` makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Margin:
    """The real peak lies between `(1 - low)` and `(1 + high)` times the simulated one in nine of ten cases seen."""

    low: float
    high: float
    provenance: str


# From the file named above, a test sees to that: 5 % of a family's rows lie beyond either end.
_FROM = "{rows} published runs of {what}: nine of ten peaks lay between -{low:.1%} and +{high:.1%} of the simulated one (not our measurements)"
SEEN = {
    "convolutions": Margin(0.071, 0.097, _FROM.format(rows=134, what="convolutional nets", low=0.071, high=0.097)),
    "others": Margin(0.104, 0.039, _FROM.format(rows=54, what="transformers and MLPs", low=0.104, high=0.039)),
}
APPROXIMATE = Margin(0.15, 0.30, "a guess: kernels other than the card's were traced, or its allocator has other rules")


def family(operators: Sequence[str]) -> str:
    """`"convolutions"` where more than one block in a hundred is a convolution's, else `"others"`: a transformer cuts its patches by one."""
    return "convolutions" if sum(operator == "convolution" for operator in operators) > len(operators) / 100 else "others"


def margin_of(operators: Sequence[str], *, approximate: bool = False) -> Margin:
    """The margin for a tape with these operators."""
    return APPROXIMATE if approximate else SEEN[family(operators)]
