"""What a window may peak at, and what that is made of."""

from __future__ import annotations

from dataclasses import dataclass

from autoaccum.devices.memory import Memory
from autoaccum.units import MIB, in_words, parse_headroom


@dataclass(frozen=True)
class Budget:
    """What a window may peak at, and what that was made of; all bytes.

    cap_bytes is the limit that the user gave, None without one. bucket_bytes: kept free for what other ranks' engine will take.
    """

    budget_bytes: int
    headroom_bytes: int
    memory: Memory
    cap_bytes: int | None
    bucket_bytes: int = 0


SHARED = "shared by ranks"  # as a binding limit: of what is free, other ranks of the job have their parts

LEAST_GPU_HEADROOM = 256 * MIB

# Used only where a cap is given and nobody can tell what the context holds: about what a CUDA context
# with cuBLAS and cuDNN loaded takes on recent cards.
ASSUMED_OUTSIDE = 512 * MIB


def make_budget(memory: Memory, *, kind: str, limit_bytes: int | None = None, headroom: str | int = "3%") -> Budget:
    """`min(cap - outside, ours + free) - headroom`, in the terms of the peak.

    The headroom is a size or a percentage of what there is; on a GPU a percentage keeps at least 256 MiB.
    The result may be zero or less where nothing is left; the caller says so. Raises `UsageError` for a headroom
    that cannot be read.
    """
    there_is = memory.ours_bytes + memory.free_bytes
    if limit_bytes is not None:
        outside = ASSUMED_OUTSIDE if memory.outside_bytes is None else memory.outside_bytes
        there_is = min(there_is, limit_bytes - outside)
    kept = parse_headroom(headroom, max(there_is, 0))
    if kind != "cpu" and "%" in str(headroom):
        kept = max(kept, LEAST_GPU_HEADROOM)
    return Budget(there_is - kept, kept, memory, limit_bytes)


def budget_terms(budget: Budget) -> tuple[tuple[int, str], ...]:
    """What the budget was made of: the first term, less the rest. A remainder nobody explains is "in use"."""
    memory = budget.memory
    kept = ((budget.bucket_bytes, "gradient buckets"),) if budget.bucket_bytes else ()
    headroom = (budget.headroom_bytes, "headroom")
    outside = memory.outside_bytes if memory.outside_bytes is not None else ASSUMED_OUTSIDE if budget.cap_bytes is not None else 0
    context = ((outside, "context"),) if outside else ()
    whole = budget.budget_bytes + budget.headroom_bytes + budget.bucket_bytes
    if budget.cap_bytes is not None and whole == budget.cap_bytes - outside:
        return ((budget.cap_bytes, "limit"), *context, *kept, headroom)
    others = tuple((other.bytes, f"{other.name} {other.pid}") for other in memory.others if other.bytes)
    rest = memory.total_bytes - whole - sum(bytes_ for bytes_, _ in (*others, *context))
    if rest < 0:  # resident pages that processes share are counted with each
        others, rest = (), memory.total_bytes - whole - sum(bytes_ for bytes_, _ in context)
    word = "cgroup limit" if memory.binding_limit.startswith("cgroup") else "total"
    return (
        (memory.total_bytes, word),
        *others,
        *context,
        *(((rest, "in use or other ranks'" if memory.binding_limit == SHARED else "in use"),) if rest > 0 else ()),
        *kept,
        headroom,
    )


def drift(before: Budget, after: Budget) -> tuple[str, ...]:
    """Free memory that others took or gave while we measured, if it is more than the headroom."""
    taken = before.budget_bytes - after.budget_bytes
    if taken <= after.headroom_bytes:
        return ()
    known = {other.pid: other.bytes or 0 for other in before.memory.others}
    grown = sorted(((other.bytes or 0) - known.get(other.pid, 0), other.name, other.pid) for other in after.memory.others)
    who = f", {grown[-1][1]} (process {grown[-1][2]}) took {in_words(grown[-1][0])}" if grown and grown[-1][0] > 0 else ""
    return (f"{in_words(taken)} of memory went to others while measuring{who}: leave more headroom, or tune again",)
