"""From a job to its plan: trials, search and plan are put together here, on one device and on all ranks.

It exports the three doors: `tune` for objects at hand, `tune_source` for a job that a file builds, `tune_command` for a command.
It imports the doorstep and the rooms from `data` to `probe`.
"""

from typing import TYPE_CHECKING

from autoaccum.doors import lazily

if TYPE_CHECKING:
    from autoaccum.tuner import changes
    from autoaccum.tuner.all_ranks import shared_limits
    from autoaccum.tuner.assembly import versions
    from autoaccum.tuner.changes import ChangedPlan, WhatIf, in_four_bits, repeated_blocks
    from autoaccum.tuner.foreign_command import check_command, tune_command
    from autoaccum.tuner.in_place import refuse_unknown_keywords, tune
    from autoaccum.tuner.job_file import check_source, compare_source, tune_changed, tune_source
    from autoaccum.tuner.one_device import device_key
    from autoaccum.tuner.progress import shown, stages
else:
    __getattr__ = lazily(
        __name__,
        all_ranks="shared_limits",
        assembly="versions",
        changes="ChangedPlan WhatIf in_four_bits repeated_blocks",
        foreign_command="check_command tune_command",
        in_place="refuse_unknown_keywords tune",
        job_file="check_source compare_source tune_changed tune_source",
        one_device="device_key",
        progress="shown stages",
    )
