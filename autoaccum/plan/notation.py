"""Micro-batches in short: `"40 x 5 + 39 x 8"`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TypeVar

Item = TypeVar("Item")


def runs(items: Sequence[Item]) -> list[tuple[Item, int]]:
    """Equal neighbours once, with how many there are: `[5, 5, 4]` is `[(5, 2), (4, 1)]`."""
    return [(item, len(list(equal))) for item, equal in groupby(items)]


def window_notation(sizes: Sequence[int]) -> str:
    """`"40 x 5 + 39 x 8"`: micro-batch x steps."""
    return " + ".join(f"{size} x {sizes.count(size)}" for size in sorted(set(sizes), reverse=True))
