"""How many samples of a window each rank gets: each carries what it can, and all finish together.

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
from collections.abc import Sequence
from itertools import accumulate

from autoaccum.distributed.speed_curves import AffineCurve, Curve, TableCurve
from autoaccum.errors import NothingFits, PlanError

RankClass = tuple[Curve, int]  # ranks with the same curve, and how many


def solve(classes: Sequence[RankClass], samples: int, most: Sequence[int] | None = None) -> list[int]:
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


def _just_too_short(classes: Sequence[RankClass], samples: int, room: Sequence[int]) -> float:
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


def in_lockstep(classes: Sequence[RankClass], samples: int, micro_step_seconds: float = 0.0) -> tuple[list[int], int]:
    """Shares by rank and the number of micro-steps, for engines in which all ranks run the same number of them and meet in each.

    micro_step_seconds: what meeting takes. A rank may sit some micro-steps out. Raises as `solve` does.
    """
    together = sum(curve.most * count for curve, count in classes)
    if not together:
        raise NothingFits("no rank can hold one sample: use larger cards, shorter samples, or activation checkpointing")
    singly = [(one_step(curve), count) for curve, count in classes]
    caps = [curve.most for curve, count in classes for _ in range(count)]
    curves = [curve for curve, count in classes for _ in range(count)]
    best: tuple[float, int, list[int]] | None = None
    fewest = -(-samples // together)
    steps_alone = [curve.step_seconds for curve in curves if isinstance(curve, AffineCurve)]
    rates = sum(1 / curve.sample_seconds if curve.sample_seconds else math.inf for curve in curves if isinstance(curve, AffineCurve) and curve.most)
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


def one_step(curve: Curve) -> Curve:
    """The same rank in a single micro-step, without what a window takes beside."""
    if isinstance(curve, AffineCurve):
        return AffineCurve(curve.most, curve.step_seconds, curve.sample_seconds, gpu=curve.gpu)
    return TableCurve([curve.micro_seconds(size) for size in range(1, curve.most + 1)], gpu=curve.gpu)


def equal_share(target: int, world_size: int) -> int:
    """Every rank's share if all are the same. Raises `PlanError` with the nearest targets that the ranks divide."""
    if target % world_size:
        below, above = target // world_size * world_size, -(-target // world_size) * world_size
        near = f"{below} and {above} do" if below else f"{above} does"
        raise PlanError(f"a target batch of {target} cannot be shared equally by {world_size} ranks: {near}; or leave equal out, which hits {target} exactly")
    return target // world_size


def in_pairs(curves: Sequence[AffineCurve], shares: Sequence[int], most: Sequence[int] | None = None) -> list[int]:
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


def classes(curves: Sequence[AffineCurve]) -> tuple[list[RankClass], list[list[int]]]:
    """Ranks that are alike, counted; and which ranks those of each class are."""
    ranks: dict[AffineCurve, list[int]] = {}
    for rank, curve in enumerate(curves):
        ranks.setdefault(curve, []).append(rank)
    return [(curve, len(alike)) for curve, alike in ranks.items()], list(ranks.values())


def ranked(shares: Sequence[int], order: Sequence[Sequence[int]]) -> list[int]:
    """Shares in the order of classes, by rank."""
    found = [0] * len(shares)
    for rank, share in zip((rank for alike in order for rank in alike), shares):
        found[rank] = share
    return found


def solve_by_rank(curves: Sequence[AffineCurve], samples: int, most: Sequence[int] | None = None) -> list[int]:
    """As `solve`, for ranks in any order."""
    of, order = classes(curves)
    return ranked(solve(of, samples, None if most is None else [most[rank] for alike in order for rank in alike]), order)


def largest_divisor(share: int, most: int, least: int) -> int:
    """The largest divisor of `share` between `least` and `most`. Raises `NothingFits` where there is none."""
    found = next((size for size in range(min(share, most), least - 1, -1) if share % size == 0), None)
    if found is None:
        what = "one sample" if least == 1 else f"micro-batches of {least} that divide a share of {share}"
        raise NothingFits(f"a rank cannot hold {what}, so no equal plan fits: leave equal out, and the others carry its part")
    return found
