"""The weights of micro-batches and of loss terms: the share of the window's gradient that each contributes.

For a window of T samples, micro-batch j contributes `1/T * sum of its sample losses`. A loss that is the mean over its samples
is therefore weighted with `samples / T`, and a loss sum with `1 / count of the window`. The number of steps does not appear,
so an uneven or a smaller window needs no special case.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from autoaccum.errors import JobError
from autoaccum.window.result import WindowLoss

_HALVES = (torch.float16, torch.bfloat16)


class Term(NamedTuple):
    """One term of a micro-batch's loss, ready for backward.

    name: its key in the dict that the loss returned, or its index in the list.
    value: 0-d, weighted. counted: None if the value has its full weight; otherwise it waits for `late_factor`.
    shared: the count tensor that the loss returned, by which terms are known to share a denominator.
    """

    name: str
    value: torch.Tensor
    counted: torch.Tensor | float | None
    shared: torch.Tensor | None = None


def has_terms(returned: Any) -> bool:
    """True if a loss returned a dict or a list of terms, which are added up."""
    return isinstance(returned, (Mapping, list))


def terms(returned: Any, *, samples: int, of_samples: float, counted_by_user: bool = False) -> list[Term]:
    """Turns a loss of several terms of one micro-batch into these terms, each with its own denominator.

    returned: a dict or list of terms, each a scalar mean over samples or `(loss_sum, count)`, as in `contribution`.
    counted_by_user: True if the job has a `count`, which knows one number for all terms.
    Raises `JobError` as `contribution` does, for anything else, for no terms, and for several terms beside `count=`.
    """
    if not has_terms(returned):
        raise JobError(
            f"loss(model, batch) returned terms for the first micro-batch and a {type(returned).__name__} for another: return the same for every batch"
        )
    named = dict(returned.items()) if isinstance(returned, Mapping) else {str(index): term for index, term in enumerate(returned)}
    if not named:
        raise JobError("loss(model, batch) returned no terms: return a scalar, or a dict of terms, each a mean over samples or (loss_sum, count)")
    if counted_by_user:
        raise JobError(
            f"the loss has the terms {', '.join(map(str, named))}, and count= gives one number: leave count= out and return (loss_sum, count) for each term "
            "that is a mean over something else than samples"
        )
    if len({str(name) for name in named}) < len(named):
        raise JobError(f"the loss has two terms of the same name among {', '.join(map(str, named))}: give each a name of its own")
    found = []
    device = next((leaf.device for term in named.values() for leaf in (term if isinstance(term, tuple) else (term,)) if isinstance(leaf, torch.Tensor)), None)
    for name, term in named.items():
        if isinstance(term, (int, float)) and not isinstance(term, bool):
            term = torch.tensor(float(term), device=device)  # a constant that is only logged
        if isinstance(term, tuple) and len(term) == 2 and isinstance(term[0], (int, float)) and not isinstance(term[0], bool):
            term = (torch.tensor(float(term[0]), device=device), term[1])  # no boxes in this batch
        try:
            shared = term[1] if isinstance(term, tuple) and len(term) == 2 and isinstance(term[1], torch.Tensor) else None
            found.append(Term(str(name), *contribution(term, samples=samples, of_samples=of_samples, needs_graph=False), shared))
        except JobError as error:
            raise JobError(f"term {name!r}: {error}") from None
    if not any(term.value.requires_grad for term in found):
        raise JobError("no term of the loss needs a gradient: compute at least one from the model's output, without no_grad(), detach() or .item()")
    return found


def contribution(
    returned: Any, *, samples: int, of_samples: float, count: float | None = None, of_count: float | None = None, needs_graph: bool = True
) -> tuple[torch.Tensor, torch.Tensor | float | None]:
    """Turns the loss of one micro-batch into (the term that backward runs on, a count).

    returned: the return value of the loss function: a scalar mean over the samples, or `(loss_sum, count)`.
    samples: samples of the micro-batch. 0 for a batch that stands in for a rank's missing micro-batch: it contributes nothing.
    of_samples: samples of the window. count, of_count: the counts of this micro-batch and of the window, if `count(batch)` gave
        them before the first forward; a scalar is then the mean over the counted items.
    On several ranks, `of_samples` and `of_count` are those of the window on all ranks, divided by the number of ranks that the
    engine averages over: A/D is 1 over D/A.
    The returned count is None if the term has its full weight. Otherwise the term is the sum divided by `of_samples`, and
    `late_factor` rescales it later, because the window's count is unknown before its last forward. A raw sum would overflow in fp16.
    needs_graph: False for one of several terms, which may be constant (no boxes in this batch) or only logged.
    Raises `JobError` for any other return value, for a loss that is not a scalar and for a loss without a graph.
    """
    if isinstance(returned, tuple) and len(returned) == 2:
        loss_sum, counted = returned
        _check(loss_sum, needs_graph=needs_graph)
        if isinstance(counted, torch.Tensor) and counted.numel() == 1:
            counted = _wide(counted.reshape(()))
        elif getattr(counted, "shape", ()) != () or not hasattr(counted, "__float__") or counted < 0:
            description = f"a tensor of shape {tuple(counted.shape)}" if isinstance(counted, torch.Tensor) else repr(counted)
            raise JobError(
                f"loss(model, batch) returned a pair whose second part is {description}: return (loss_sum, count), the count a number or a scalar tensor"
            )
        if samples == 0:
            loss_sum, counted = loss_sum * 0, counted * 0
        return loss_sum / (of_count or of_samples), None if of_count else counted
    _check(returned, needs_graph=needs_graph)
    if of_count is not None and count is not None:
        # If nothing in the window counts, no micro-batch contributes.
        return returned * (count / of_count if of_count else 0.0), None
    return returned * (samples / of_samples), None


def without_nothing(value: torch.Tensor, count: torch.Tensor | float) -> torch.Tensor:
    """A value, or 0 if its count is 0: the mean over nothing is nan."""
    if isinstance(count, torch.Tensor):
        return torch.where(count.to(value.device) != 0, value, torch.zeros_like(value))
    return value if count else torch.zeros_like(value)


def is_of_nothing(value: torch.Tensor, count: torch.Tensor | float | None) -> bool:
    """True if a count that the loss returned is 0 and its sum is nan, as a mean over nothing is. On other devices than the CPU it is not asked."""
    return count is not None and value.device.type == "cpu" and not count and not bool(value.isfinite())


def late_factor(counts: Sequence[torch.Tensor | float], of_samples: float) -> torch.Tensor:
    """The factor for gradients of sums that were divided by samples, once every count is known: 0-d, in double precision."""
    total = torch.as_tensor(sum(counts))
    if total.device.type != "mps":  # MPS has no double precision
        total = total.double()
    # If nothing in the window counts, the gradient is 0; a division by 0 would make it nan. A count that overflowed makes it nan, and not 0.
    return torch.where(total == 0, torch.zeros_like(total), torch.where(total.isfinite(), of_samples / total, torch.full_like(total, math.nan)))


class SeparateTerms:
    """The terms of a window's loss.

    Means over samples have a known denominator. The denominator of `(loss_sum, count)` pairs is known after the last forward only. If all
    terms share one denominator, their gradients are added up in `.grad`, as for one term. Otherwise each denominator has gradients of
    its own, and one backward for each: exact, for the price of one more set of gradients and one more backward per further denominator.
    Pairs share a denominator if their counts are the same tensor.
    parameters: everything that backward may give a gradient. over_ranks: True if gradients cross ranks. graphs: True if CUDA graphs are replayed.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], *, over_ranks: bool, graphs: bool = False) -> None:
        self._parameters, self._over_ranks, self._graphs = parameters, over_ranks, graphs
        self._names: list[str] = []

    def _begin(self, terms: Sequence[Term]) -> None:
        self._names = [term.name for term in terms]
        self._groups = _grouped(terms)
        parameters = self._parameters
        self._values: dict[str, list[torch.Tensor]] = {name: [] for name in self._names}
        self._counts: list[list[torch.Tensor | float]] = [[] for _ in self._groups]
        self._gradients: list[list[torch.Tensor | None]] = [[None] * len(parameters) for _ in self._groups]
        if self._graphs and len(self._groups) > 1:
            raise JobError(
                f"CUDA graphs run one backward for each forward, and the terms {', '.join(self._names)} have {len(self._groups)} denominators: return every term "
                "with the same count tensor, or every term as a mean over samples, or compile without CUDA graphs"
            )
        if self._over_ranks and len(self._groups) > 1:
            raise JobError(
                f"over several ranks all terms of a loss need one denominator, and {', '.join(self._names)} have {len(self._groups)}: return every term as "
                "(loss_sum, count) with the same count tensor, or every term as a mean over samples"
            )

    @property
    def has_one_denominator(self) -> bool:
        """True if the gradients of all terms are in `.grad` together."""
        return len(self._groups) == 1

    def backward(self, terms: Sequence[Term], scaler: Any) -> None:
        """Backward of one micro-batch.

        Raises `JobError` if its terms are not those of the first, and for several denominators over ranks.
        """
        if not self._names:
            self._begin(terms)
        if (
            sorted(term.name for term in terms) != sorted(self._names)
            or _grouped([next(term for term in terms if term.name == name) for name in self._names]) != self._groups
        ):
            raise JobError(
                f"the loss returned the terms {', '.join(term.name for term in terms)} for one micro-batch and {', '.join(self._names)} for the first: "
                "return the same terms for every batch, those that share a count tensor included"
            )
        terms = [next(term for term in terms if term.name == name) for name in self._names]
        trained = [number for number, group in enumerate(self._groups) if any(terms[index].value.requires_grad for index in group)]
        for number, group in enumerate(self._groups):
            value = torch.stack([terms[index].value for index in group]).sum()
            last = number == trained[-1]
            if len(self._groups) > 1:
                for parameter, gradient in zip(self._parameters, self._gradients[number]):
                    parameter.grad = gradient
            if number in trained:
                self._run_backward(value if scaler is None else scaler.scale(value), retain_graph=not last)
            if len(self._groups) > 1:
                self._gradients[number] = [parameter.grad for parameter in self._parameters]
            count = terms[group[0]].counted
            if count is not None:
                self._counts[number].append(count)
        for term in terms:
            value = term.value.detach()
            self._values[term.name].append(value if term.counted is None else without_nothing(value, term.counted))

    def _run_backward(self, value: torch.Tensor, *, retain_graph: bool) -> None:
        try:
            value.backward(retain_graph=retain_graph)
        except RuntimeError as error:
            if "donated buffer" not in str(error):
                raise
            raise JobError(
                "a compiled model frees its graph in the first backward, and a loss of several denominators needs one backward for each: set "
                "torch._functorch.config.donated_buffer = False before the model first runs, or return every term with the same count tensor"
            ) from error

    def counts(self) -> list[torch.Tensor | float]:
        """The counts of the one denominator, by micro-batch; empty for means over samples."""
        return self._counts[0]

    def losses(self, factor: torch.Tensor | None) -> dict[str, WindowLoss]:
        """Each term's loss, if all have one denominator."""
        return {name: WindowLoss(values, factor) for name, values in self._values.items()}

    def combine(self, samples: int) -> dict[str, WindowLoss]:
        """Scales each denominator's gradients, adds all up in `.grad`, and returns each term's loss. samples: of the window."""
        losses: dict[str, WindowLoss] = {}
        for number, group in enumerate(self._groups):
            factor = late_factor(self._counts[number], samples) if self._counts[number] else None
            if factor is not None:
                scale_gradients([gradient for gradient in self._gradients[number] if gradient is not None], factor)
            losses |= {self._names[index]: WindowLoss(self._values[self._names[index]], factor) for index in group}
        for index, parameter in enumerate(self._parameters):
            parameter.grad = None
            for gradients in self._gradients:
                gradient = gradients[index]
                if gradient is not None and parameter.grad is not None:
                    dense_first = parameter.grad.layout == torch.strided  # a dense tensor takes a sparse one, and not the other way round
                    parameter.grad = parameter.grad.add_(gradient) if dense_first else gradient.add_(parameter.grad)
                elif gradient is not None:
                    parameter.grad = gradient
        self._gradients.clear()
        return {name: losses[name] for name in self._names}


