"""Routing: which tokens go to which expert. A simulated card has no values, so it is an even split, or the worst one.

A mark follows the chosen experts (`topk`, `argmax`) through views and comparisons up to the `nonzero` or the mask that picks an expert's tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch

_CHOOSE = {"topk": 1, "sort": 1, "argsort": None, "argmax": None, "max": 1}  # the number of the result that holds indices; None for the only one
_KEEP = frozenset(
    [
        "view",
        "_unsafe_view",
        "reshape",
        "transpose",
        "permute",
        "t",
        "unsqueeze",
        "squeeze",
        "select",
        "slice",
        "expand",
        "clone",
        "_to_copy",
        "detach",
        "alias",
        "unbind",
        "split",
        "chunk",
        "contiguous",
        "flatten",
        "index",
        "index_select",
        "_reshape_alias",
        "lift_fresh",
    ]
)
_COMPARE = frozenset(["eq", "ne", "gt", "ge", "lt", "le", "logical_and", "bitwise_and", "mul", "logical_not"])
_REDUCE = frozenset(["any", "sum", "max", "amax"])
_FEW = 1024  # experts at most: an index among more choices is no expert


class _Choice:
    """The experts that some tokens have chosen. cap: the most tokens that one expert can get. left: choices that no expert has taken yet."""

    def __init__(self, chosen: torch.Tensor, experts: int) -> None:
        per_token = chosen.shape[-1] if chosen.dim() > 1 and chosen.shape[-1] < experts else 1
        self.cap, self.left = chosen.numel() // max(per_token, 1), chosen.numel()
        self.experts = experts


class _Mark:
    """What is known of a tensor: the choice that it follows from, and the part of its elements that is true; None for indices of experts."""

    def __init__(self, choice: _Choice, part: float | None) -> None:
        self.choice, self.part = choice, part
        self.taken: int | None = None  # by this mask, once it was asked


class Routing:
    """Follows marks. uneven: True for the worst split, in which the first experts get all the tokens that they can get.

    met: True once the number of an expert's tokens was asked for.
    """

    def __init__(self, *, uneven: bool = False) -> None:
        self.uneven, self.met, self.experts = uneven, False, 0

    def follow(self, name: str, args: Sequence[Any], out: Any) -> None:
        """Called after each operator."""
        if name in _CHOOSE:
            self._choose(name, args, out)
            return
        mark = next((found for found in map(_mark_of, args[:2]) if found is not None), None)
        if name in ("scatter", "scatter_", "scatter_add", "scatter_add_") and len(args) > 2:
            index = _mark_of(args[2])
            if index is not None and index.part is None and isinstance(out, torch.Tensor):
                _set(out, _Mark(index.choice, args[2].numel() / max(out.numel(), 1)))
            elif (kept := _mark_of(args[0])) is not None:
                _set(out, kept)
            return
        counted = getattr(args[0], "_autoaccum_counts", None) if args else None
        if counted is not None and (name in _KEEP or name in ("cumsum", "to")) and isinstance(out, torch.Tensor) and out.numel() == args[0].numel():
            out._autoaccum_counts = _running(counted) if name == "cumsum" else counted  # type: ignore[attr-defined]
        if mark is None:
            return
        if name in ("bincount", "histc") and mark.part is None and isinstance(out, torch.Tensor) and out.numel() == mark.choice.experts:
            _count(out, mark.choice, args[0].numel())
        if name in _KEEP and _mark_of(args[0]) is not None:
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                fewer = mark.part is None and isinstance(tensor, torch.Tensor) and 0 < tensor.numel() < args[0].numel()
                _set(tensor, _Mark(_Choice(tensor, mark.choice.experts), None) if fewer else mark)
        elif name in _COMPARE:
            self._compare(name, mark, args, out)
        elif name in _REDUCE and mark.part is not None:
            result = out[0] if isinstance(out, (tuple, list)) else out
            if isinstance(result, torch.Tensor) and result.numel():
                true = mark.part * args[0].numel()
                _set(result, _Mark(mark.choice, min(true / result.numel(), 1.0)))
                if name == "sum" and result.numel() == mark.choice.experts:
                    _count(result, mark.choice, round(true))

    def _choose(self, name: str, args: Sequence[Any], out: Any) -> None:
        place = _CHOOSE[name]
        if place is not None and not isinstance(out, (tuple, list)):
            return
        chosen = out if place is None else out[place]
        values = args[0]
        if not isinstance(values, torch.Tensor) or not values.is_floating_point() or values.dim() < 2:
            return
        dim = next((value for value in (args[2:3] if name == "topk" else args[1:2]) if isinstance(value, int)), -1)
        experts = values.shape[dim]
        if 1 < experts <= _FEW and values.numel() // experts > 1:
            _set(chosen, _Mark(_Choice(chosen, experts), None))

    def _compare(self, name: str, mark: _Mark, args: Sequence[Any], out: Any) -> None:
        if not isinstance(out, torch.Tensor):
            return
        if mark.part is None:
            other = next((value for value in args[:2] if _mark_of(value) is not mark), None)
            # Labels of the samples have the shape of their classes: that is no expert.
            asked = next((value for value in args[:2] if _mark_of(value) is mark), None)
            names_an_expert = (isinstance(other, torch.Tensor) and asked is not None and other.shape != asked.shape) or (
                isinstance(other, int) and 0 <= other < mark.choice.experts
            )
            if name in ("eq", "ne") and names_an_expert:
                part = 1 / mark.choice.experts
                _set(out, _Mark(mark.choice, part if name == "eq" else 1 - part))
        elif name in ("logical_not", "lt", "le"):
            _set(out, _Mark(mark.choice, 1 - mark.part))
        else:
            _set(out, mark)

    def picked(self, mask: torch.Tensor) -> int | None:
        """How many elements of a mask are true; None if it does not follow from a choice."""
        mark = _mark_of(mask)
        if mark is None or mark.part is None:
            return None
        if mark.part >= 1:
            return mask.numel()
        self.met, self.experts = True, max(self.experts, mark.choice.experts)
        if not self.uneven:
            return math.ceil(mask.numel() * mark.part)
        if mark.taken is None:
            mark.taken = min(mask.numel(), mark.choice.cap, mark.choice.left)
            mark.choice.left -= mark.taken
        return mark.taken

    def counts(self, tensor: Any) -> list[int] | None:
        """The number of tokens of each expert, if a tensor holds that; else None."""
        found: tuple[list[int], list[int], int] | None = getattr(tensor, "_autoaccum_counts", None)
        if found is None:
            return None
        self.met, self.experts = True, max(self.experts, found[2])
        return found[1] if self.uneven else found[0]

    def any(self, mask: Any) -> bool | None:
        """True if some element of a mask is true; None if it does not follow from a choice."""
        mark = _mark_of(mask)
        return None if mark is None or mark.part is None else not self.uneven or mark.choice.left > 0


def _count(tensor: torch.Tensor, choice: _Choice, total: int) -> None:
    """Notes the experts' numbers of tokens: split evenly, and in the worst way."""
    experts = choice.experts
    even = [total // experts + (index < total % experts) for index in range(experts)]
    worst, left = [], total
    for _ in range(experts):
        worst.append(min(choice.cap, left))
        left -= worst[-1]
    tensor._autoaccum_counts = even, worst, experts  # type: ignore[attr-defined]


def _running(counted: tuple[list[int], list[int], int]) -> tuple[list[int], list[int], int]:
    return list(itertools.accumulate(counted[0])), list(itertools.accumulate(counted[1])), counted[2]


def _mark_of(value: Any) -> _Mark | None:
    return getattr(value, "_autoaccum_mark", None)


def _set(tensor: Any, mark: _Mark) -> None:
    if isinstance(tensor, torch.Tensor):
        tensor._autoaccum_mark = mark  # type: ignore[attr-defined]
