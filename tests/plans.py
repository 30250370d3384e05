"""Plans for tests that are not about how plans come about."""

import math
from dataclasses import replace

from autoaccum import plan
from autoaccum.job import fingerprint, in_turn
from tests.test_plan import T4

CPU = plan.PlannedDevice("cpu", "cpu", None, 2**34, 2**34)


def by_hand(jobs, target, micro_batch):
    """A plan for `target` samples in micro-batches of at most `micro_batch`, as if it had been measured on this CPU."""
    sizes = plan.micro_batches(target, math.ceil(target / micro_batch))
    return replace(
        T4,
        target_batch=target,
        micro_batch=sizes[0],
        accumulation_steps=len(sizes),
        micro_batches=sizes,
        share=target,
        shares=(target,),
        device=CPU,
        job_fingerprint=fingerprint(in_turn(jobs)) if jobs is not None else "",
    )
