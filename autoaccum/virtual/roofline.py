"""How long a window takes on a card that is not here: arithmetic or memory traffic, whichever is longer.

Each at the share of the card's peak that training usually reaches. An estimate, with an interval; `tune` under torchrun measures.
"""

from __future__ import annotations

from dataclasses import dataclass

from autoaccum.distributed import AffineCurve
from autoaccum.simulate import Profile

# Shares of a card's dense peak that training reaches: of arithmetic 0.30 to 0.55 (Chowdhery et al. 2022, PaLM, table 3: 21 to 57 % across
# published large models), of memory bandwidth 0.5 to 0.85. The middle is used, the ends give the interval.
_ARITHMETIC = (0.30, 0.42, 0.55)
_BANDWIDTH = (0.50, 0.70, 0.85)
# Bytes that cross the card's memory bus, per byte or parameter; fp32 weights and Adam.
BYTES_MOVED_PER_KEPT_BYTE = 3  # an activation is written once and read, or its gradient written, twice
_PER_PARAMETER_AND_STEP = 10  # weights read in forward and backward, gradients added to, in part in half precision
_PER_PARAMETER_AND_WINDOW = 28  # weights, gradients and two moments read and written
_LAUNCH_SECONDS = 12e-3  # of a micro-step's kernels from Python; seen to vary from 3 to 30 ms


@dataclass(frozen=True)
class Work:
    """What a job asks of a card; bytes, and floating point operations. None where nobody said.

    fixed: weights, gradients, optimizer, buckets. per_sample: what each sample of a micro-batch keeps.
    """

    fixed: int
    per_sample: int
    parameters: int
    flops_per_sample: float | None = None
    bytes_per_sample: float | None = None


def time_curves(card: Profile, most: int, work: Work, dtype: str) -> tuple[AffineCurve, AffineCurve, AffineCurve]:
    """The slow, the middle and the fast curve of a card that holds at most `most` samples, for this work in this precision."""
    assert card.bandwidth is not None  # `_parsed` refuses others
    bandwidth = float(card.bandwidth.value)
    moved = (
        work.bytes_per_sample
        if work.bytes_per_sample is not None
        else 0.0
        if work.flops_per_sample is not None
        else BYTES_MOVED_PER_KEPT_BYTE * work.per_sample
    )
    made = []
    for arithmetic, traffic in zip(_ARITHMETIC, _BANDWIDTH):
        sample = moved / (bandwidth * traffic)
        if work.flops_per_sample is not None:
            sample = max(sample, work.flops_per_sample / (card.flops[dtype].value * arithmetic))
        step = _LAUNCH_SECONDS + work.parameters * _PER_PARAMETER_AND_STEP / (bandwidth * traffic)
        made.append(AffineCurve(most, step, sample, work.parameters * _PER_PARAMETER_AND_WINDOW / (bandwidth * traffic), card.name))
    return made[0], made[1], made[2]
