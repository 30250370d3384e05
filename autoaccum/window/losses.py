"""`token_mean`: a ready loss for models that compute their own mean over labels, exact under gradient accumulation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from autoaccum.data import IGNORED
from autoaccum.errors import JobError
from autoaccum.window.job import Job


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
    return job if job.count is not None else replace(job, loss=PerToken(job.loss))


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
