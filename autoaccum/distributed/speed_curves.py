"""Speed curves: the time of a rank as a function of its share of a window."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from autoaccum.errors import PlanError


@dataclass(frozen=True)
class AffineCurve:
    """The curve of a rank whose micro-step of n samples takes `step_seconds + sample_seconds * n`.

    most: the largest micro-batch; 0 if the rank cannot hold one sample.
    window_seconds: the time per window that does not depend on the share (the optimizer step).
    gpu: the name of the rank's GPU, for reports. Raises `PlanError` for negative figures.
    """

    most: int
    step_seconds: float
    sample_seconds: float
    window_seconds: float = 0.0
    gpu: str = ""

    def __post_init__(self) -> None:
        if self.most < 0 or min(self.step_seconds, self.sample_seconds, self.window_seconds) < 0:
            raise PlanError(f"a rank with {self}: neither sizes nor times can be negative")

    def seconds(self, share: int) -> float:
        """The least time for `share` samples; infinite if the rank cannot hold a sample."""
        if share == 0:
            return self.window_seconds
        if self.most == 0:
            return math.inf
        return self.window_seconds + self.step_seconds * -(-share // self.most) + self.sample_seconds * share

    def within(self, seconds: float, share: int) -> int:
        """The largest share, at most `share`, that takes no longer than `seconds`; -1 if even a share of 0 takes longer."""
        left = seconds - self.window_seconds
        if left < 0:
            return -1
        if self.most == 0:
            return 0
        full = self.step_seconds + self.sample_seconds * self.most
        if not full > 0 or left / full > share:
            return share
        steps = int(left // full)
        samples, rest = steps * self.most, left - steps * full
        if rest >= self.step_seconds:
            samples += self.most - 1 if self.sample_seconds == 0 else min(self.most - 1, int((rest - self.step_seconds) / self.sample_seconds))
        samples = min(samples, share)
        while samples < share and self.seconds(samples + 1) <= seconds:  # corrects rounding
            samples += 1
        while samples > 0 and self.seconds(samples) > seconds:
            samples -= 1
        return samples

    def sizes(self, share: int, steps: int | None = None) -> tuple[int, ...]:
        """The micro-batch sizes of `share`, larger first. So the last one, in which gradients cross, is the smallest."""
        if share == 0:
            return (0,) * (steps or 0)
        return even(share, steps or -(-share // self.most))

    def micro_seconds(self, micro_batch: int) -> float:
        """The time of one micro-step; 0 for a micro-step without samples."""
        return self.step_seconds + self.sample_seconds * micro_batch if micro_batch else 0.0


class TableCurve:
    """The curve of a rank whose micro-step was measured for every size.

    seconds: the times of 1, 2, ... samples. A time that is below an earlier one is noise, and is raised to it.
    window_seconds, gpu: as in `AffineCurve`. Raises `PlanError` for negative times.
    """

    def __init__(self, seconds: Sequence[float], window_seconds: float = 0.0, gpu: str = "") -> None:
        if min((*seconds, window_seconds), default=0.0) < 0:
            raise PlanError("a rank's times cannot be negative")
        self._steps = list(accumulate(seconds, max))
        self.most, self.window_seconds, self.gpu = len(self._steps), window_seconds, gpu
        self._least, self._last = [0.0], [0]  # by share: the least time, and the last micro-batch of that share

    def _grown(self, share: int) -> list[float]:
        while len(self._least) <= share:
            samples = len(self._least)
            best = min(range(1, min(self.most, samples) + 1), key=lambda size: self._least[samples - size] + self._steps[size - 1], default=0)
            self._least.append(self._least[samples - best] + self._steps[best - 1] if best else math.inf)
            self._last.append(best)
        return self._least

    def seconds(self, share: int) -> float:
        """As `AffineCurve.seconds`."""
        return self.window_seconds + self._grown(share)[share]

    def within(self, seconds: float, share: int) -> int:
        """As `AffineCurve.within`."""
        if self.window_seconds > seconds:
            return -1
        low, high = 0, share
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.seconds(middle) <= seconds else (low, middle - 1)
        return low

    def sizes(self, share: int, steps: int | None = None) -> tuple[int, ...]:
        """As `AffineCurve.sizes`, but without `steps` the fastest micro-batches; their sizes may differ by more than one."""
        if steps is not None:
            return even(share, steps) if share else (0,) * steps
        self._grown(share)
        micro_batches = []
        while share:
            micro_batches.append(self._last[share])
            share -= micro_batches[-1]
        return tuple(sorted(micro_batches, reverse=True))

    def micro_seconds(self, micro_batch: int) -> float:
        """As `AffineCurve.micro_seconds`."""
        return self._steps[micro_batch - 1] if micro_batch else 0.0


def even(share: int, steps: int) -> tuple[int, ...]:
    """`share` samples in `steps` micro-batches that differ by at most one, larger first."""
    size, larger = divmod(share, steps)
    return (size + 1,) * larger + (size,) * (steps - larger)


Curve = AffineCurve | TableCurve
