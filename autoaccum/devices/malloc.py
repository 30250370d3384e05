"""Settings of the C allocator with which it returns freed memory to the system at once, so that peaks on a CPU are repeatable."""

from __future__ import annotations

import ctypes
import os
import platform
import sys

from autoaccum.units import KIB

LINUX = sys.platform.startswith("linux")

# glibc keeps freed memory in arenas, so peaks depend on earlier allocations. With these two settings every tensor
# of 64 KiB or more has its own mapping. Largest micro-batch of a small GPT under 600 MiB: 100 to 109 samples with
# the defaults (fewer after other trials); 164, 164, 164 with these settings.
# https://www.gnu.org/software/libc/manual/html_node/Malloc-Tunable-Parameters.html
STEADY_MALLOC = {"MALLOC_MMAP_THRESHOLD_": 64 * KIB, "MALLOC_TRIM_THRESHOLD_": 64 * KIB}

_MALLOPT = {"MALLOC_TRIM_THRESHOLD_": -1, "MALLOC_MMAP_THRESHOLD_": -3}  # M_... of malloc.h


def steady_wanted() -> bool:
    """True if the C allocator is glibc's and `AUTOACCUM_MALLOC=default` is not set."""
    return os.environ.get("AUTOACCUM_MALLOC") != "default" and LINUX and platform.libc_ver()[0] == "glibc"


def steady_malloc() -> bool:
    """Makes the C allocator return freed memory to the system at once. Trials and training both call this function.

    Returns True if the settings are active. They stay active until the process ends. They need glibc, and
    `AUTOACCUM_MALLOC=default` turns them off.
    """
    if not steady_wanted():
        return False
    libc = ctypes.CDLL(None)
    done = [libc.mallopt(_MALLOPT[name], value) for name, value in STEADY_MALLOC.items()]
    libc.malloc_trim(0)
    return all(done)
