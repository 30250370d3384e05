"""Memory that grows from window to window: outputs or losses that are kept in a list, caches."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from autoaccum.units import KIB, MIB, in_words


def slope_bytes(held: Sequence[int], *, shared_with_host: bool) -> int:
    """The bytes that a window adds on average, by the memory held after each of several equal windows; 0 if not every one adds some.

    shared_with_host: True if the measured memory is that of the whole process, whose figures vary by some pages.
    """
    steps = [after - before for before, after in pairwise(held)]
    if min(steps, default=0) <= (MIB if shared_with_host else 64 * KIB):
        return 0
    return sum(steps) // len(steps)  # resident pages that were free already hide a part of single windows


def remark(held: Sequence[int], left_bytes: int, *, shared_with_host: bool) -> tuple[str, ...]:
    """A warning if memory grows, with the number of windows after which it runs out. left_bytes: of the budget, at the peak."""
    slope = slope_bytes(held, shared_with_host=shared_with_host)
    if not slope:
        return ()
    when = f"about {max(left_bytes // slope, 0)} windows later" if left_bytes > 0 else "at once"
    return (
        f"memory grows by {in_words(slope)} with every window, so training runs out {when}: something keeps tensors of earlier windows (outputs or losses in a "
        "list, a cache); keep numbers (loss.item()) or detached copies on the host",
    )
