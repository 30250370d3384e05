"""Settings of the C allocator with which it returns freed memory to the system at once, so that peaks on a CPU are repeatable."""

from __future__ import annotations

import ctypes
import os
import platform
import sys

from autoaccum.units import KIB, MIB

LINUX = sys.platform.startswith("linux")

# glibc keeps freed memory in arenas, so peaks depend on earlier allocations. With these two settings every tensor
# of 64 KiB or more has its own mapping. Largest micro-batch of a small GPT under 600 MiB: 100 to 109 samples with
# the defaults (fewer after other trials); 164, 164, 164 with these settings.
# https://www.gnu.org/software/libc/manual/html_node/Malloc-Tunable-Parameters.html
STEADY_MALLOC = {"MALLOC_MMAP_THRESHOLD_": 64 * KIB, "MALLOC_TRIM_THRESHOLD_": 64 * KIB}

_MALLOPT = {"MALLOC_TRIM_THRESHOLD_": -1, "MALLOC_MMAP_THRESHOLD_": -3}  # M_... of malloc.h


_steady = False  # True once this process was made steady


def steady_wanted() -> bool:
    """True if the C allocator is glibc's and `AUTOACCUM_MALLOC=default` is not set."""
    return os.environ.get("AUTOACCUM_MALLOC") != "default" and LINUX and platform.libc_ver()[0] == "glibc"


def steady_malloc() -> bool:
    """Makes the C allocator return freed memory to the system at once. Trials and training both call this function.

    Returns True if the settings are active. They stay active until `malloc_for_training` changes them. They need glibc, and
    `AUTOACCUM_MALLOC=default` turns them off.
    """
    if not steady_wanted():
        return False
    global _steady
    libc, _steady = ctypes.CDLL(None), True
    done = [libc.mallopt(_MALLOPT[name], value) for name, value in STEADY_MALLOC.items()]
    libc.malloc_trim(0)
    return all(done)


def malloc_for_training(peak_bytes: int | None, budget_bytes: int) -> None:
    """Sets the C allocator for training with a plan of this peak and budget.

    Returning freed memory at once costs time: 87 ms instead of 46 a window of a small encoder. So it is done only where the plan needs it.
    Where twice the peak is within the budget, the C library is left as it was, or made as it is: glibc's own rule lets both thresholds grow
    to these sizes. (A budget of 0 is unknown.)
    """
    if peak_bytes is None or not budget_bytes or not steady_wanted() or any(name in os.environ for name in STEADY_MALLOC):
        return
    if 2 * peak_bytes > budget_bytes:
        steady_malloc()
    elif _steady:
        libc = ctypes.CDLL(None)
        libc.mallopt(_MALLOPT["MALLOC_MMAP_THRESHOLD_"], 32 * MIB)  # DEFAULT_MMAP_THRESHOLD_MAX of malloc.c
        libc.mallopt(_MALLOPT["MALLOC_TRIM_THRESHOLD_"], 64 * MIB)
