"""The ranks of one job on unlike GPUs, and how they share windows out."""

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
    """The ranks of one job, in order, and how they share windows out. The same on every rank, so that all compute the same.

    shares: of a full window. lockstep: every rank runs the same number of micro-steps; steps: how many, in a full window.
    pairs: no micro-batch of one sample, as far as a smaller window allows it.
    """

    curves: tuple[AffineCurve, ...]
    shares: tuple[int, ...]
    lockstep: bool = False
    steps: int | None = None
    pairs: bool = False

    @classmethod
    def planned(cls, curves: Sequence[AffineCurve], target: int, *, equal: bool = False, lockstep: bool = False, pairs: bool = False) -> Fleet:
        """The shares of a window of `target` samples. pairs: no micro-batch of one sample, which BatchNorm forbids.

        Raises `NothingFits` and `PlanError` as `solve` and `equal_share` do.
        """
        if equal:
            share = equal_share(target, len(curves))
            size = largest_divisor(share, min(curve.most for curve in curves), 2 if pairs else 1)
            return cls(tuple(curves), (share,) * len(curves), True, share // size, pairs)
        if lockstep:
            if none := [rank for rank, curve in enumerate(curves) if not curve.most]:
                raise NothingFits(f"rank {none[0]} cannot hold one sample, and in lockstep every rank runs one: leave lockstep out, or that rank")
            of, order = classes(curves)
            shares, steps = in_lockstep(of, target)
            found = cls(tuple(curves), tuple(ranked(shares, order)), True, steps, pairs)
            if pairs and any(min(found._cut(rank, found.shares)) < 2 for rank in range(len(curves))):
                raise NothingFits(
                    "a micro-batch of one sample is forbidden, and in lockstep some rank would run one: choose another target, or leave lockstep out"
                )
            return found
        shares = solve_by_rank(curves, target)
        return cls(tuple(curves), tuple(in_pairs(curves, shares) if pairs else shares), pairs=pairs)

    @cached_property
    def target(self) -> int:
        """Samples of a full window."""
        return sum(self.shares)

    def of(self, samples: int) -> tuple[int, ...]:
        """Shares of a window of `samples`, none above the rank's share of a full one. Raises `PlanError` for more than a full window."""
        if samples == self.target:
            return self.shares
        if self.lockstep and len(set(self.shares)) == 1 and samples < self.target:
            # Where all are to do the same, what was measured of each would only make some of them run more micro-steps.
            shares = list(even(samples, len(self.shares)))
        else:
            shares = solve_by_rank(self.curves, samples, self.shares)
        if self.pairs:
            with suppress(NothingFits):  # then one is left alone, and the loop says what forbids it
                shares = in_pairs(self.curves, shares, self.shares)
        return tuple(shares)

    def sizes(self, rank: int, samples: int) -> tuple[int, ...]:
        """This rank's micro-batches of a window of `samples` over all ranks; zeros are micro-steps it sits out."""
        return self._cut(rank, self.of(samples))

    def cuts(self, samples: int) -> list[tuple[int, ...]]:
        """Every rank's micro-batches of a window of `samples`, without those that it sits out."""
        shares = self.of(samples)
        return [tuple(size for size in self._cut(rank, shares) if size) for rank in range(len(shares))]

    def _cut(self, rank: int, shares: Sequence[int]) -> tuple[int, ...]:
        return self.curves[rank].sizes(shares[rank], self.steps_of(shares) if self.lockstep else None)

    def steps_of(self, held: Sequence[int]) -> int:
        """Micro-steps in lockstep of a window of which each rank holds so much, at most its share: none is larger than in a full one."""
        if self.steps is None or tuple(held) == self.shares:
            return self.steps or 0
        return max(-(-samples // -(-share // self.steps)) for samples, share in zip(held, self.shares) if samples)

    def with_more(self, held: Sequence[int], samples: int, out: Iterable[int]) -> list[int]:
        """What each rank takes of `samples` more than it holds, none of them on the ranks that are `out`."""
        gone = set(out)
        curves = [AffineCurve(0, 0.0, 0.0) if rank in gone else curve for rank, curve in enumerate(self.curves)]
        extra = [0] * len(curves)
        waiting = [(curve.seconds(held[rank] + 1), rank) for rank, curve in enumerate(curves) if curve.most]
        if not waiting:
            raise NothingFits("no rank is left that can hold one sample")
        heapq.heapify(waiting)
        for _ in range(samples):
            _, rank = heapq.heappop(waiting)
            extra[rank] += 1
            heapq.heappush(waiting, (curves[rank].seconds(held[rank] + extra[rank] + 1), rank))
        return extra

    def seconds(self) -> float:
        """Predicted for a full window, without what communication takes."""
        if not self.lockstep:
            return max(curve.seconds(share) for curve, share in zip(self.curves, self.shares))
        steps = [self._cut(rank, self.shares) for rank in range(len(self.curves))]
        meeting = sum(max(curve.micro_seconds(size) for curve, size in zip(self.curves, sizes)) for sizes in zip(*steps))
        return meeting + max(curve.window_seconds for curve in self.curves)

    def as_dict(self) -> dict[str, Any]:
        told = [{name: getattr(curve, name) for name in ("gpu", "most", "step_seconds", "sample_seconds", "window_seconds")} for curve in self.curves]
        return {"ranks": told, "shares": list(self.shares), "lockstep": self.lockstep, "steps": self.steps, "pairs": self.pairs}

    @classmethod
    def from_dict(cls, told: dict[str, Any]) -> Fleet:
        return cls(tuple(AffineCurve(**each) for each in told["ranks"]), tuple(told["shares"]), told["lockstep"], told["steps"], told["pairs"])
