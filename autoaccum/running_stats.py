"""BatchNorm's running statistics, as if a window were one update and not one per micro-batch.

A layer moves its running mean and variance by `momentum` at every forward, so k micro-batches move them k
times. With momentum `1 - (1 - m) ** (n / N)` at a micro-batch of n of the window's N samples, the old values
keep exactly the weight `1 - m` over the window. What normalises the samples is still each micro-batch's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.modules.batchnorm import _BatchNorm


def batch_norms(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The BatchNorm layers that take statistics of the batch in hand, by name."""
    return {name: module for name, module in model.named_modules() if _is_batch_norm(module) and module.training}


class RunningStats:
    """Corrects the layers of one model. `share` is given before each micro-batch's forward."""

    def __init__(self, model: torch.nn.Module) -> None:
        # Without a momentum a layer averages over all it ever saw, each micro-batch alike.
        self._momenta = [
            (each, momentum) for each in model.modules() if _is_batch_norm(each) and isinstance(momentum := getattr(each, "momentum", None), float)
        ]

    def share(self, of_window: float) -> None:
        """The next micro-batch is this part of its window, 0 to 1."""
        for module, momentum in self._momenta:
            module.momentum = 1 - (1 - momentum) ** of_window

    @contextmanager
    def corrected(self) -> Iterator[RunningStats]:
        """Afterwards every layer has its own momentum again."""
        try:
            yield self
        finally:
            for module, momentum in self._momenta:
                module.momentum = momentum  # type: ignore[assignment]


def _is_batch_norm(module: torch.nn.Module) -> bool:
    # A scripted module keeps its class in `original_name` alone.
    return isinstance(module, _BatchNorm) or str(getattr(module, "original_name", "")).startswith(("BatchNorm", "SyncBatchNorm"))
