"""The phases of a window, and the callback that hears of each."""

from __future__ import annotations

from collections.abc import Callable

# Called with the phase that begins ("batch", "forward", "backward", "clip", "step") and the micro-batch's index.
PhaseCallback = Callable[[str, int], None]


def silent(phase: str, index: int) -> None:
    """A `PhaseCallback` for nobody."""
