"""`MicroBatch`: one micro-batch of a window with its weight, for a hand-written training loop."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class MicroBatch:
    """A part of a batch.

    weight: the factor for the mean loss of this micro-batch. samples: number of its samples.
    last: True for the last micro-batch of the window.
    """

    batch: Any
    weight: float
    samples: int
    last: bool

    def sync(self, model: torch.nn.Module) -> AbstractContextManager[object]:
        """Context for forward and backward of a model in DistributedDataParallel or `fully_shard`.

        Gradients are reduced across ranks in the last micro-batch of the window only. Changes nothing for a model
        without such a wrapper. Raises `UsageError` for wrappers that cannot be exact.
        """
        from autoaccum.distributed import engines

        return engines.for_hand(model, last=self.last)
