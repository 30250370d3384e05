"""BatchNorm's running statistics, as if a window were one update and not one per micro-batch.

A layer moves its running mean and variance by `momentum` m at every forward, so k micro-batches move them k times.
Before micro-batch j, with the share s_j of the window's samples, momentum is set to `m s_j / (1 - m + m (s_1 + .. + s_j))`:
after the window the old values weigh 1 - m, and the micro-batches' m s_j each. Their mean is then the window's own; their
variance leaves out how the means of micro-batches differ. What normalises the samples is each micro-batch's own, still.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm


def batch_norms(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The BatchNorm layers that take statistics of the batch in hand, by name."""
    return {name: module for name, module in model.named_modules() if _is_batch_norm(module) and module.training}


class RunningStats:
    """Corrects the layers of one model. `share` is given before each micro-batch's forward."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._layers: list[Any] = [module for module in model.modules() if _is_batch_norm(module) and getattr(module, "track_running_stats", False)]

    def share(self, of_window: float) -> None:
        """The next micro-batch is this part of its window, 0 to 1."""
        self._seen += of_window
        for layer, momentum in self._moving:
            layer.momentum = momentum * of_window / (1 - momentum + momentum * self._seen)

    @contextmanager
    def corrected(self) -> Iterator[RunningStats]:
        """One window is inside; afterwards every layer has its own momentum again, and has counted one batch more."""
        layers = [layer for layer in self._layers if layer.training]
        before = [(layer, layer.momentum, layer.num_batches_tracked.clone()) for layer in layers]
        # Without a momentum a layer averages over all batches it ever saw.
        self._moving = [(layer, 1 / (1 + float(tracked)) if momentum is None else momentum) for layer, momentum, tracked in before]
        self._seen = 0.0
        try:
            yield self
            for layer, _, tracked in before:
                layer.num_batches_tracked.copy_(tracked + 1)
        finally:
            for layer, momentum, _ in before:
                layer.momentum = momentum


def _is_batch_norm(module: torch.nn.Module) -> bool:
    # A scripted module keeps its class in `original_name` alone.
    return isinstance(module, _BatchNorm) or str(getattr(module, "original_name", "")).startswith(("BatchNorm", "SyncBatchNorm"))
