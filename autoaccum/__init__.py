"""You name the effective batch; autoaccum finds how much of it fits and accumulates the rest, exactly."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from autoaccum.errors import (
    AutoaccumError,
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
    from autoaccum.comparing import equivalence
    from autoaccum.devices.base import Memory
    from autoaccum.devices.virtual import VirtualGpu
    from autoaccum.estimating import estimate
    from autoaccum.forecasting import fleet
    from autoaccum.job import Job
    from autoaccum.lengths import worst_case
    from autoaccum.loop import Accumulator, StepResult
    from autoaccum.losses import token_mean
    from autoaccum.plan import MicroBatch, Plan
    from autoaccum.rates import scale_lr
    from autoaccum.reading import Reading
    from autoaccum.regrouping import Window
    from autoaccum.tuning import tune

# Imported when they are first asked for: `import autoaccum` loads no torch and touches no device.
_WHERE = {
    "tune": "tuning",
    "Job": "job",
    "Plan": "plan",
    "MicroBatch": "plan",
    "Reading": "reading",
    "Accumulator": "loop",
    "StepResult": "loop",
    "Window": "regrouping",
    "equivalence": "comparing",
    "token_mean": "losses",
    "scale_lr": "rates",
    "Memory": "devices.base",
    "VirtualGpu": "devices.virtual",
    "estimate": "estimating",
    "fleet": "forecasting",
    "worst_case": "lengths",
}

__all__ = [
    "Accumulator",
    "AutoaccumError",
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
    if name in _WHERE:
        return getattr(import_module(f"autoaccum.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'autoaccum' has no attribute {name!r}")
