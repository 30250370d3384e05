"""The short notation of micro-batches: `"40 x 5 + 39 x 8"`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TypeVar

Item = TypeVar("Item")


def runs(items: Sequence[Item]) -> list[tuple[Item, int]]:
    """Groups equal neighbours and counts them: `[5, 5, 4]` becomes `[(5, 2), (4, 1)]`."""
    return [(item, len(list(equal))) for item, equal in groupby(items)]


def window_notation(sizes: Sequence[int]) -> str:
    """Micro-batch x steps, larger first: `"40 x 5 + 39 x 8"`."""
    return " + ".join(f"{size} x {sizes.count(size)}" for size in sorted(set(sizes), reverse=True))
