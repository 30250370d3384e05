"""The devices: how much memory each has and who holds it, behind one Protocol (`Device`) with a file for each kind.

It exports `get`, `here`, `list`, the records of memory and budgets, and what the CPU's allocator is set to.
It imports the doorstep, `data` and `simulate`; a driver or torch is imported only when a device is asked for.
"""

from typing import TYPE_CHECKING

from autoaccum.doors import lazily

if TYPE_CHECKING:
    from autoaccum.devices.budget import ASSUMED_OUTSIDE, LEAST_GPU_HEADROOM, Budget, budget_terms, drift, make_budget, part_of_rank, within_part
    from autoaccum.devices.calibration import calibrate
    from autoaccum.devices.cpu import Cpu, fill_thread_pools, kept_data_limit
    from autoaccum.devices.malloc import LINUX, STEADY_MALLOC, malloc_for_training, steady_malloc, steady_wanted
    from autoaccum.devices.memory import Facts, Memory
    from autoaccum.devices.nvml import driver_version
    from autoaccum.devices.protocol import Device, Watch
    from autoaccum.devices.table import accelerator_driver, get, here, list
else:
    __getattr__ = lazily(
        __name__,
        budget="ASSUMED_OUTSIDE LEAST_GPU_HEADROOM Budget budget_terms drift make_budget part_of_rank within_part",
        calibration="calibrate",
        cpu="Cpu fill_thread_pools kept_data_limit",
        malloc="LINUX STEADY_MALLOC malloc_for_training steady_malloc steady_wanted",
        memory="Facts Memory",
        nvml="driver_version",
        protocol="Device Watch",
        table="accelerator_driver get here list",
    )
