"""The properties of a card that select the kernels, and the test if two cards run the same kernels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from autoaccum.simulate import attention, convolutions
from autoaccum.simulate.attention import AttentionCall


@dataclass(frozen=True)
class CardFacts:
    """What a job may ask about a card. multiprocessors, threads: of the card, and the resident threads of each."""

    name: str = "a simulated card"
    total_bytes: int = 0
    multiprocessors: int = 108
    threads: int = 2048


@dataclass(frozen=True)
class Card:
    """The properties of a card that the rows of `kernels` need. All other differences between cards enter when a tape is replayed.

    capability: the compute capability, 75 for sm_75. cublas: True if cuBLAS handles have a workspace.
    benchmark: True if cuDNN's benchmark mode is on. facts: what the job is told about the card. told: the card's name if the job asked for
    any of them, so that cards with other facts have tapes of their own.
    """

    capability: int
    cublas: bool = True
    benchmark: bool = False
    told: str = ""
    facts: CardFacts = field(default=CardFacts(), compare=False)


def same_kernels(first: Card, second: Card, calls: Iterable[AttentionCall], *, convolves: bool) -> bool:
    """True if a job with these attention calls runs the same kernels on both cards. convolves: True if the job has convolutions."""
    if replace(second, capability=first.capability) != first:
        return False
    if convolves and convolutions.generation(first.capability) != convolutions.generation(second.capability):
        return False
    return all(attention.alike(first.capability, second.capability, call) for call in calls)
