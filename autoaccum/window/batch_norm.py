"""BatchNorm's running statistics, as if a window were one update and not one per micro-batch.

A layer moves its running mean and variance by `momentum` m at every forward, so k micro-batches move them k times.
Here momentum is 1 inside a window, so that each forward leaves its own micro-batch's statistics behind; these are
averaged by their shares of the window's samples, and the old values moved towards the average once, by m. The
running mean is then that of the whole batch; the variance leaves out how the means of micro-batches differ. What
normalises the samples is each micro-batch's own, still. One momentum for all micro-batches also keeps a compiled
model from being compiled for each. Of a layer that runs more than once in a forward, the last run counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from autoaccum.errors import JobError


def batch_norms(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The BatchNorm layers that take statistics of the batch in hand, by name."""
    return {name: module for name, module in model.named_modules() if _is_batch_norm(module) and module.training}


class RunningStats:
    """Corrects the layers of one model. `share` is given before each micro-batch's forward."""

    def __init__(self, model: torch.nn.Module) -> None:
        for name, module in model.named_modules():
            if _is_batch_norm(module) and not isinstance(module, _BatchNorm):
                raise JobError(f"BatchNorm layer {name!r} is scripted, and its momentum fixed: correct_running_stats works on layers as they were written")
        self._layers = [each for each in model.modules() if isinstance(each, _BatchNorm) and each.track_running_stats]
        self._moving: list[_Moving] = []
        self._share: float | None = None  # of the micro-batch that ran last

    def share(self, of_window: float) -> None:
        """The next micro-batch is this part of its window, 0 to 1."""
        self._gather()
        self._share = of_window

    @contextmanager
    def corrected(self) -> Iterator[RunningStats]:
        """One window is inside; afterwards every layer has its own momentum again, and has counted one batch more."""
        self._moving = [_Moving(layer) for layer in self._layers if layer.training and layer.running_mean is not None]
        self._share = None
        try:
            yield self
            self._gather()
        except BaseException:
            for each in self._moving:
                each.undo()
            raise
        for each in self._moving:
            each.settle()

    def _gather(self) -> None:
        if self._share is not None:
            for each in self._moving:
                each.gather(self._share)


class _Moving:
    """One layer inside a window."""

    def __init__(self, layer: Any) -> None:
        self._layer, self._momentum = layer, layer.momentum
        self._tensors = [layer.running_mean, layer.running_var]
        self._before = [each.clone() for each in self._tensors]
        self._average = [torch.zeros_like(each) for each in self._tensors]
        self._count = None if layer.num_batches_tracked is None else layer.num_batches_tracked.clone()
        layer.momentum = 1.0

    def gather(self, share: float) -> None:
        for average, now in zip(self._average, self._tensors):
            average.add_(now, alpha=share)

    def settle(self) -> None:
        momentum = self._momentum
        if momentum is None:  # a layer without one averages over all batches it ever saw
            momentum = 1.0 if self._count is None else 1 / (1 + float(self._count))
        for now, before, average in zip(self._tensors, self._before, self._average):
            now.copy_(before.lerp_(average, momentum))
        self._layer.momentum = self._momentum
        if self._count is not None:
            self._layer.num_batches_tracked.copy_(self._count + 1)

    def undo(self) -> None:
        self._layer.momentum = self._momentum
        for now, before in zip(self._tensors, self._before):
            now.copy_(before)
        if self._count is not None:
            self._layer.num_batches_tracked.copy_(self._count)


def _is_batch_norm(module: torch.nn.Module) -> bool:
    # A scripted module keeps its class in `original_name` alone.
    return isinstance(module, _BatchNorm) or str(getattr(module, "original_name", "")).startswith(("BatchNorm", "SyncBatchNorm"))
