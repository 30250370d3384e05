"""What the losses of a window's unlike micro-batches show: a loss that is no mean over samples, or a mean over nothing."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

from autoaccum.errors import AutoaccumWarning
from autoaccum.window import WindowResult


def seem_no_mean(result: WindowResult, sizes: Sequence[int]) -> bool:
    """True if the losses of micro-batches of so many samples grow with their size, as sums over samples do and means do not; of pairs, if the sum is none, or
    the count no count."""
    if pairs := result.total.pairs:
        counts = [float(count) for _, count in pairs]
        if len(pairs) != len(sizes) or not all(counts):
            return False
        means = [float(value) / count for (value, _), count in zip(pairs, counts)]
        return _grow([count / size for count, size in zip(counts, sizes)], sizes, down=True) or _grow(means, sizes, down=True)
    terms = result.total.terms
    if result.counted is not None or result.by_term or len(terms) != len(sizes):
        return False
    return _grow([float(term.sum()) * result.samples / size for term, size in zip(terms, sizes)], sizes)


def _grow(values: Sequence[float], sizes: Sequence[int], *, down: bool = False) -> bool:
    """True if the values of micro-batches grow with their size, or with down become smaller, at least as its square root does."""
    most = max(sizes)
    large = [abs(value) for value, size in zip(values, sizes) if size == most]
    small = [(abs(value), size) for value, size in zip(values, sizes) if size * 3 <= most]
    if not small or not sum(large) or not sum(value for value, _ in small):
        return False
    times = (sum(large) / len(large)) / (sum(value for value, _ in small) / len(small))
    return bool((1 / times if down else times) > (most * len(small) / sum(size for _, size in small)) ** 0.5)


def warn_of_nothing(result: WindowResult, sizes: Sequence[int], loss: object) -> None:
    """Warns if the loss of a micro-batch is nan and that of another is not, as with a mean over labels of which a sample has none."""
    values = [float(term.sum()) for term in result.total.terms]
    if not any(map(math.isnan, values)) or not any(map(math.isfinite, values)) or len(values) != len(sizes):
        return
    size = next(size for size, value in zip(sizes, values) if math.isnan(value))
    cure = getattr(loss, "cure", "return the pair (loss_sum, count) from the loss, or give count=")
    warnings.warn(
        f"the loss of a micro-batch of {size} sample{'s' if size > 1 else ''} is nan, and that of others is not: if it is a mean over labels or weights, a "
        f"micro-batch without any is 0/0, and the model's weights are nan now; {cure}, and begin again",
        AutoaccumWarning,
        stacklevel=4,
    )
