"""Time curves of a window on a card that is not here: the longer of arithmetic and memory traffic sets the time.

Both run at the fraction of the card's peak that training usually reaches. The times are estimates, with an interval; `tune`
under torchrun measures them.
"""

from __future__ import annotations

from dataclasses import dataclass

from autoaccum.distributed import AffineCurve
from autoaccum.simulate import Profile

# Fractions of a card's dense peak that training reaches: 0.30 to 0.55 of arithmetic (Chowdhery et al. 2022, PaLM, table 3: 21 to 57 %
# across published large models), 0.5 to 0.85 of memory bandwidth. The middle value is the estimate; the ends give the interval.
_ARITHMETIC = (0.30, 0.42, 0.55)
_BANDWIDTH = (0.50, 0.70, 0.85)
# Bytes that cross the card's memory bus, per byte or parameter; fp32 weights and Adam.
BYTES_MOVED_PER_KEPT_BYTE = 3  # an activation is written once; then two more passes read it or write its gradient
_PER_PARAMETER_AND_STEP = 10  # weights read in forward and backward, gradients added to, in part in half precision
_PER_PARAMETER_AND_WINDOW = 28  # weights, gradients and two moments read and written
_LAUNCH_SECONDS = 12e-3  # to launch the kernels of a micro-step from Python; measured values vary from 3 to 30 ms


@dataclass(frozen=True)
class Work:
    """The work of a job: bytes and floating point operations. None for a figure that the user did not give.

    fixed: bytes of weights, gradients, optimizer state and buckets. per_sample: bytes that each sample of a micro-batch holds.
    flops_per_sample, bytes_per_sample: floating point operations and bytes moved, for each sample.
    """

    fixed: int
    per_sample: int
    parameters: int
    flops_per_sample: float | None = None
    bytes_per_sample: float | None = None


def time_curves(card: Profile, most: int, work: Work, dtype: str) -> tuple[AffineCurve, AffineCurve, AffineCurve]:
    """The slow, the middle and the fast time curve of a card. most: the largest micro-batch that it holds. dtype: the arithmetic's."""
    assert card.bandwidth is not None  # `forecaster` refuses other cards
    bandwidth = float(card.bandwidth.value)
    moved = (
        work.bytes_per_sample
        if work.bytes_per_sample is not None
        else 0.0
        if work.flops_per_sample is not None
        else BYTES_MOVED_PER_KEPT_BYTE * work.per_sample
    )
    curves = []
    for arithmetic, traffic in zip(_ARITHMETIC, _BANDWIDTH):
        sample = moved / (bandwidth * traffic)
        if work.flops_per_sample is not None:
            sample = max(sample, work.flops_per_sample / (card.flops[dtype].value * arithmetic))
        step = _LAUNCH_SECONDS + work.parameters * _PER_PARAMETER_AND_STEP / (bandwidth * traffic)
        curves.append(AffineCurve(most, step, sample, work.parameters * _PER_PARAMETER_AND_WINDOW / (bandwidth * traffic), card.name))
    return curves[0], curves[1], curves[2]
