"""`RunningStats`: BatchNorm's running statistics, corrected so that a window is one update and not one per micro-batch.

A BatchNorm layer moves its running mean and variance by `momentum` m in every forward, so k micro-batches move them k times.
Inside a window, momentum is therefore 1: each forward leaves the statistics of its own micro-batch in the layer. These are
averaged, weighted by each micro-batch's share of the window's samples. At the end of the window, the old values move towards
the average once, by m. The running mean is then that of the whole batch. The running variance leaves out the variance between
the means of the micro-batches. Each micro-batch is still normalised with its own statistics. One momentum for all
micro-batches also means that a compiled model is not recompiled for each. If a layer runs more than once in a forward, the
last run counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from autoaccum.errors import JobError


def batch_norms(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The BatchNorm layers in training mode, which take statistics of the current batch, by name."""
    return {name: module for name, module in model.named_modules() if _is_batch_norm(module) and module.training}


class RunningStats:
    """Corrects the running statistics of one model's BatchNorm layers. Call `share` before each micro-batch's forward.

    Raises `JobError` for a scripted layer, whose momentum is fixed.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        for name, module in model.named_modules():
            if _is_batch_norm(module) and not isinstance(module, _BatchNorm):
                raise JobError(f"BatchNorm layer {name!r} is scripted, and its momentum fixed: correct_running_stats works on layers as they were written")
        self._layers = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
        self._moving: list[_Moving] = []
        self._share: float | None = None  # share of the micro-batch that ran last

    def share(self, of_window: float) -> None:
        """Starts the next micro-batch. of_window: its share of the window's samples, 0 to 1."""
        self._gather()
        self._share = of_window

    @contextmanager
    def corrected(self) -> Iterator[RunningStats]:
        """Context for one window. On exit, every layer has its own momentum again and has counted one batch more.

        After an exception, the running statistics are what they were before the window.
        """
        self._moving = [_Moving(layer) for layer in self._layers if layer.training and layer.running_mean is not None]
        self._share = None
        try:
            yield self
            self._gather()
        except BaseException:
            for moving in self._moving:
                moving.undo()
            raise
        for moving in self._moving:
            moving.settle()

    def _gather(self) -> None:
        if self._share is not None:
            for moving in self._moving:
                moving.gather(self._share)


class _Moving:
    """The running statistics of one layer during one window."""

    def __init__(self, layer: Any) -> None:
        self._layer, self._momentum = layer, layer.momentum
        self._tensors = [layer.running_mean, layer.running_var]
        self._before = [tensor.clone() for tensor in self._tensors]
        self._average = [torch.zeros_like(tensor) for tensor in self._tensors]
        self._count = None if layer.num_batches_tracked is None else layer.num_batches_tracked.clone()
        layer.momentum = 1.0

    def gather(self, share: float) -> None:
        for average, now in zip(self._average, self._tensors):
            average.add_(now, alpha=share)

    def settle(self) -> None:
        momentum = self._momentum
        if momentum is None:  # momentum=None: the layer averages over all batches so far
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
    # A scripted module has the name of its class only in `original_name`.
    return isinstance(module, _BatchNorm) or str(getattr(module, "original_name", "")).startswith(("BatchNorm", "SyncBatchNorm"))
