"""Jobs on cards that are not here: a phantom of the job is traced, and each card gets its estimate; a fleet of unlike cards gets its shares.

It exports `estimate_source`, `forecast`, `Simulation` and `VirtualGpu`.
It imports the doorstep and the rooms from `data` to `tuner`; `loop` and `virtual` do not know each other.
"""

from typing import TYPE_CHECKING

from autoaccum.doors import lazily

if TYPE_CHECKING:
    from autoaccum.virtual import estimator, forecaster, simulation
    from autoaccum.virtual.empty_weights import without_memory
    from autoaccum.virtual.estimate import Estimate, Estimates
    from autoaccum.virtual.estimator import estimate_source
    from autoaccum.virtual.gpu import VirtualGpu
else:
    __getattr__ = lazily(__name__, empty_weights="without_memory", estimate="Estimate Estimates", estimator="estimate_source", gpu="VirtualGpu")
