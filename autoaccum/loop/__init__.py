"""Training with a plan: exactly one optimizer step per window, also after an out-of-memory.

It exports `Accumulator`, `StepResult`, and for the integrations `FirstWindows`, `Learner`, `Progress`, `Rescuer`, `attributes_kept`, `Contents`,
`own_attributes_kept`, `seem_no_mean`, `warn_of_nothing` and `fed`.
It imports the doorstep and the rooms from `data` to `tuner`.
"""

from typing import TYPE_CHECKING

from autoaccum.doors import lazily

if TYPE_CHECKING:
    from autoaccum.loop.accumulator import Accumulator
    from autoaccum.loop.feeder import fed
    from autoaccum.loop.first_windows import FirstWindows
    from autoaccum.loop.learner import Learner
    from autoaccum.loop.loss_values import seem_no_mean, warn_of_nothing
    from autoaccum.loop.module_attributes import Contents, attributes_kept, own_attributes_kept
    from autoaccum.loop.progress import Progress
    from autoaccum.loop.rescue import Rescuer
    from autoaccum.loop.step_result import StepResult
else:
    __getattr__ = lazily(
        __name__,
        accumulator="Accumulator",
        feeder="fed",
        first_windows="FirstWindows",
        learner="Learner",
        loss_values="seem_no_mean warn_of_nothing",
        module_attributes="Contents attributes_kept own_attributes_kept",
        progress="Progress",
        rescue="Rescuer",
        step_result="StepResult",
    )
