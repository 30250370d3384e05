"""Plans for tests that are not about how plans come about."""

import math
from dataclasses import replace

from autoaccum.plan import arithmetic, record
from autoaccum.window.job import as_jobs, fingerprint
from tests.plan.test_plan import T4

CPU = record.PlannedDevice("cpu", "cpu", None, 2**34, 2**34)


def by_hand(jobs, target, micro_batch):
    """A plan for `target` samples in micro-batches of at most `micro_batch`, as if it had been measured on this CPU."""
    sizes = arithmetic.micro_batches(target, math.ceil(target / micro_batch))
    return replace(
        T4,
        target_batch=target,
        micro_batch=sizes[0],
        accumulation_steps=len(sizes),
        micro_batches=sizes,
        share=target,
        shares=(target,),
        device=CPU,
        job_fingerprint=fingerprint(as_jobs(jobs)) if jobs is not None else "",
    )