def _grouped(terms: Sequence[Term]) -> list[list[int]]:
    """Indices of the terms that share a denominator: all means over samples, and pairs with the same count tensor."""
    groups: dict[int, list[int]] = {}
    for index, term in enumerate(terms):
        key = -1 if term.counted is None else id(term.shared) if term.shared is not None else -2 - index
        groups.setdefault(key, []).append(index)
    return list(groups.values())


def scale_gradients(gradients: Sequence[torch.Tensor], factor: torch.Tensor) -> None:
    """Multiplies the gradients by the factor, with one call per dtype and device.

    The factor has the dtype of the gradients: `_foreach_mul_` handles mixed dtypes one tensor at a time. Not for half precision, where the
    rounded factor would be up to 0.4 % off: there the multiplication itself runs in single precision.
    """
    groups: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    for gradient in gradients:
        local = gradient.to_local() if hasattr(gradient, "to_local") else gradient  # of a sharded gradient, this rank's shard
        groups.setdefault((local.dtype, local.device), []).append(local)
    for (dtype, device), group in groups.items():
        if dtype in _HALVES:
            wide = factor.to(device, torch.float32)
            for tensor in group:
                tensor.mul_(wide.reshape(1) if tensor.dim() else wide)  # of one element, not 0-d, so that torch does not round it first
        else:
            torch._foreach_mul_(group, factor.to(device, dtype))


def _wide(count: torch.Tensor) -> torch.Tensor:
    """A count in double precision: counts of a half-precision mask overflow or round when they are added up.

    MPS has no double precision: https://docs.pytorch.org/docs/stable/notes/mps.html
    """
    if not count.is_floating_point():
        return count
    return count.float() if count.device.type == "mps" else count.double()


def _check(loss: Any, *, needs_graph: bool) -> None:
    if isinstance(loss, torch.Tensor) and loss.requires_grad and loss.dim() == 0:
        return
    if not isinstance(loss, torch.Tensor):
        raise JobError(f"loss(model, batch) returned a {type(loss).__name__}: return a scalar tensor, the mean over the batch's samples, or (loss_sum, count)")
    if loss.dim() != 0:
        raise JobError(
            f"loss(model, batch) returned a tensor of shape {tuple(loss.shape)}: return a scalar, the mean over the batch's samples (reduction='mean')"
        )
    if needs_graph and not loss.requires_grad:
        raise JobError("loss(model, batch) returned a loss that needs no gradient: compute it from the model's output, without no_grad(), detach() or .item()")
