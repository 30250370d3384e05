"""The batch of evaluation: the largest that runs forward only while the state of the optimizers is resident."""

from __future__ import annotations

from autoaccum.devices import Budget
from autoaccum.probe import Reading, Rehearser, search
from autoaccum.tuner.trial_log import TrialLog

_LARGEST = 65_536  # a batch above this is hardly faster, and would take long to try


def candidates(most: int) -> list[int]:
    """The sizes to try, ascending: all up to 64, then steps of about 3 %, and `most`, if it is not above 65,536."""
    sizes = [1]
    while sizes[-1] < min(most, _LARGEST):
        sizes.append(min(sizes[-1] + max(1, sizes[-1] // 32), most, _LARGEST))
    return sizes


def largest_evaluation(rehearsal: Rehearser, trials: TrialLog, budget: Budget, most: int) -> Reading | None:
    """The reading of the largest evaluation that fits `budget`, to about 3 %, and is at most `most`; None if not even one sample fits."""
    trained = 2 if rehearsal.subject().batch_norms else 1
    readings: dict[int, Reading] = {}

    def fits(samples: int, _: int) -> Reading:
        readings[samples] = trials.evaluate(rehearsal, samples, trained)
        return readings[samples]

    sizes = candidates(most)
    # No size is the "target", because no gradients are held in any.
    found = search.largest(fits, 2 * sizes[-1], sizes, budget_bytes=lambda: budget.budget_bytes, daring=rehearsal.enforces)
    return readings.get(found.micro_batch)
