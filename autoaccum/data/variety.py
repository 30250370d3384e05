"""Samples of a batch that differ in what a loss may count: labels, tokens, a mask's ones, lengths.

A mean over labels looks like a mean over samples if all samples hold the same number of labels, so a comparison needs samples that do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from autoaccum.data import batches
from autoaccum.errors import PlanError

IGNORED = -100  # the label that torch.nn.CrossEntropyLoss ignores by default
_CONSIDERED = 64  # samples; cutting a batch into single ones takes a few microseconds each

# For a field of shape (samples, numbers): what of each sample a loss may count. Labels that are not ignored, with and without the first
# one, which models that predict the next token leave out; and what is not padding.
_COUNTS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    lambda field: (field != IGNORED).sum(1),
    lambda field: (field[:, 1:] != IGNORED).sum(1),
    lambda field: (field != 0).sum(1),
    lambda field: (field[:, 1:] != 0).sum(1),
)


def counts(batch: Any) -> Iterator[torch.Tensor]:
    """Per-sample counts of every field that a loss may count in, each of shape (samples,), in double precision.

    Whole numbers and truth values are counted, and other numbers only in a mask of zeros and ones, or as weights of samples.
    """
    yield from (torch.tensor(lengths, dtype=torch.float64) for lengths in batches.ragged_lengths(batch))
    for _, field in batches.tensors(batch):
        if field.is_nested or field.layout != torch.strided or not field.numel():
            continue
        if field.dim() == 1:
            if field.is_floating_point() and bool((field >= 0).all()):
                yield field.detach().double().cpu()  # weights
            elif not field.is_floating_point() and not field.is_complex():
                yield (field != IGNORED).double().cpu()
                yield field.detach().double().cpu()  # lengths, or classes that have weights
            continue
        flat = field.detach().reshape(len(field), -1)
        if (field.is_floating_point() or field.is_complex()) and not bool(((flat == 0) | (flat == 1)).all()):
            continue
        for count in _COUNTS:
            yield count(flat).double().cpu()


def is_countable(batch: Any) -> bool:
    """True if the batch has a field that a loss may count in."""
    return next(counts(batch), None) is not None


def is_uniform(batch: Any) -> bool:
    """True if all samples hold the same counts in every field."""
    return all(bool((count == count[0]).all()) for count in counts(batch))


def may_count(batch: Any) -> bool:
    """True if the batch has a field in which a loss may count something that is not known here: whole numbers, weights, nested tensors, lists of samples."""
    if batches.is_list_of_samples(batch):
        return True
    return any(field.is_nested or (field.dim() > 1 and _may_weigh(field)) for _, field in batches.tensors(batch))


def _may_weigh(field: torch.Tensor) -> bool:
    if field.is_floating_point():
        return field.layout == torch.strided and bool((field >= 0).all())  # weights of tokens or pixels
    return field.dtype is not torch.uint8 and not field.is_complex()


def kind(batch: Any) -> tuple[float, ...]:
    """What the first sample of a batch holds in every field that a loss may count in. Equal kinds weigh alike."""
    return tuple(float(count[0]) for count in counts(batch))


def blanked(batch: Any) -> Any:
    """The batch with half of the labels of its second half of samples set to -100, so that uniform samples hold unlike numbers of labels.

    Labels are taken to be in the last field of whole numbers with two or three dimensions. Returns None if there is no such field.
    """
    fields = [
        field for _, field in batches.tensors(batch) if field.dtype in (torch.int32, torch.int64) and field.dim() in (2, 3) and field.layout == torch.strided
    ]
    named = [field for path, field in batches.tensors(batch) if "label" in path and any(field is each for each in fields)]
    if not fields or fields[0].shape[1] < 2:
        return None
    chosen = (named or fields)[-1]

    def change(field: torch.Tensor) -> torch.Tensor:
        if field is not chosen:
            return field
        made = field.clone()
        made[len(made) // 2 :, made.shape[1] // 2 :] = IGNORED
        return made

    return batches.changed(batch, change)


def most_unlike(batch: Any, samples: int, n: int) -> Any:
    """`n` of the first samples of a batch: half with the largest counts, then half with the smallest.

    samples: of the batch. Returns the first `n` samples if nothing can be counted, or if single samples cannot be joined again.
    """
    first: Any = batch if samples <= n else batches.split(batch, [n, samples - n], samples=samples)[0]
    considered = min(samples, _CONSIDERED)
    if considered <= 2 or not is_countable(batch):
        return first
    head = batch if samples == considered else batches.split(batch, [considered, samples - considered], samples=samples)[0]
    best = _most_spread(_label_counts(head), considered)
    if best is None:
        best = _most_spread(counts(head), considered)
    if best is None:
        return first
    order = torch.argsort(best, descending=True, stable=True).tolist()
    few = min(n, considered)
    chosen = order[: few - few // 2] + order[len(order) - few // 2 :]
    try:
        single = batches.split(head, [1] * considered, samples=considered)
        joined = batches.join([single[index] for index in chosen])
    except PlanError:
        return first
    return first if joined is None else joined


def _label_counts(batch: Any) -> Iterator[torch.Tensor]:
    """Per-sample counts of labels that are not ignored, of fields of whole numbers. Of two fields that differ, labels tell more."""
    for _, field in batches.tensors(batch):
        if not field.is_nested and field.layout == torch.strided and field.numel() and not field.is_floating_point() and not field.is_complex():
            yield (field.detach().reshape(len(field), -1) != IGNORED).sum(1).double().cpu()


def _most_spread(candidates: Iterator[torch.Tensor], samples: int) -> torch.Tensor | None:
    """The counts that differ most between samples, relative to the largest; None if none differs."""
    spread, best = 0.0, None
    for count in candidates:
        if len(count) == samples and float(count.max()) > 0:
            relative = float((count.max() - count.min()) / count.max())
            if relative > spread:
                spread, best = relative, count
    return best
