"""One piece of a window, with its weight, for a loop by hand."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class MicroBatch:
    """A piece of a batch. `weight` is what its mean loss is multiplied with; `last` is True for the window's last."""

    batch: Any
    weight: float
    samples: int
    last: bool

    def sync(self, model: torch.nn.Module) -> AbstractContextManager[object]:
        """Around forward and backward of a model in DistributedDataParallel or `fully_shard`: gradients cross in the window's last micro-batch.

        Changes nothing for a model that knows no ranks. Raises `UsageError` for wrappers that cannot be exact.
        """
        from autoaccum.distributed import engines

        return engines.for_hand(model, last=self.last)
