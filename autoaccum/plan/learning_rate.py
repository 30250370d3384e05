"""`scale_lr`: the learning rate for another effective batch. autoaccum never applies it: the user decides."""

from __future__ import annotations

import math
from typing import Literal

from autoaccum.errors import UsageError


def scale_lr(lr: float, from_batch: int, to_batch: int, rule: Literal["linear", "sqrt"] = "linear") -> float:
    """Scales `lr` from an effective batch of `from_batch` samples to one of `to_batch` samples.

    rule: "linear" for SGD (Goyal et al. 2017, https://arxiv.org/abs/1706.02677), "sqrt" for Adam and similar optimizers
        (Malladi et al. 2022, https://arxiv.org/abs/2205.10287). Both hold within limits: they are starting points.
    Gradient accumulation does not change the learning rate: if the effective batch stays the same, there is nothing to scale.
    Raises `UsageError` for a batch below one, a learning rate that is not above zero, and an unknown rule.
    """
    for name, value in (("from_batch", from_batch), ("to_batch", to_batch)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UsageError(f"{name} must be a whole number of samples, at least 1, not {value!r}")
    if isinstance(lr, bool) or not isinstance(lr, (int, float)) or not lr > 0:
        raise UsageError(f"lr must be above 0, not {lr!r}")
    if rule not in ("linear", "sqrt"):
        raise UsageError(f'rule must be "linear" or "sqrt", not {rule!r}')
    ratio = to_batch / from_batch
    return lr * (ratio if rule == "linear" else math.sqrt(ratio))
