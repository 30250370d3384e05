"""A ready loss for models that compute their own: a mean over labels, made exact under accumulation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from autoaccum.errors import JobError

IGNORED = -100  # what torch.nn.CrossEntropyLoss leaves out by default


def token_mean(model: torch.nn.Module, batch: Mapping[str, Any], *, shifted: bool | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """`loss(model, batch)` for models that take `**batch` and return a `.loss` that is a mean over labels other than -100.

    Returns (sum over those labels, how many they are), which is normalised over the whole window: the mean of
    micro-batch means is another number wherever their labels differ in count.
    shifted: whether the model leaves out each sequence's first label, as those that predict the next token do. By
    default told by the model's class (Transformers' causal language models do, encoder-decoders and masked ones do not);
    `functools.partial(token_mean, shifted=True)` says it for others.
    The mean must be one that gives no gradient where there are no labels, as `torch.nn.functional.cross_entropy` does.
    Raises `JobError` for a batch without labels and a model without a `.loss`. A loss with further terms (a
    router's balance) is not a mean over labels, and comes out scaled by their number like the rest.
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
    # A mean over no labels is nan, and owes nothing.
    return torch.where(count > 0, loss, torch.zeros_like(loss)) * count, count


def predicts_next(model: torch.nn.Module) -> bool:
    """Whether a model leaves out each sequence's first label. Transformers' name for it: https://huggingface.co/docs/transformers/main_classes/model"""
    for inner in _inside(model):
        if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
            return False
        if any(base.__name__.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for base in type(inner).__mro__):
            return True
    return False


def _inside(model: Any) -> Iterator[Any]:
    """The model, and what wrappers (DistributedDataParallel, torch.compile) hold."""
    while model is not None:
        yield model
        model = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
