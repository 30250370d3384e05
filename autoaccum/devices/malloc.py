"""The C allocator on a CPU, made to give freed memory back at once, so that peaks repeat."""

from __future__ import annotations

import ctypes
import os
import platform
import sys

from autoaccum.units import KIB

LINUX = sys.platform.startswith("linux")

# glibc keeps freed memory in arenas, which makes peaks depend on what ran before. With these two settings
# every tensor of 64 KiB and more is mapped and unmapped on its own. Seen on a small GPT under 600 MiB:
# defaults 100 to 109 samples, fewer after other trials; steady 164, 164, 164.
# https://www.gnu.org/software/libc/manual/html_node/Malloc-Tunable-Parameters.html
STEADY_MALLOC = {"MALLOC_MMAP_THRESHOLD_": 64 * KIB, "MALLOC_TRIM_THRESHOLD_": 64 * KIB}

_MALLOPT = {"MALLOC_TRIM_THRESHOLD_": -1, "MALLOC_MMAP_THRESHOLD_": -3}  # M_... of malloc.h


def steady_wanted() -> bool:
    """True where the C allocator is glibc's and `AUTOACCUM_MALLOC=default` does not turn it off."""
    return os.environ.get("AUTOACCUM_MALLOC") != "default" and LINUX and platform.libc_ver()[0] == "glibc"


def steady_malloc() -> bool:
    """Makes the C allocator give freed memory back at once; the one switch for trials and training alike.

    True if it is in force; it stays so for the life of the process. `AUTOACCUM_MALLOC=default` turns it off;
    only glibc has it.
    """
    if not steady_wanted():
        return False
    libc = ctypes.CDLL(None)
    done = [libc.mallopt(_MALLOPT[name], value) for name, value in STEADY_MALLOC.items()]
    libc.malloc_trim(0)
    return all(done)
