"""What an earlier run of the same job has learned on the same device."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from autoaccum.devices import Device
from autoaccum.probe import Conditions, ReadingCache
from autoaccum.tuner import device_key
from autoaccum.window import Job, fingerprint


def of(jobs: Sequence[Job], device: Device) -> ReadingCache:
    """The cache of readings.

    Samples are not known yet when a loop begins, so the key does not hold their shapes, and peaks are taken as they were, whatever this process
    held before: what no longer fits is rescued and learned again.
    """
    layers = hashlib.sha256("\n".join(repr(job.model) for job in jobs).encode()).hexdigest()[:16]
    conditions = Conditions({"learned": fingerprint(jobs), "layers": layers}, 0, 0)
    facts = device.facts
    return ReadingCache("in training", conditions, device_key(facts.name, facts.kind, device.memory(who=False).total_bytes, device.allocator))
