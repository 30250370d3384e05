"""`contrastive`: a loss that compares every sample of a window with every other, computed exactly in micro-batches.

Its gradient goes through the embeddings. So the window runs twice: first without gradients, for all embeddings and the gradient of the
loss with respect to them; then one micro-batch after the other, whose embeddings get their part of that gradient. This method is known as
gradient caching: Gao et al., 2021, https://arxiv.org/abs/2101.06983.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from autoaccum.data import batches
from autoaccum.errors import JobError, UsageError
from autoaccum.window.batch_norm import batch_norms
from autoaccum.window.job import Job
from autoaccum.window.rng_state import RngState


def contrastive(encode: Callable[[Any, Any], Any], loss: Callable[..., Any]) -> Contrastive:
    """A loss for `tune`, `Job` and `Accumulator.step` whose samples see all others of their window, whatever the micro-batches.

    encode: `encode(model, batch)`: the embeddings of a batch, a tensor with a row for each sample, or a tuple of such tensors.
    loss: `loss(*embeddings)`: a scalar of the embeddings of the whole window. Parameters that it uses, such as a temperature, train too.
    Dropout draws the same in both passes. Not computed: a layer that looks at several samples (BatchNorm), and several ranks.
    """
    if not callable(encode) or not callable(loss):
        raise UsageError("contrastive(encode, loss) takes two functions: encode(model, batch), and loss(*embeddings)")
    return Contrastive(encode, loss)


class Contrastive:
    """What `contrastive` returns. Called like any loss, it computes the loss of one batch at once."""

    def __init__(self, encode: Callable[[Any, Any], Any], loss: Callable[..., Any]) -> None:
        self._encode, self._loss = encode, loss

    def __call__(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        return self._loss(*_as_tuple(self._encode(model, batch)))  # type: ignore[no-any-return]

    def of_window(self, job: Job, pieces: Iterable[tuple[Any, int]], samples: int, device: torch.device, crossing: Any) -> Callable[[Any, Any], torch.Tensor]:
        """The loss of each micro-batch of a window, in their order. A micro-batch is weighted by its samples afterwards.

        Raises `UsageError` on several ranks and beside `count`, and `JobError` for embeddings that are not a row for each sample.
        """
        if crossing is not None:
            raise UsageError("contrastive computes a window on one device: over ranks use a library that gathers embeddings, such as OpenCLIP")
        if job.count is not None:
            raise UsageError("contrastive weighs every micro-batch itself: leave count= out")
        states: list[RngState] = []
        embedded: list[tuple[torch.Tensor, ...]] = []
        sizes: list[int] = []
        norms = [(buffer, buffer.clone()) for norm in batch_norms(job.model).values() for buffer in norm.buffers()]
        with torch.no_grad():
            for batch, size in pieces:
                state = RngState(device)
                state.note()
                states.append(state)
                with _autocast(job, device):
                    embeddings = _as_tuple(self._encode(job.model, batches.copied(batches.move(batch, device, non_blocking=True))))
                for each in embeddings:
                    if not isinstance(each, torch.Tensor) or not each.dim() or len(each) != size:
                        shape = tuple(each.shape) if isinstance(each, torch.Tensor) else type(each).__name__
                        raise JobError(
                            f"encode(model, batch) returned {shape} for {size} samples: return a tensor with a row for each sample, or a tuple of them"
                        )
                embedded.append(tuple(each.detach() for each in embeddings))
                sizes.append(size)
            for buffer, before in norms:
                buffer.copy_(before)  # the second pass moves BatchNorm's statistics
        leaves = [torch.cat(field).requires_grad_() for field in zip(*embedded)]
        with torch.enable_grad(), _autocast(job, device):
            gradients = torch.autograd.grad(self._loss(*leaves), leaves, allow_unused=True)
        parts = [torch.zeros_like(leaf).split(sizes) if gradient is None else gradient.split(sizes) for leaf, gradient in zip(leaves, gradients)]
        index = iter(range(len(sizes)))

        def of_piece(model: torch.nn.Module, batch: Any) -> torch.Tensor:
            number = next(index)
            states[number].put_back()
            embeddings = _as_tuple(self._encode(model, batch))
            # Its gradient is the window's; its value is nought, and the first one has the loss, with the gradient of the loss's own parameters.
            value = sum((each.to(part[number].dtype) * part[number]).sum() for each, part in zip(embeddings, parts))
            value = value - value.detach()  # type: ignore[union-attr]
            if number == 0:
                value = value + self._loss(*(leaf.detach() for leaf in leaves))
            return torch.mul(value, samples / sizes[number])

        return of_piece


def _autocast(job: Job, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=job.autocast, enabled=job.autocast is not None)


def _as_tuple(embeddings: Any) -> tuple[Any, ...]:
    return tuple(embeddings) if isinstance(embeddings, (tuple, list)) else (embeddings,)
