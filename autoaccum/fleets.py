"""One plan for unlike GPUs: each rank carries what it can, and all finish together.

Of all ways to share a window out, the one whose slowest rank is fastest, exactly and in whole samples:

    minimise  max over ranks of f(share),   the shares sum to the window

where f is the time of a rank for its share, in micro-steps no larger than fit. f never falls, and that is all that is
needed: bisecting the time gives what each class of alike ranks can do within it, and the few samples that are left
go, one by one, to whoever finishes them first. That last rule alone is exact for any f that never falls: while samples
are left, some rank is below its share of the best plan, and it would finish its next sample in time.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from autoaccum.errors import NothingFits, PlanError


@dataclass(frozen=True)
class Affine:
    """A rank whose micro-step of n samples takes `step_seconds + sample_seconds * n`.

    most: samples that a micro-batch may hold; 0 for a rank that cannot hold one. window_seconds: per window, whatever the
    share (the optimizer's step). gpu: what it runs on, for reports. Raises `PlanError` for negative figures.
    """

    most: int
    step_seconds: float
    sample_seconds: float
    window_seconds: float = 0.0
    gpu: str = ""

    def __post_init__(self) -> None:
        if self.most < 0 or min(self.step_seconds, self.sample_seconds, self.window_seconds) < 0:
            raise PlanError(f"a rank with {self}: neither sizes nor times can be negative")

    def seconds(self, share: int) -> float:
        """The least time for that share; infinite where the rank cannot hold a sample."""
        if share == 0:
            return self.window_seconds
        if self.most == 0:
            return math.inf
        return self.window_seconds + self.step_seconds * -(-share // self.most) + self.sample_seconds * share

    def within(self, seconds: float, share: int) -> int:
        """The largest share, up to `share`, that takes no longer; -1 where not even none does."""
        left = seconds - self.window_seconds
        if left < 0:
            return -1
        if self.most == 0:
            return 0
        full = self.step_seconds + self.sample_seconds * self.most
        if not full > 0 or left / full > share:
            return share
        steps = int(left // full)
        found, rest = steps * self.most, left - steps * full
        if rest >= self.step_seconds:
            found += self.most - 1 if self.sample_seconds == 0 else min(self.most - 1, int((rest - self.step_seconds) / self.sample_seconds))
        found = min(found, share)
        while found < share and self.seconds(found + 1) <= seconds:  # what rounding took
            found += 1
        while found > 0 and self.seconds(found) > seconds:
            found -= 1
        return found

    def sizes(self, share: int, steps: int | None = None) -> tuple[int, ...]:
        """The micro-batches of that share, larger first, so that the last one, in which gradients cross, is the smallest."""
        if share == 0:
            return (0,) * (steps or 0)
        return _even(share, steps or -(-share // self.most))

    def micro_seconds(self, micro_batch: int) -> float:
        """The time of one micro-step; one without samples takes none."""
        return self.step_seconds + self.sample_seconds * micro_batch if micro_batch else 0.0


class Table:
    """A rank whose micro-step of n samples was measured for every n, 1 first. Noise cannot make times fall: each is at least the one before."""

    def __init__(self, seconds: Sequence[float], window_seconds: float = 0.0, gpu: str = "") -> None:
        if min((*seconds, window_seconds), default=0.0) < 0:
            raise PlanError("a rank's times cannot be negative")
        self._steps = list(accumulate(seconds, max))
        self.most, self.window_seconds, self.gpu = len(self._steps), window_seconds, gpu
        self._least, self._last = [0.0], [0]  # by share: the least time, and the size of its last micro-step

    def _grown(self, share: int) -> list[float]:
        while len(self._least) <= share:
            of = len(self._least)
            best = min(range(1, min(self.most, of) + 1), key=lambda size: self._least[of - size] + self._steps[size - 1], default=0)
            self._least.append(self._least[of - best] + self._steps[best - 1] if best else math.inf)
            self._last.append(best)
        return self._least

    def seconds(self, share: int) -> float:
        """As `Affine.seconds`."""
        return self.window_seconds + self._grown(share)[share]

    def within(self, seconds: float, share: int) -> int:
        """As `Affine.within`."""
        if self.window_seconds > seconds:
            return -1
        low, high = 0, share
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.seconds(middle) <= seconds else (low, middle - 1)
        return low

    def sizes(self, share: int, steps: int | None = None) -> tuple[int, ...]:
        """As `Affine.sizes`, but the fastest micro-batches, which need not be alike."""
        if steps is not None:
            return _even(share, steps) if share else (0,) * steps
        self._grown(share)
        found = []
        while share:
            found.append(self._last[share])
            share -= found[-1]
        return tuple(sorted(found, reverse=True))

    def micro_seconds(self, micro_batch: int) -> float:
        """As `Affine.micro_seconds`."""
        return self._steps[micro_batch - 1] if micro_batch else 0.0


Curve = Affine | Table
Class = tuple[Curve, int]  # ranks that are alike, and how many


def _even(share: int, steps: int) -> tuple[int, ...]:
    size, larger = divmod(share, steps)
    return (size + 1,) * larger + (size,) * (steps - larger)


def solve(classes: Sequence[Class], samples: int, most: Sequence[int] | None = None) -> list[int]:
    """Shares of a window of `samples`, by rank, classes in order: no other shares finish sooner.

    most: by rank, a share that may not be exceeded. Raises `NothingFits` where no rank can hold a sample, and
    `PlanError` for fewer than no samples, or more than `most` allows.
    """
    counts = [count for _, count in classes]
    if samples < 0 or not sum(counts):
        raise PlanError(f"cannot share {samples} samples out among {sum(counts)} ranks")
    room = list(most) if most is not None else [samples] * sum(counts)
    able = [curve.most > 0 for curve, count in classes for _ in range(count)]
    if samples and not any(able):
        raise NothingFits("no rank can hold one sample: use larger cards, shorter samples, or activation checkpointing")
    if sum(room[rank] for rank, holds in enumerate(able) if holds) < samples:
        raise PlanError(f"{samples} samples are more than the ranks' shares allow")
    seconds = _just_too_short(classes, samples, room)
    shares: list[int] = []
    for curve, count in classes:
        # What every rank does within a time that is too short is no more than in the best plan.
        safe = max(0, curve.within(seconds, samples))
        shares += [min(safe, allowed) for allowed in room[len(shares) : len(shares) + count]]
    curves = [curve for curve, count in classes for _ in range(count)]
    # Of ranks that would finish at the same time, the one with the fewest samples.
    waiting = [(curves[rank].seconds(share + 1), share, rank) for rank, share in enumerate(shares) if share < room[rank] and able[rank]]
    heapq.heapify(waiting)
    for _ in range(samples - sum(shares)):
        _, share, rank = heapq.heappop(waiting)
        shares[rank] = share + 1
        if share + 1 < room[rank]:
            heapq.heappush(waiting, (curves[rank].seconds(share + 2), share + 1, rank))
    return shares


def _just_too_short(classes: Sequence[Class], samples: int, room: Sequence[int]) -> float:
    """A time in which the ranks together do fewer than `samples`, just below one in which they do them all; -1 for none to do."""
    ends = list(accumulate(count for _, count in classes))
    rooms = [room[end - count : end] for end, (_, count) in zip(ends, classes)]
    alike = [not one or min(one) == max(one) for one in rooms]

    def done(seconds: float) -> int:
        total = 0
        for (curve, count), one, same in zip(classes, rooms, alike):
            if count:
                able = max(0, curve.within(seconds, samples))
                total += count * min(able, one[0]) if same else sum(min(able, allowed) for allowed in one)
        return total

    if samples == 0:
        return -1.0
    low, high = -1.0, 1e-9
    while done(high) < samples:
        low, high = high, high * 2
    for _ in range(60):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (low, middle) if done(middle) >= samples else (middle, high)
    return low


def in_lockstep(classes: Sequence[Class], samples: int, micro_step_seconds: float = 0.0) -> tuple[list[int], int]:
    """Shares by rank and the number of micro-steps, for engines in which all ranks run the same number of them and meet in each.

    micro_step_seconds: what meeting takes. A rank may sit some micro-steps out. Raises as `solve` does.
    """
    together = sum(curve.most * count for curve, count in classes)
    if not together:
        raise NothingFits("no rank can hold one sample: use larger cards, shorter samples, or activation checkpointing")
    singly = [(_one_step(curve), count) for curve, count in classes]
    caps = [curve.most for curve, count in classes for _ in range(count)]
    curves = [curve for curve, count in classes for _ in range(count)]
    best: tuple[float, int, list[int]] | None = None
    fewest = -(-samples // together)
    steps_alone = [curve.step_seconds for curve in curves if isinstance(curve, Affine)]
    rates = sum(1 / curve.sample_seconds if curve.sample_seconds else math.inf for curve in curves if isinstance(curve, Affine) and curve.most)
    # A micro-step's overhead on the quickest rank, and what all samples take if no rank ever waits.
    overhead, flowing = (min(steps_alone) + micro_step_seconds, samples / rates if rates else 0.0) if len(steps_alone) == len(curves) else (0.0, 0.0)
    quickest = min(curve.micro_seconds(1) for curve in curves if curve.most) + micro_step_seconds
    # More micro-steps than the fewest pay only where a smaller one is faster than its share of a larger one; each takes
    # at least what one sample does where that is quickest. At most so many more than the fewest are looked at.
    for steps in range(fewest, min(samples, fewest + max(32, 40_000 // len(curves))) + 1):
        if best is not None and max(steps * quickest, steps * overhead + flowing) >= best[0]:
            break
        size, larger = divmod(samples, steps)
        small = solve(singly, size, most=caps)
        large = list(small)
        if larger:
            _, first = min((curve.micro_seconds(one + 1), rank) for rank, (curve, one) in enumerate(zip(curves, small)) if one < caps[rank])
            large[first] += 1
        took = [max(curve.micro_seconds(one) for curve, one in zip(curves, given)) + micro_step_seconds for given in (large, small)]
        seconds = larger * took[0] + (steps - larger) * took[1]
        if best is None or seconds < best[0] * (1 - 1e-12):
            best = (seconds, steps, [larger * more + (steps - larger) * less for more, less in zip(large, small)])
    if best is None:
        return [0] * len(curves), 0
    # The two kinds of micro-step differ by one sample on one rank, so balanced cuts of the shares are these very micro-steps.
    return best[2], best[1]


def _one_step(curve: Curve) -> Curve:
    """The same rank in a single micro-step, without what a window takes beside."""
    if isinstance(curve, Affine):
        return Affine(curve.most, curve.step_seconds, curve.sample_seconds, gpu=curve.gpu)
    return Table([curve.micro_seconds(size) for size in range(1, curve.most + 1)], gpu=curve.gpu)


def equal_share(target: int, world_size: int) -> int:
    """Every rank's share if all are the same. Raises `PlanError` with the nearest targets that the ranks divide."""
    if target % world_size:
        below, above = target // world_size * world_size, -(-target // world_size) * world_size
        near = f"{below} and {above} do" if below else f"{above} does"
        raise PlanError(f"a target batch of {target} cannot be shared equally by {world_size} ranks: {near}; or leave equal out, which hits {target} exactly")
    return target // world_size


@dataclass(frozen=True)
class Fleet:
    """The ranks of one job, in order, and how they share windows out. The same on every rank, so that all compute the same.

    shares: of a full window. lockstep: every rank runs the same number of micro-steps; steps: how many, in a full window.
    pairs: no micro-batch of one sample, as far as a smaller window allows it.
    """

    curves: tuple[Affine, ...]
    shares: tuple[int, ...]
    lockstep: bool = False
    steps: int | None = None
    pairs: bool = False

    @classmethod
    def planned(cls, curves: Sequence[Affine], target: int, *, equal: bool = False, lockstep: bool = False, pairs: bool = False) -> Fleet:
        """The shares of a window of `target` samples. pairs: no micro-batch of one sample, which BatchNorm forbids.

        Raises `NothingFits` and `PlanError` as `solve` and `equal_share` do.
        """
        if equal:
            share = equal_share(target, len(curves))
            size = _largest_divisor(share, min(curve.most for curve in curves), 2 if pairs else 1)
            return cls(tuple(curves), (share,) * len(curves), True, share // size, pairs)
        if lockstep:
            if none := [rank for rank, curve in enumerate(curves) if not curve.most]:
                raise NothingFits(f"rank {none[0]} cannot hold one sample, and in lockstep every rank runs one: leave lockstep out, or that rank")
            of, order = classes(curves)
            shares, steps = in_lockstep(of, target)
            found = cls(tuple(curves), tuple(_ranked(shares, order)), True, steps, pairs)
            if pairs and any(min(found._cut(rank, found.shares)) < 2 for rank in range(len(curves))):
                raise NothingFits(
                    "a micro-batch of one sample is forbidden, and in lockstep some rank would run one: choose another target, or leave lockstep out"
                )
            return found
        shares = _solved(curves, target)
        return cls(tuple(curves), tuple(_in_pairs(curves, shares) if pairs else shares), pairs=pairs)

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
            shares = list(_even(samples, len(self.shares)))
        else:
            shares = _solved(self.curves, samples, self.shares)
        if self.pairs:
            with suppress(NothingFits):  # then one is left alone, and the loop says what forbids it
                shares = _in_pairs(self.curves, shares, self.shares)
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
        curves = [Affine(0, 0.0, 0.0) if rank in gone else curve for rank, curve in enumerate(self.curves)]
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
        return cls(tuple(Affine(**each) for each in told["ranks"]), tuple(told["shares"]), told["lockstep"], told["steps"], told["pairs"])


def _in_pairs(curves: Sequence[Affine], shares: Sequence[int], most: Sequence[int] | None = None) -> list[int]:
    """The shares with single samples moved until no rank's micro-batches leave one alone; none above `most`."""
    moved = list(shares)

    def alone(rank: int, share: int) -> bool:
        return share > 0 and (curves[rank].most < 2 or min(curves[rank].sizes(share)) < 2)

    def allowed(rank: int, share: int) -> bool:
        return share >= 0 and (most is None or share <= most[rank])

    lonely = [rank for rank, share in enumerate(moved) if alone(rank, share)]
    while lonely:
        one = lonely.pop()
        if not alone(one, moved[one]):
            continue
        moves = [
            (curves[other].seconds(moved[other] - by), other, by)
            for by in (-1, 1)
            if allowed(one, moved[one] + by) and not alone(one, moved[one] + by)
            for other in range(len(moved))
            if other != one and allowed(other, moved[other] - by) and not (alone(other, moved[other] - by) and not alone(other, moved[other]))
        ]
        if not moves:
            raise NothingFits("a micro-batch of one sample is forbidden, and the ranks cannot share the window out without one: choose another target")
        _, other, by = min(moves)
        moved[one] += by
        moved[other] -= by
    return moved


def classes(curves: Sequence[Affine]) -> tuple[list[Class], list[list[int]]]:
    """Ranks that are alike, counted; and which ranks those of each class are."""
    ranks: dict[Affine, list[int]] = {}
    for rank, curve in enumerate(curves):
        ranks.setdefault(curve, []).append(rank)
    return [(curve, len(alike)) for curve, alike in ranks.items()], list(ranks.values())


def _ranked(shares: Sequence[int], order: Sequence[Sequence[int]]) -> list[int]:
    """Shares in the order of classes, by rank."""
    found = [0] * len(shares)
    for rank, share in zip((rank for alike in order for rank in alike), shares):
        found[rank] = share
    return found


def _solved(curves: Sequence[Affine], samples: int, most: Sequence[int] | None = None) -> list[int]:
    of, order = classes(curves)
    return _ranked(solve(of, samples, None if most is None else [most[rank] for alike in order for rank in alike]), order)


def _largest_divisor(share: int, most: int, least: int) -> int:
    found = next((size for size in range(min(share, most), least - 1, -1) if share % size == 0), None)
    if found is None:
        what = "one sample" if least == 1 else f"micro-batches of {least} that divide a share of {share}"
        raise NothingFits(f"a rank cannot hold {what}, so no equal plan fits: leave equal out, and the others carry its part")
    return found
