"""The phases of a window, and the callback that is called at the start of each."""

from __future__ import annotations

from collections.abc import Callable

# Called with the phase that begins ("batch", "forward", "backward", "sync", "clip", "step") and the index of the micro-batch.
PhaseCallback = Callable[[str, int], None]


def silent(phase: str, index: int) -> None:
    """A `PhaseCallback` that does nothing."""
