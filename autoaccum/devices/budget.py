"""The memory budget of a window: the highest peak that is allowed, and the terms it is computed from."""

from __future__ import annotations

from dataclasses import dataclass, replace

from autoaccum.devices.memory import FRACTION, HOST, RLIMIT, Memory
from autoaccum.devices.protocol import Device
from autoaccum.units import MIB, in_words, parse_headroom


@dataclass(frozen=True)
class Budget:
    """The highest peak that a window may reach, and the terms it is computed from. All sizes are bytes.

    cap_bytes: the limit that the user gave; None without one.
    bucket_bytes: kept free for the gradient buckets that DistributedDataParallel allocates later.
    """

    budget_bytes: int
    headroom_bytes: int
    memory: Memory
    cap_bytes: int | None
    bucket_bytes: int = 0


SHARED = "shared by ranks"  # as a binding limit: other ranks of the job use parts of the free memory of this device

# The name of what is not explained otherwise, by binding limit.
_REST = {SHARED: "in use or other ranks'", FRACTION: "in use or beyond the memory fraction", HOST: "in use on the host"}

LEAST_GPU_HEADROOM = 256 * MIB
LEAST_CPU_HEADROOM = 4 * MIB  # the peaks of two processes that do the same differ by up to this much

# Used only if a cap is given and the size of the context is unknown. It is about the size of a CUDA context
# with cuBLAS and cuDNN loaded on recent cards.
ASSUMED_OUTSIDE = 512 * MIB


def part_of_rank(device: Device, ranks: int) -> int | None:
    """What this rank may hold, in bytes, of a device that `ranks` of the job share: its part of what is free now, with what it holds itself.

    None for a device of its own, and under a limit that is of this process alone.
    """
    memory = device.memory(who=False) if ranks > 1 else None
    return None if memory is None or memory.binding_limit == RLIMIT else memory.ours_bytes + memory.free_bytes // ranks


def within_part(memory: Memory, part_bytes: int | None) -> Memory:
    """A reading of the memory as a rank sees it that may hold `part_bytes` (`part_of_rank`)."""
    if part_bytes is None:
        return memory
    return replace(memory, free_bytes=max(min(memory.free_bytes, part_bytes - memory.ours_bytes), 0), others=(), binding_limit=SHARED)


def make_budget(memory: Memory, *, kind: str, limit_bytes: int | None = None, headroom: str | int = "3%", floor_bytes: int = 0) -> Budget:
    """The budget `min(cap - outside, ours + free) - headroom`, in the unit of the peak (see `Watch.peak_bytes`).

    kind: the kind of the device. limit_bytes: the cap.
    headroom: a size, or a percentage of what training can add. On a GPU a percentage keeps at least 256 MiB, on a CPU 4 MiB.
    floor_bytes: what the process held before training: on a CPU the interpreter, the libraries, the model and the data.
    The result is zero or negative if nothing is left; the caller reports that. Raises `UsageError` if the headroom cannot
    be parsed.
    """
    available = memory.ours_bytes + memory.free_bytes
    if limit_bytes is not None:
        outside = ASSUMED_OUTSIDE if memory.outside_bytes is None else memory.outside_bytes
        available = min(available, limit_bytes - outside)
    headroom_bytes = parse_headroom(headroom, max(available - floor_bytes, 0))
    if "%" in str(headroom):
        headroom_bytes = max(headroom_bytes, LEAST_CPU_HEADROOM if kind == "cpu" else LEAST_GPU_HEADROOM)
    return Budget(available - headroom_bytes, headroom_bytes, memory, limit_bytes)


def budget_terms(budget: Budget) -> tuple[tuple[int, str], ...]:
    """The terms of the budget, each with its name: the budget is the first term minus all others. An unexplained rest is "in use"."""
    memory = budget.memory
    buckets = ((budget.bucket_bytes, "gradient buckets"),) if budget.bucket_bytes else ()
    headroom = (budget.headroom_bytes, "headroom")
    outside = memory.outside_bytes if memory.outside_bytes is not None else ASSUMED_OUTSIDE if budget.cap_bytes is not None else 0
    context = ((outside, "context"),) if outside else ()
    available = budget.budget_bytes + budget.headroom_bytes + budget.bucket_bytes
    if budget.cap_bytes is not None and available == budget.cap_bytes - outside:
        return ((budget.cap_bytes, "limit"), *context, *buckets, headroom)
    others = tuple((process.bytes, f"{process.name} {process.pid}") for process in memory.others if process.bytes)
    unexplained = memory.total_bytes - available - sum(bytes_ for bytes_, _ in (*others, *context))
    if unexplained < 0:  # resident pages that several processes share are counted in each of them
        others, unexplained = (), memory.total_bytes - available - sum(bytes_ for bytes_, _ in context)
    first_term = "cgroup limit" if memory.binding_limit.startswith("cgroup") else "total"
    return (
        (memory.total_bytes, first_term),
        *others,
        *context,
        *(((unexplained, _REST.get(memory.binding_limit, "in use")),) if unexplained > 0 else ()),
        *buckets,
        headroom,
    )


def drift(before: Budget, after: Budget, peak_bytes: int | None = None) -> tuple[str, ...]:
    """A warning if the budget shrank by more than the headroom between `before` and `after`: other processes took the memory.

    peak_bytes: of the plan, if it is known. A loss that is small beside what is spare is not worth a warning.
    """
    lost_bytes = before.budget_bytes - after.budget_bytes
    spare_bytes = 0 if peak_bytes is None else after.budget_bytes - peak_bytes
    if lost_bytes <= after.headroom_bytes or lost_bytes * 10 < spare_bytes:
        return ()
    bytes_before = {process.pid: process.bytes or 0 for process in before.memory.others}
    growth = sorted(((process.bytes or 0) - bytes_before.get(process.pid, 0), process.name, process.pid) for process in after.memory.others)
    who = f", {growth[-1][1]} (process {growth[-1][2]}) took {in_words(growth[-1][0])}" if growth and growth[-1][0] > 0 else ""
    return (f"{in_words(lost_bytes)} of memory went to others while measuring{who}: leave more headroom, or tune again",)
