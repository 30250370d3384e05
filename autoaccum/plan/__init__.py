"""The arithmetic of accumulation, the `Plan`, and the plan in words, pictures and the arguments of frameworks.

It exports `Plan`, its records, and `arithmetic`.
It imports the doorstep and the rooms from `data` to `window`.
"""

from typing import TYPE_CHECKING

from autoaccum.doors import lazily

if TYPE_CHECKING:
    from autoaccum.plan import arithmetic, framework_arguments
    from autoaccum.plan.arithmetic import even_shares, micro_batches, window_led_by
    from autoaccum.plan.divisors import easier_targets, equal_split, why_unequal
    from autoaccum.plan.explanation import chart
    from autoaccum.plan.micro_batch import MicroBatch
    from autoaccum.plan.notation import window_notation
    from autoaccum.plan.plan import Plan
    from autoaccum.plan.record import PlannedDevice, TrialRecord
    from autoaccum.plan.search_picture import GREY, INK, check, pyplot
else:
    __getattr__ = lazily(
        __name__,
        arithmetic="even_shares micro_batches window_led_by",
        divisors="easier_targets equal_split why_unequal",
        explanation="chart",
        micro_batch="MicroBatch",
        notation="window_notation",
        plan="Plan",
        record="PlannedDevice TrialRecord",
        search_picture="GREY INK check pyplot",
    )
