"""You name the effective batch; autoaccum finds how much of it fits and accumulates the rest, exactly.

The house, from the ground up. Each room imports only what stands above it, through its `__init__`:

    errors, units, oom   every failure; bytes in words; what counts as an out-of-memory; `files` reads and writes what users name
    data                 samples into micro-batches: cutting and joining batches, windows over a loader, samplers, lengths
    simulate             a GPU's memory without the GPU: trace, replay, timeline; the profiles of cards
    devices              one file for each kind of device, its memory and its budget; the table of devices
    distributed          several ranks: torchrun's environment, agreement, DDP and FSDP2, votes on a window, shares
    window               the job, and one window of it: weights, accumulation, optimizer step, state noted and put back
    plan                 the arithmetic of accumulation, the Plan, its words, pictures and formats
    probe                one trial (in place, in a copy, in a child), its reading, the search, cache, equivalence, refusals
    command              a script nobody edited: its words, one run of all its processes, what was seen of it
    tuner                from a job to its plan, on one device and on all ranks: what `tune` and the command line call
    loop                 training with a plan: the Accumulator, and the rescue after an out-of-memory
    virtual              jobs on cards that are not here: estimates, fleets, VirtualGpu
    integrations         Transformers, Lightning, Accelerate: one file each
    cli                  commands, options, reports, pictures, the demo

Above all rooms stand the programs: `__main__` (the command line), `worker` (what a child process runs), `capped_process` (which runs a
command) and `startup_hook` (which notes inside the command's processes what training did).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from autoaccum.errors import (
    AutoaccumError,
    AutoaccumWarning,
    DeviceError,
    JobError,
    JobFailed,
    MemoryUnknown,
    MissingExtra,
    NoSuchDevice,
    NothingFits,
    OutOfMemory,
    PlanError,
    ProfileError,
    RanksDisagree,
    UsageError,
)
from autoaccum.version import __version__

if TYPE_CHECKING:
    from autoaccum import devices
    from autoaccum.data.lengths import worst_case
    from autoaccum.data.windows import Window
    from autoaccum.devices.memory import Memory
    from autoaccum.loop.accumulator import Accumulator
    from autoaccum.loop.step_result import StepResult
    from autoaccum.plan.learning_rate import scale_lr
    from autoaccum.plan.micro_batch import MicroBatch
    from autoaccum.plan.plan import Plan
    from autoaccum.probe.equivalence import equivalence
    from autoaccum.probe.readings import Reading
    from autoaccum.tuner.in_place import tune
    from autoaccum.virtual.estimator import estimate
    from autoaccum.virtual.forecaster import fleet
    from autoaccum.virtual.gpu import VirtualGpu
    from autoaccum.window.job import Job
    from autoaccum.window.losses import contrastive, token_mean

# Imported when they are first asked for: `import autoaccum` loads no torch and touches no device.
_FILE_OF = {
    "Accumulator": "loop.accumulator",
    "Job": "window.job",
    "Memory": "devices.memory",
    "MicroBatch": "plan.micro_batch",
    "Plan": "plan.plan",
    "Reading": "probe.readings",
    "StepResult": "loop.step_result",
    "VirtualGpu": "virtual.gpu",
    "Window": "data.windows",
    "contrastive": "window.losses",
    "equivalence": "probe.equivalence",
    "estimate": "virtual.estimator",
    "fleet": "virtual.forecaster",
    "scale_lr": "plan.learning_rate",
    "token_mean": "window.losses",
    "tune": "tuner.in_place",
    "worst_case": "data.lengths",
}

__all__ = [
    "Accumulator",
    "AutoaccumError",
    "AutoaccumWarning",
    "DeviceError",
    "Job",
    "JobError",
    "JobFailed",
    "Memory",
    "MemoryUnknown",
    "MicroBatch",
    "MissingExtra",
    "NoSuchDevice",
    "NothingFits",
    "OutOfMemory",
    "Plan",
    "PlanError",
    "ProfileError",
    "RanksDisagree",
    "Reading",
    "StepResult",
    "UsageError",
    "VirtualGpu",
    "Window",
    "__version__",
    "contrastive",
    "devices",
    "equivalence",
    "estimate",
    "fleet",
    "scale_lr",
    "token_mean",
    "tune",
    "worst_case",
]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name == "devices":
        return import_module("autoaccum.devices")
    if name in _FILE_OF:
        return getattr(import_module(f"autoaccum.{_FILE_OF[name]}"), name)
    raise AttributeError(f"module 'autoaccum' has no attribute {name!r}")
