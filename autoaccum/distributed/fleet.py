"""A fleet: the ranks of one job, on equal or different GPUs, and their shares of a window."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from autoaccum.distributed.shares import classes, equal_share, in_lockstep, in_pairs, largest_divisor, ranked, solve_by_rank
from autoaccum.distributed.speed_curves import AffineCurve, even
from autoaccum.errors import NothingFits


@dataclass(frozen=True)
class Fleet:
    """The ranks of one job, in order, and their shares. It is the same on every rank, so all ranks compute the same shares.

    curves: by rank. shares: samples of each rank in a full window.
    lockstep: every rank runs the same number of micro-steps. steps: that number, in a full window.
    pairs: avoid micro-batches of one sample. In a window smaller than a full one this is not always possible.
    """

    curves: tuple[AffineCurve, ...]
    shares: tuple[int, ...]
    lockstep: bool = False
    steps: int | None = None
    pairs: bool = False

    @classmethod
    def planned(cls, curves: Sequence[AffineCurve], target: int, *, equal: bool = False, lockstep: bool = False, pairs: bool = False) -> Fleet:
        """The fleet for full windows of `target` samples.

        equal: every rank gets the same share. lockstep: every rank runs the same number of micro-steps.
        pairs: no micro-batch of one sample, because BatchNorm forbids it.
        Raises `NothingFits` and `PlanError` as `solve` and `equal_share` do.
        """
        if equal:
            share = equal_share(target, len(curves))
            size = largest_divisor(share, min(curve.most for curve in curves), 2 if pairs else 1)
            return cls(tuple(curves), (share,) * len(curves), True, share // size, pairs)
        if lockstep:
            if unable := [rank for rank, curve in enumerate(curves) if not curve.most]:
                raise NothingFits(f"rank {unable[0]} cannot hold one sample, and in lockstep every rank runs one: leave lockstep out, or that rank")
            rank_classes, order = classes(curves)
            shares, steps = in_lockstep(rank_classes, target)
            fleet = cls(tuple(curves), tuple(ranked(shares, order)), True, steps, pairs)
            if pairs and any(min(fleet._cut(rank, fleet.shares)) < 2 for rank in range(len(curves))):
                raise NothingFits(
                    "a micro-batch of one sample is forbidden, and in lockstep some rank would run one: choose another target, or leave lockstep out"
                )
            return fleet
        shares = solve_by_rank(curves, target)
        return cls(tuple(curves), tuple(in_pairs(curves, shares) if pairs else shares), pairs=pairs)

    @cached_property
    def target(self) -> int:
        """Number of samples in a full window."""
        return sum(self.shares)

    def of(self, samples: int) -> tuple[int, ...]:
        """Shares of a window of `samples`. No share is above the rank's share of a full window.

        Raises `PlanError` for more samples than a full window has.
        """
        if samples == self.target:
            return self.shares
        if self.lockstep and len(set(self.shares)) == 1 and samples < self.target:
            # With equal shares in lockstep, the measured speeds would only make some ranks run more micro-steps.
            shares = list(even(samples, len(self.shares)))
        else:
            shares = solve_by_rank(self.curves, samples, self.shares)
        if self.pairs:
            with suppress(NothingFits):  # then a micro-batch of one sample stays, and the loop reports the error of BatchNorm
                shares = in_pairs(self.curves, shares, self.shares)
        return tuple(shares)

    def sizes(self, rank: int, samples: int) -> tuple[int, ...]:
        """The micro-batch sizes of `rank` in a window of `samples` over all ranks. A zero is a micro-step without samples."""
        return self._cut(rank, self.of(samples))

    def cuts(self, samples: int) -> list[tuple[int, ...]]:
        """The micro-batch sizes of every rank in a window of `samples`, without the zeros."""
        shares = self.of(samples)
        return [tuple(size for size in self._cut(rank, shares) if size) for rank in range(len(shares))]

    def _cut(self, rank: int, shares: Sequence[int]) -> tuple[int, ...]:
        return self.curves[rank].sizes(shares[rank], self.steps_of(shares) if self.lockstep else None)

    def steps_of(self, held: Sequence[int]) -> int:
        """The number of micro-steps in lockstep. No micro-batch is larger than in a full window.

        held: samples of each rank, at most its share.
        """
        if self.steps is None or tuple(held) == self.shares:
            return self.steps or 0
        return max(-(-samples // -(-share // self.steps)) for samples, share in zip(held, self.shares) if samples)

    def with_more(self, held: Sequence[int], samples: int, out: Iterable[int]) -> list[int]:
        """Shares out `samples` more samples: returns the additional samples of each rank.

        held: samples that each rank has already. out: ranks that take none. Raises `NothingFits` if no rank can take one.
        """
        excluded = set(out)
        curves = [AffineCurve(0, 0.0, 0.0) if rank in excluded else curve for rank, curve in enumerate(self.curves)]
        extra = [0] * len(curves)
        queue = [(curve.seconds(held[rank] + 1), rank) for rank, curve in enumerate(curves) if curve.most]
        if not queue:
            raise NothingFits("no rank is left that can hold one sample")
        heapq.heapify(queue)
        for _ in range(samples):
            _, rank = heapq.heappop(queue)
            extra[rank] += 1
            heapq.heappush(queue, (curves[rank].seconds(held[rank] + extra[rank] + 1), rank))
        return extra

    def seconds(self) -> float:
        """The predicted time of a full window, without communication."""
        if not self.lockstep:
            return max(curve.seconds(share) for curve, share in zip(self.curves, self.shares))
        steps = [self._cut(rank, self.shares) for rank in range(len(self.curves))]
        lockstep_seconds = sum(max(curve.micro_seconds(size) for curve, size in zip(self.curves, sizes)) for sizes in zip(*steps))
        return lockstep_seconds + max(curve.window_seconds for curve in self.curves)

    def as_dict(self) -> dict[str, Any]:
        ranks = [{name: getattr(curve, name) for name in ("gpu", "most", "step_seconds", "sample_seconds", "window_seconds")} for curve in self.curves]
        return {"ranks": ranks, "shares": list(self.shares), "lockstep": self.lockstep, "steps": self.steps, "pairs": self.pairs}

    @classmethod
    def from_dict(cls, told: dict[str, Any]) -> Fleet:
        return cls(tuple(AffineCurve(**rank) for rank in told["ranks"]), tuple(told["shares"]), told["lockstep"], told["steps"], told["pairs"])
