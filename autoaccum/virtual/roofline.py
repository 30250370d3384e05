"""Time curves of a window on a card that is not here: the longer of arithmetic and memory traffic sets the time.

Both run at the fraction of the card's peak that training usually reaches: of a job operator by operator, of two figures as a whole. The times are
estimates, with an interval; `tune` under torchrun measures them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autoaccum.distributed import AffineCurve
from autoaccum.simulate import Profile

if TYPE_CHECKING:
    from autoaccum.trace import OperatorWork

# Fractions of a card's peak that single operators reach: of fp32, of tensor cores, of memory bandwidth. Fitted to the forward and backward seconds of
# OPT-350M on seven cards (eth-easl/sailor, SOSP 2025, tensor parallelism 1; `benchmarks/fleet_times.py`). Left out in turn, six cards are within 16 %,
# and a GH200 is 23 % quicker in the forecast.
_OF_FP32, _OF_TENSOR_CORES, _OF_BANDWIDTH = 0.75, 0.6, 0.5
_INTERVAL = (1.35, 1.0, 0.8)  # times the middle estimate: slow, middle, fast
_SECONDS_PER_CALL = 8e-6  # to launch an operator from Python, below which no micro-step gets
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
    gradient_bytes: int = 0  # that cross between ranks; 0 for four bytes a parameter


def traced_curves(card: Profile, most: int, less: tuple[int, Sequence[OperatorWork]], more: tuple[int, Sequence[OperatorWork]]) -> tuple[AffineCurve, ...]:
    """The slow, the middle and the fast time curve of a card, from what a job's operators do in micro-batches of two sizes.

    most: the largest micro-batch that the card holds. less, more: a number of samples, and the work of every operator.
    """
    few, many = less[0], more[0]

    def seconds(samples: int, pace: float, *, step: bool = False) -> float:
        ends = [[work for work in works if (work.phase == "step") == step] for _, works in (less, more)]
        if len(ends[0]) != len(ends[1]):  # the job takes another course: as a whole
            first, second = (sum(_operator_seconds(card, work.flops, work.nbytes, work.dtype, pace) for work in works) for works in ends)
            return max(first + (second - first) * (samples - few) / (many - few), 0.0)
        times = (samples - few) / (many - few)
        total = 0.0
        for low, high in zip(*ends):
            flops, nbytes = low.flops + (high.flops - low.flops) * times, low.nbytes + (high.nbytes - low.nbytes) * times
            total += _operator_seconds(card, max(flops, 0.0), max(nbytes, 0.0), low.dtype, pace)
        return max(total, pace * _SECONDS_PER_CALL * len(ends[0]))

    curves = []
    for pace in _INTERVAL:
        half, whole = max(most // 2, 1), max(most, 1)
        first, last = seconds(half, pace), seconds(whole, pace)
        sample = (last - first) / (whole - half) if whole > half else last / whole
        curves.append(AffineCurve(most, max(last - sample * whole, 0.0), sample, seconds(few, pace, step=True), card.name))
    return tuple(curves)


def _operator_seconds(card: Profile, flops: float, nbytes: float, dtype: str, pace: float) -> float:
    """No operator is quicker than the card's peak."""
    assert card.bandwidth is not None  # `forecaster` refuses other cards
    fp32 = card.flops.get("fp32")
    rate = card.flops.get(dtype) or fp32
    part = _OF_TENSOR_CORES if rate is not None and fp32 is not None and rate.value > fp32.value else _OF_FP32
    bandwidth = float(card.bandwidth.value)
    moved = nbytes / bandwidth * max(pace / _OF_BANDWIDTH, 1.0)
    return moved if rate is None else max(moved, flops / float(rate.value) * max(pace / part, 1.0))


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
