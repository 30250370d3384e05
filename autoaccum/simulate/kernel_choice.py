"""What of a card decides which kernels run, and when two cards run the same."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from autoaccum.simulate import attention, convolutions
from autoaccum.simulate.attention import AttentionCall


@dataclass(frozen=True)
class Card:
    """What of a card the rows of `kernels` need. capability: 75 for sm_75. cublas: whether handles have a workspace at all. What else differs between
    cards is put in when a tape is replayed."""

    capability: int
    cublas: bool = True
    benchmark: bool = False


def same_kernels(one: Card, other: Card, calls: Iterable[AttentionCall], *, convolves: bool) -> bool:
    """True where a job with these attention calls takes the same kernels on both cards. convolves: whether it has convolutions."""
    if replace(other, capability=one.capability) != one:
        return False
    if convolves and convolutions.generation(one.capability) != convolutions.generation(other.capability):
        return False
    return all(attention.alike(one.capability, other.capability, call) for call in calls)
