"""The first windows of training, looked at once more: is the loss the mean over samples that its weights suppose?

A plan may come from a file, or from samples that were all alike, and the loss may be another than the one that was tuned.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from autoaccum.data import Window, variety
from autoaccum.distributed import unwrapped
from autoaccum.plan import Plan
from autoaccum.probe import COMPARED_SAMPLES, compare_values
from autoaccum.window import Job, WindowStart


class FirstWindows:
    """Compares loss values on a few unlike samples of the first windows, and warns once if they are not weighted right.

    Only windows whose samples hold unlike numbers of labels, tokens or mask ones are looked at, because only these can tell. The loss runs
    four times on at most eight samples, without gradients; the state is as before afterwards.
    """

    _LOOKED_AT, _SEEN = 3, 8  # windows that are compared at most, and windows in which such samples are searched

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = jobs
        self._looked_at = self._seen = 0

    @property
    def is_over(self) -> bool:
        """True if no further window is looked at."""
        return self._looked_at >= self._LOOKED_AT or self._seen >= self._SEEN

    @classmethod
    def of(cls, plan: Plan, jobs: Sequence[Job]) -> FirstWindows | None:
        """Of jobs that train with a plan; None over ranks, where forward may communicate, and if the plan has told it already."""
        told_already = any("not over samples" in warning for warning in plan.warnings)
        return None if told_already or plan.fleet is not None else cls(jobs)

    def look(self, window: Window, loss: Callable[[Any, Any], Any] | None, micro_batch: int) -> None:
        """Looks at a window before it runs. loss: as given to `step`; None for the jobs' own. micro_batch: how many samples fit."""
        self._seen += 1
        most = min(COMPARED_SAMPLES, micro_batch)
        if window.told or window.split is not None or not window.parts or most < 2:
            return
        try:
            part, samples = max(zip(window.parts, window.sizes), key=lambda pair: pair[1])
            if samples < 2 or not variety.is_countable(part) or variety.is_uniform(part):
                return
            few = variety.most_unlike(part, samples, most)
            state = WindowStart(self._jobs)
            state.note()
        except Exception:
            return  # a batch of an unusual kind; whether it can run is not decided here
        self._looked_at += 1
        for job in self._jobs:
            if job.count is not None:
                continue
            try:
                message = compare_values(replace(job, model=unwrapped(job.model), loss=loss or job.loss), few)
            except Exception:  # what is wrong with the job is told when the window itself runs
                continue
            finally:
                state.put_back()
            if message:
                self._looked_at = self._LOOKED_AT
                warnings.warn(message, stacklevel=5)
