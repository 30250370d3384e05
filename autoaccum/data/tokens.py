"""Tokens: how many a batch or a sample has, where a window of tokens ends, and which samples share a micro-batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch

from autoaccum.data import batches
from autoaccum.data.variety import IGNORED
from autoaccum.errors import AutoaccumWarning, PlanError

Count = Callable[[Any], Any]


def labels(batch: Any) -> Any:
    """The number of labels other than -100 under `"labels"`, which is what counts as a token unless the user says otherwise.

    Raises `PlanError` for a batch without such a tensor.
    """
    return (labels_of(batch) != IGNORED).sum()


def labels_of(batch: Any) -> torch.Tensor:
    """The tensor under `"labels"`. Raises `PlanError` for a batch without one."""
    found = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(found, torch.Tensor):
        has = f"{list(batch)}" if isinstance(batch, Mapping) else type(batch).__name__
        raise PlanError(
            f"what counts as a token is not known, because the batch has no tensor under 'labels' ({has}): give count=, a function of a batch, to Job or Accumulator, and where you call tune or plan.windows, to those, too"
        )
    return found


def of_each(batch: Any, samples: int, count: Count | None = None) -> list[float]:
    """The tokens of every sample in a batch. count: `count(batch)`; None for `labels`."""
    if count is not None:
        return [float(count(piece)) for piece in batches.split(batch, [1] * samples, samples=samples)]
    found = labels_of(batch)
    if found.dim() and len(found) == samples:
        return [float(value) for value in (found != IGNORED).reshape(samples, -1).sum(1).tolist()]
    return [float((labels_of(piece) != IGNORED).sum()) for piece in batches.split(batch, [1] * samples, samples=samples)]


def positions(batch: Any) -> int:
    """The places for tokens in a batch, padding included: samples x length of its largest tensor. They decide its memory."""
    return max((tensor.shape[0] * (tensor.shape[1] if tensor.dim() > 1 else 1) for _, tensor in batches.tensors(batch)), default=0)


def per_sample(batch: Any, samples: int) -> int:
    """The positions of one sample in a batch of equal ones. Raises `PlanError` if it has none."""
    found = -(-positions(batch) // samples)
    if not found:
        raise PlanError(f"the batch has no tensors of tokens ({type(batch).__name__}), so a target in tokens cannot be measured: give target_batch")
    return found


class TokenGauge:
    """Says where a window of `target` tokens ends: at the first sample that reaches them. count: as in `of_each`."""

    def __init__(self, target: int, count: Count | None = None) -> None:
        self.target, self._count, self._held, self._compared = target, count, 0.0, False

    def take(self, batch: Any, samples: int, *, whole: bool = False) -> tuple[int, bool]:
        """Adds a batch to the open window. Returns how many of its samples belong to this window, and True if the window is full then.

        whole: the batch cannot be cut, and belongs to the window in which it begins.
        """
        if whole:
            self._held += float((self._count or labels)(batch))
            taken = samples
        else:
            taken = 0
            for tokens in of_each(batch, samples, self._count):
                self._held, taken = self._held + tokens, taken + 1
                if self._held >= self.target:
                    break
        full = self._held >= self.target
        if full:
            self._held = 0.0
        return taken, full

    def compare(self, parts: Sequence[Any], sizes: Sequence[int], sampler: Any, start: int, samples: int) -> None:
        """Warns once if batches hold fewer tokens than the sampler counted in them. On one rank, for the first window."""
        if self._compared or len(sizes) == 0 or sum(sizes) != samples:
            return
        self._compared = True
        try:
            held = sum(float((self._count or labels)(part)) for part, size in zip(parts, sizes) if size)
        except PlanError:
            return  # without labels nothing can be compared
        said = sampler.tokens_in(start, samples)
        if abs(held - said) > 0.02 * max(held, said):
            warnings.warn(
                f"tokens= of plan.batch_sampler counts {said:g} in the first window, and its batches have {held:g} labels: the effective batch is what the "
                "first counts. For labels give their number per sample as tokens=, and the whole length as length=",
                AutoaccumWarning,
                stacklevel=4,
            )

    def restart(self) -> None:
        """Forgets the open window."""
        self._held = 0.0

    def part_of(self, parts: Sequence[Any], sizes: Sequence[int], shares: Sequence[float], rank: int, *, whole: bool = False) -> tuple[int, int]:
        """The first sample of a rank's slice of a window, and the first one after it. shares: of every rank, in any unit."""
        counts: list[float] = []
        for part, size in zip(parts, sizes):
            counts += [float((self._count or labels)(part)) / size] * size if whole else of_each(part, size, self._count)
        return slices(counts, shares)[rank]


