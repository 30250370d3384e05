"""The first windows of training, looked at once more: is the loss the mean over samples that its weights suppose?

A plan may come from a file, or from samples that were all alike, and the loss may be another than the one that was tuned.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from autoaccum.data import Splitter, Window, batches, variety
from autoaccum.distributed import unwrapped
from autoaccum.errors import AutoaccumWarning
from autoaccum.plan import Plan
from autoaccum.probe import COMPARED_SAMPLES, compare_values
from autoaccum.window import Job, WindowStart


class FirstWindows:
    """Compares loss values on a few unlike samples of the first windows, and warns once if they are not weighted right.

    Samples that hold unlike numbers of labels, tokens or mask ones tell most. Where all samples of a part are alike, and those of other parts
    are not, samples of two parts are put together, or half of the labels are left out of a copy. The loss runs four times on at most eight
    samples, without gradients; the state is as before afterwards.
    """

    _LOOKED_AT, _SEEN = 3, 8  # windows that are compared at most, and windows in which such samples are searched

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = jobs
        self._looked_at = self._seen = self._plain = 0
        self._kinds: set[tuple[float, ...]] = set()  # of samples in parts whose samples are all alike

    @property
    def is_over(self) -> bool:
        """True if no further window is looked at."""
        return self._looked_at >= self._LOOKED_AT or self._seen >= self._SEEN

    @classmethod
    def of(cls, plan: Plan, jobs: Sequence[Job]) -> FirstWindows | None:
        """Of jobs that train with a plan; None over ranks, where forward may communicate, and if the plan has told it already."""
        told_already = any("not over samples" in warning for warning in plan.warnings)
        return None if told_already or plan.fleet is not None else cls(jobs)

    def _telling(self, window: Window, most: int) -> Any:
        """At most `most` samples of a window that show if the loss is weighted right; None if they would show nothing."""
        parts = [(part, size) for part, size in zip(window.parts, window.sizes) if size]
        for part, size in sorted(parts, key=lambda pair: -pair[1])[:4]:
            if size > 1 and variety.is_countable(part) and not variety.is_uniform(part):
                return variety.most_unlike(part, size, most)
        # Samples are alike in every part, as in a loader that sorts by length, or come one by one.
        unlike = {variety.kind(part): part for part, _ in parts if variety.is_countable(part)}
        new = set(unlike) - self._kinds
        self._kinds |= new
        if len(self._kinds) > 1 and new:
            if len(unlike) > 1 and (joined := batches.join([batches.resize(part, 1) for part in list(unlike.values())[:2]])) is not None:
                return joined
            together = batches.join([part for part, _ in parts[:most]]) if parts[0][1] == 1 else None
            part, size = parts[0] if together is None else (together, min(len(parts), most))
            return variety.blanked(batches.resize(part, max(min(most, size), 2)))
        part, size = max(parts, key=lambda pair: pair[1])
        if size > 1 and self._plain < 2 and variety.may_count(part):  # what is counted in may be of a kind that is not known here
            self._plain += 1
            return batches.resize(part, min(most, size))
        return None

    def _cut_by_user(self, window: Window, split: Splitter, most: int) -> tuple[Any, int | None]:
        """The first samples of the largest part, and how many, of a window that the user's own function cuts."""
        part, size = max(zip(window.parts, window.sizes), key=lambda pair: pair[1])
        if size < 2:
            return None, None
        return (part, size) if size <= most else (split(part, [most, size - most])[0], most)

    def look(self, window: Window, loss: Callable[[Any, Any], Any] | None, micro_batch: int, *, at_any: bool = False) -> None:
        """Looks at a window before it runs, or after.

        loss: as given to `step`; None for the jobs' own. micro_batch: how many samples fit. at_any: also at samples that seem to show nothing.
        """
        self._seen += 1
        if (window.told and window.split is None) or not window.samples:
            return
        try:
            # Two samples at least: forward alone, without gradients, takes less than a micro-batch of one in training.
            most = max(min(COMPARED_SAMPLES, micro_batch), 2)
            few, samples = (self._telling(window, most), None) if window.split is None else self._cut_by_user(window, window.split, most)
            if few is None and at_any and window.split is None:
                part, size = max(zip(window.parts, window.sizes), key=lambda pair: pair[1])
                few = batches.resize(part, min(most, size)) if size > 1 else None
            if few is None:
                return
            state = WindowStart(self._jobs)
            state.note()
        except Exception:
            return  # a batch of an unusual kind; whether it can run is not decided here
        self._looked_at += 1
        # A loader that reads ahead asks in the middle of a window.
        gradients = [(parameter, parameter.grad) for job in self._jobs for parameter in job.trained()]
        for job in self._jobs:
            try:
                message = compare_values(replace(job, model=unwrapped(job.model), loss=loss or job.loss, split=window.split), few, samples)
            except Exception:  # what is wrong with the job is told when the window itself runs
                continue
            finally:
                state.put_back()
                for parameter, gradient in gradients:
                    parameter.grad = gradient
            if message:
                self._looked_at = self._LOOKED_AT
                warnings.warn(message, AutoaccumWarning, stacklevel=5)
