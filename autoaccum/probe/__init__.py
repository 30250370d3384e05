"""One trial of a window (in place or in a child process), its reading, and the search over readings.

It exports two kinds of `Rehearser`, `Reading` and its records, `search`, `refusals` and the reading cache.
It imports the doorstep and the rooms from `data` to `plan`.
"""

from typing import TYPE_CHECKING

from autoaccum.doors import lazily

if TYPE_CHECKING:
    from autoaccum.probe import cache, refusals, search, variation
    from autoaccum.probe.cache import ReadingCache
    from autoaccum.probe.child import Child, die_with_parent, own_program
    from autoaccum.probe.equivalence import compare_values
    from autoaccum.probe.evaluation import Evaluation, in_eval_mode
    from autoaccum.probe.process_copy import hold_pages_of
    from autoaccum.probe.readings import COMPARED_SAMPLES, Conditions, Equivalence, Limits, Outcome, Progress, Reading, Rehearser, Subject, Trying
    from autoaccum.probe.rehearsal import rehearsing
    from autoaccum.probe.request import Objective, Request
else:
    __getattr__ = lazily(
        __name__,
        cache="ReadingCache",
        child="Child die_with_parent own_program",
        equivalence="compare_values",
        evaluation="Evaluation in_eval_mode",
        process_copy="hold_pages_of",
        readings="COMPARED_SAMPLES Conditions Equivalence Limits Outcome Progress Reading Rehearser Subject Trying",
        rehearsal="rehearsing",
        request="Objective Request",
    )