def slices(tokens: Sequence[float], shares: Sequence[float]) -> list[tuple[int, int]]:
    """Cuts samples with these tokens into one slice for every rank, whose tokens are nearly in the ratio of `shares`."""
    ends, held = [0], list(accumulate(tokens))
    total, given = (held[-1] if held else 0.0), 0.0
    for share in shares:
        given += share / sum(shares)
        end = ends[-1]
        # A sample belongs to the slice that holds its middle.
        while end < len(held) and held[end] - tokens[end] / 2 <= given * total:
            end += 1
        ends.append(end)
    ends[-1] = len(tokens)
    pairs = list(pairwise(ends))
    if not shares[-1]:  # what rounding has left belongs to the last rank that has a share
        last = max(index for index, share in enumerate(shares) if share)
        pairs = [*pairs[:last], (pairs[last][0], len(tokens)), *[(len(tokens), len(tokens))] * (len(shares) - last - 1)]
    return pairs


def sizes_within(parts: Sequence[Any], sizes: Sequence[int], budget: float, *, pairs: bool = False) -> tuple[int, ...]:
    """Micro-batches of consecutive samples, each with at most `budget` positions, its samples padded to the longest one.

    A sample that is longer than the budget is a micro-batch of its own. pairs: True if none may be alone, as BatchNorm asks; it then takes one more from
    beside it, or comes to the one before.
    """
    found: list[int] = []
    held, longest = 0, 0.0
    for part, size in zip(parts, sizes):
        length = positions(part) / size
        for _ in range(size):
            if held and (held + 1) * max(longest, length) > budget:
                found.append(held)
                held, longest = 0, 0.0
            held, longest = held + 1, max(longest, length)
    found += [held] if held else []
    return _in_pairs(found) if pairs else tuple(found)


def _in_pairs(sizes: Sequence[int]) -> tuple[int, ...]:
    """The same samples in the same order, in micro-batches of at least two, if there are as many."""
    found: list[int] = []
    owed = 0  # a sample alone, which the next one takes
    for size in sizes:
        size, owed = size + owed, 0
        if size > 1:
            found.append(size)
        elif found and found[-1] > 2:
            found[-1] -= 1
            found.append(2)
        else:
            owed = size
    if owed and found:
        found[-1] += owed
    return tuple(found) or tuple(sizes)


def cuts(part: Any, samples: int, budget: float) -> int:
    """Into how many pieces a batch of `samples` samples is cut, so that each has at most `budget` positions, or one sample."""
    return min(-(-samples // max(int(samples * budget / max(positions(part), 1)), 1)), samples)


def packed(indices: Sequence[int], of: Sequence[float], budget: float, *, padded: bool) -> list[list[int]]:
    """Micro-batches of the samples `indices`, the longest samples first.

    of: the tokens of every sample. padded: a micro-batch takes its samples times its longest one; otherwise the sum of its samples.
    """
    found: list[list[int]] = []
    room: list[float] = []
    for index in sorted(indices, key=lambda index: -of[index]):
        if padded:
            if not found or (len(found[-1]) + 1) * of[found[-1][0]] > budget:
                found.append([])
            found[-1].append(index)
            continue
        place = next((number for number, left in enumerate(room) if of[index] <= left), None)
        if place is None:
            found.append([])
            room.append(budget)
            place = -1
        found[place].append(index)
        room[place] -= of[index]
    return found
