"""Losses that are exact under gradient accumulation: `token_mean`, a loss per token, and `contrastive`.

A contrastive loss compares every sample of a window with every other, and its gradient goes through the embeddings. So the window runs
twice: first without gradients, for all embeddings and the gradient of the loss with respect to them; then one micro-batch after the other,
whose embeddings get their part of that gradient. This method is known as gradient caching: Gao et al., 2021, https://arxiv.org/abs/2101.06983.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from autoaccum.data import IGNORED, batches
from autoaccum.errors import AutoaccumWarning, JobError, UsageError
from autoaccum.window.batch_norm import batch_norms
from autoaccum.window.job import Job
from autoaccum.window.rng_state import RngState


def token_mean(model: torch.nn.Module, batch: Mapping[str, Any], *, shifted: bool | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """A `loss(model, batch)` for models that take `**batch` and return a `.loss`: the mean over the labels other than -100.

    Returns (sum over those labels, number of those labels). The sum is normalised over the whole window, because the mean of
    the micro-batches' means is a different number if the micro-batches have different numbers of labels.
    shifted: True if the model leaves out each sequence's first label, as models that predict the next token do. None decides by
        the model's class: Transformers' causal language models do, encoder-decoders and masked language models do not.
        For other models, use `functools.partial(token_mean, shifted=True)`.
    For a batch without any labels, the model's mean must give no gradient, as `torch.nn.functional.cross_entropy` does.
    Raises `JobError` for a batch without `labels` and for a model without a `.loss`. If the model's loss has further terms (a
    router's balance), they are not means over labels, but they are multiplied by the number of labels like the rest.
    """
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, torch.Tensor):
        raise JobError(
            f"token_mean needs a batch with a tensor under 'labels', and this one has {list(batch) if isinstance(batch, Mapping) else type(batch).__name__}"
        )
    loss = getattr(model(**batch), "loss", None)
    if not isinstance(loss, torch.Tensor):
        raise JobError(f"{type(model).__name__} returned no .loss for token_mean: return (loss_sum, count) from a loss of your own")
    if shifted if shifted is not None else predicts_next(model):
        labels = labels[..., 1:]
    count = (labels != IGNORED).sum()
    # A mean over no labels is nan; such a micro-batch contributes nothing.
    return torch.where(count > 0, loss, torch.zeros_like(loss)) * count, count


class PerToken:
    """A loss per token, made of a loss that returns a mean over labels, for windows that are counted in tokens.

    A pair `(loss_sum, count)` and a loss of several terms pass through. A scalar is taken for the mean over the labels of the batch other
    than -100, without each sequence's first one for a model that predicts the next token, and becomes such a pair.
    Raises `JobError` for a scalar if the batch has no labels.
    """

    def __init__(self, loss: Callable[[Any, Any], Any]) -> None:
        self.inner = loss

    def __call__(self, model: torch.nn.Module, batch: Any) -> Any:
        found = batch.get("labels") if isinstance(batch, Mapping) else None  # before the loss, which may take it out of the batch
        returned = self.inner(model, batch)
        if not isinstance(returned, torch.Tensor):
            return returned
        if not isinstance(found, torch.Tensor):
            raise JobError(
                "a target in tokens needs a loss per token, and this one is a scalar of a batch without 'labels': return (loss_sum, count), "
                "or give count=, a function of a batch that says what the scalar is a mean over"
            )
        count = ((found[..., 1:] if predicts_next(model) and found.dim() > 1 else found) != IGNORED).sum()
        return torch.where(count > 0, returned, torch.zeros_like(returned)) * count, count


def per_token(job: Job) -> Job:
    """The job with a loss per token. A job with `count` has one already: its scalar is the mean over what is counted."""
    return job if job.count is not None or isinstance(job.loss, Contrastive) else replace(job, loss=PerToken(job.loss))


def predicts_next(model: torch.nn.Module) -> bool:
    """True if the model leaves out each sequence's first label.

    Decides by the class names of Transformers: https://huggingface.co/docs/transformers/main_classes/model
    """
    for inner in _inside(model):
        if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
            return False
        if any(base.__name__.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for base in type(inner).__mro__):
            return True
    return False


def _inside(model: Any) -> Iterator[Any]:
    """Yields the model, and the models inside its wrappers (DistributedDataParallel, torch.compile, PEFT)."""
    while model is not None:
        yield model
        base = getattr(model, "get_base_model", None)  # https://huggingface.co/docs/peft/package_reference/peft_model
        inner = base() if base is not None and hasattr(model, "peft_config") else None
        model = getattr(model, "module", None) or getattr(model, "_orig_mod", None) or (inner if inner is not model else None)


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
        self._encode, self._loss, self._told = encode, loss, False

    def __call__(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        if torch.is_grad_enabled() and not self._told:
            self._told = True
            warnings.warn(
                "a contrastive loss that is called by itself looks at this batch alone: right for a whole window, wrong for a micro-batch of plan.split; "
                "train with autoaccum.Accumulator, which looks at the window",
                AutoaccumWarning,
                stacklevel=2,
            )
        return self._of(_as_tuple(self._encode(model, batch)))

    def _of(self, embeddings: Iterable[Any]) -> torch.Tensor:
        value = self._loss(*embeddings)
        if not isinstance(value, torch.Tensor) or value.dim():
            described = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
            raise JobError(f"loss(*embeddings) of contrastive returned {described}: return one scalar, the sum of its terms")
        return value

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
                        described = f"a tensor of shape {tuple(each.shape)}" if isinstance(each, torch.Tensor) else f"a {type(each).__name__}"
                        raise JobError(
                            f"encode(model, batch) returned {described} for {size} samples: return a tensor with a row for each sample, or a tuple of them; "
                            "a temperature belongs into loss"
                        )
                embedded.append(tuple(each.detach() for each in embeddings))
                sizes.append(size)
            for buffer, before in norms:
                buffer.copy_(before)  # the second pass moves BatchNorm's statistics
        leaves = [torch.cat(field) for field in zip(*embedded)]
        floating = [leaf.requires_grad_() for leaf in leaves if leaf.is_floating_point()]  # labels may be among them
        with torch.enable_grad(), _autocast(job, device):
            found = iter(torch.autograd.grad(self._of(leaves), floating, allow_unused=True))
        gradients = [next(found) if leaf.is_floating_point() else None for leaf in leaves]
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
                value = value + self._of(leaf.detach() for leaf in leaves)
            return torch.mul(value, samples / sizes[number])

        return of_piece


def _autocast(job: Job, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=job.autocast, enabled=job.autocast is not None)


def _as_tuple(embeddings: Any) -> tuple[Any, ...]:
    return tuple(embeddings) if isinstance(embeddings, (tuple, list)) else (embeddings,)
