"""Memory that is not the same from window to window: it grows (outputs that are kept in a list, caches), or it is spread (a loss that draws sizes at random)."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

import torch

from autoaccum.units import KIB, MIB, in_words
from autoaccum.window import Job

MORE_WINDOWS = 6  # whose draws are seen too, once a spread shows
PAGES_BYTES = 256 * KIB  # by which the figures of a whole process vary
_SHARE, _NOISE_BYTES = 0.1, 16 * MIB
_UNEVEN = 4


def slope_bytes(held: Sequence[int], *, shared_with_host: bool) -> int:
    """The bytes that a window adds on average, by the memory held after each of several equal windows; 0 if they do not all add about as much.

    shared_with_host: True if the measured memory is that of the whole process, whose figures vary by some pages.
    """
    steps = [after - before for before, after in pairwise(held)]
    if min(steps, default=0) <= (MIB if shared_with_host else 64 * KIB):
        return 0
    if shared_with_host and max(steps) > _UNEVEN * min(steps):  # a library that allocates for itself, and not a list that grows
        return 0
    return sum(steps) // len(steps)  # resident pages that were free already hide a part of single windows


def growth_remark(held: Sequence[int], left_bytes: int, *, shared_with_host: bool) -> tuple[str, ...]:
    """A warning if memory grows, with the number of windows after which it runs out. left_bytes: of the budget, at the peak."""
    slope = slope_bytes(held, shared_with_host=shared_with_host)
    if not slope:
        return ()
    when = f"about {max(left_bytes // slope, 0)} windows later" if left_bytes > 0 else "at once"
    return (
        f"memory grows by {in_words(slope)} with every window, so training runs out {when}: something keeps tensors of earlier windows (outputs or losses in a "
        "list, a cache); keep numbers (loss.item()) or detached copies on the host",
    )


def is_spread(taken: Sequence[int]) -> bool:
    """True if micro-batches of one size took unlike memory, by more than noise. taken: bytes of each, above what was held before it."""
    return len(taken) > 1 and max(taken) - min(taken) > max(_SHARE * max(taken), _NOISE_BYTES)


def host_draws(job: Job, kind: str) -> tuple[object, ...]:
    """What changes if random numbers are drawn on the host, with which sizes are drawn. kind: of the device.

    Generators of the job's own count if they are in `keep`, or if its loss holds them (a closure). Dropout draws on the model's own device; on a CPU its draws are left out.
    """
    numpy = sys.modules.get("numpy")
    drawn: tuple[object, ...] = (random.getstate(),)
    if numpy is not None:
        state: Any = numpy.random.get_state()
        drawn += (state[1].tobytes(), state[2])
    if kind != "cpu" or not any("Dropout" in type(module).__name__ or getattr(module, "dropout", 0) for module in job.model.modules()):
        drawn += (torch.get_rng_state().numpy().tobytes(),)
    held = []
    for cell in getattr(job.loss, "__closure__", None) or ():
        with suppress(ValueError):  # an empty cell
            held.append(cell.cell_contents)
    for item in (*job.keep, *held, *getattr(job.loss, "__globals__", {}).values()):
        if isinstance(item, torch.Generator):
            drawn += (item.get_state().numpy().tobytes(),)
        elif isinstance(item, random.Random):
            drawn += (item.getstate(),)
        elif hasattr(item, "bit_generator"):
            drawn += (repr(item.bit_generator.state),)
    return drawn


def spread_remark(taken: Sequence[int], micro_batch: int, windows: int) -> tuple[str, ...]:
    """A warning with the least and the most. windows: how many were run."""
    if not is_spread(taken):
        return ()
    return (
        f"micro-batches of {micro_batch} took between {in_words(min(taken))} and {in_words(max(taken))}: the loss or the model draws sizes at random (scales, "
        f"crops, layers that are left out). The largest of {windows} windows was planned; a larger draw may still come: leave headroom, or give the largest size",
    )
