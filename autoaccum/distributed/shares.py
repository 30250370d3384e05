"""The shares of a window: how many samples each rank runs, so that the window ends as early as possible.

The shares solve this problem exactly, in whole samples:

    minimise  max over ranks of f(share),   the shares sum to the window

f is a rank's time for its share, in micro-batches that fit. The only condition is that f never decreases. Ranks with the
same curve form a class. Bisection over the time gives the share that each class can run within that time. The few
samples that remain go, one by one, to the rank that would finish its next sample first. This rule alone is exact for any f
that never decreases: while samples remain, some rank is below its share of the best plan, and it would finish its next
sample in time.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from itertools import accumulate

from autoaccum.distributed.speed_curves import AffineCurve, Curve, TableCurve
from autoaccum.errors import NothingFits, PlanError

RankClass = tuple[Curve, int]  # a curve, and the number of ranks with this curve


def solve(classes: Sequence[RankClass], samples: int, most: Sequence[int] | None = None) -> list[int]:
    """Shares of a window of `samples`, by rank, in the order of the classes. No other shares finish earlier.

    most: the largest allowed share of each rank. Raises `NothingFits` if no rank can hold a sample, and `PlanError` for
    negative `samples`, for no ranks, or for more samples than `most` allows.
    """
    counts = [count for _, count in classes]
    if samples < 0 or not sum(counts):
        raise PlanError(f"cannot share {samples} samples out among {sum(counts)} ranks")
    limits = list(most) if most is not None else [samples] * sum(counts)
    can_run = [curve.most > 0 for curve, count in classes for _ in range(count)]
    if samples and not any(can_run):
        raise NothingFits("no rank can hold one sample: use larger cards, shorter samples, or activation checkpointing")
    if sum(limits[rank] for rank, can_hold in enumerate(can_run) if can_hold) < samples:
        raise PlanError(f"{samples} samples are more than the ranks' shares allow")
    seconds = _just_too_short(classes, samples, limits)
    shares: list[int] = []
    for curve, count in classes:
        # In a time that is too short, no rank runs more samples than in the best plan.
        safe_share = max(0, curve.within(seconds, samples))
        shares += [min(safe_share, limit) for limit in limits[len(shares) : len(shares) + count]]
    curves = [curve for curve, count in classes for _ in range(count)]
    # If several ranks would finish at the same time, the rank with the fewest samples is first.
    queue = [(curves[rank].seconds(share + 1), share, rank) for rank, share in enumerate(shares) if share < limits[rank] and can_run[rank]]
    heapq.heapify(queue)
    for _ in range(samples - sum(shares)):
        _, share, rank = heapq.heappop(queue)
        shares[rank] = share + 1
        if share + 1 < limits[rank]:
            heapq.heappush(queue, (curves[rank].seconds(share + 2), share + 1, rank))
    return shares


def _just_too_short(classes: Sequence[RankClass], samples: int, limits: Sequence[int]) -> float:
    """A time in which all ranks together run fewer than `samples`, just below a time in which they run all; -1 for 0 samples."""
    ends = list(accumulate(count for _, count in classes))
    limits_by_class = [limits[end - count : end] for end, (_, count) in zip(ends, classes)]
    uniform = [not class_limits or min(class_limits) == max(class_limits) for class_limits in limits_by_class]

    def done(seconds: float) -> int:
        total = 0
        for (curve, count), class_limits, is_uniform in zip(classes, limits_by_class, uniform):
            if count:
                share = max(0, curve.within(seconds, samples))
                total += count * min(share, class_limits[0]) if is_uniform else sum(min(share, limit) for limit in class_limits)
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
    """Shares by rank, and the number of micro-steps, for engines in which all ranks communicate in each micro-step.

    Every rank runs the same number of micro-steps; in some of them a rank may have no samples.
    micro_step_seconds: the time of the communication in one micro-step. Raises as `solve` does.
    """
    capacity = sum(curve.most * count for curve, count in classes)
    if not capacity:
        raise NothingFits("no rank can hold one sample: use larger cards, shorter samples, or activation checkpointing")
    step_classes = [(one_step(curve), count) for curve, count in classes]
    caps = [curve.most for curve, count in classes for _ in range(count)]
    curves = [curve for curve, count in classes for _ in range(count)]
    best: tuple[float, int, list[int]] | None = None
    fewest = -(-samples // capacity)
    steps_alone = [curve.step_seconds for curve in curves if isinstance(curve, AffineCurve)]
    rates = sum(1 / curve.sample_seconds if curve.sample_seconds else math.inf for curve in curves if isinstance(curve, AffineCurve) and curve.most)
    # The overhead of a micro-step on the fastest rank, and the time of all samples if no rank ever waits.
    overhead, samples_seconds = (min(steps_alone) + micro_step_seconds, samples / rates if rates else 0.0) if len(steps_alone) == len(curves) else (0.0, 0.0)
    least_step = min(curve.micro_seconds(1) for curve in curves if curve.most) + micro_step_seconds
    # More micro-steps than the fewest pay off only if a smaller micro-step is faster than its share of a larger one. Each
    # takes at least the time of one sample on the fastest rank. The range limits how many more are tried.
    for steps in range(fewest, min(samples, fewest + max(32, 40_000 // len(curves))) + 1):
        if best is not None and max(steps * least_step, steps * overhead + samples_seconds) >= best[0]:
            break
        size, larger = divmod(samples, steps)
        small = solve(step_classes, size, most=caps)
        large = list(small)
        if larger:
            _, first_rank = min((curve.micro_seconds(share + 1), rank) for rank, (curve, share) in enumerate(zip(curves, small)) if share < caps[rank])
            large[first_rank] += 1
        step_seconds = [max(curve.micro_seconds(share) for curve, share in zip(curves, shares)) + micro_step_seconds for shares in (large, small)]
        seconds = larger * step_seconds[0] + (steps - larger) * step_seconds[1]
        if best is None or seconds < best[0] * (1 - 1e-12):
            best = (seconds, steps, [larger * more + (steps - larger) * less for more, less in zip(large, small)])
    if best is None:
        return [0] * len(curves), 0
    # The two kinds of micro-step differ by one sample on one rank. So an even cut of the shares gives exactly these micro-steps.
    return best[2], best[1]


def one_step(curve: Curve) -> Curve:
    """The curve of the same rank in a single micro-step, without the time per window."""
    if isinstance(curve, AffineCurve):
        return AffineCurve(curve.most, curve.step_seconds, curve.sample_seconds, gpu=curve.gpu)
    return TableCurve([curve.micro_seconds(size) for size in range(1, curve.most + 1)], gpu=curve.gpu)


def equal_share(target: int, world_size: int) -> int:
    """The share of every rank if all shares are equal. Raises `PlanError`, which names the nearest possible targets."""
    if target % world_size:
        below, above = target // world_size * world_size, -(-target // world_size) * world_size
        near = f"{below} and {above} do" if below else f"{above} does"
        raise PlanError(f"a target batch of {target} cannot be shared equally by {world_size} ranks: {near}; or leave equal out, which hits {target} exactly")
    return target // world_size


def in_pairs(curves: Sequence[AffineCurve], shares: Sequence[int], most: Sequence[int] | None = None) -> list[int]:
    """Moves single samples between ranks until no micro-batch has one sample; returns the new shares, none above `most`.

    Raises `NothingFits` if that is not possible.
    """
    moved = list(shares)

    def alone(rank: int, share: int) -> bool:
        return share > 0 and (curves[rank].most < 2 or min(curves[rank].sizes(share)) < 2)

    def allowed(rank: int, share: int) -> bool:
        return share >= 0 and (most is None or share <= most[rank])

    pending = [rank for rank, share in enumerate(moved) if alone(rank, share)]
    while pending:
        source = pending.pop()
        if not alone(source, moved[source]):
            continue
        moves = [
            (curves[partner].seconds(moved[partner] - by), partner, by)
            for by in (-1, 1)
            if allowed(source, moved[source] + by) and not alone(source, moved[source] + by)
            for partner in range(len(moved))
            if partner != source and allowed(partner, moved[partner] - by) and not (alone(partner, moved[partner] - by) and not alone(partner, moved[partner]))
        ]
        if not moves:
            raise NothingFits("a micro-batch of one sample is forbidden, and the ranks cannot share the window out without one: choose another target")
        _, partner, by = min(moves)
        moved[source] += by
        moved[partner] -= by
    return moved


def classes(curves: Sequence[AffineCurve]) -> tuple[list[RankClass], list[list[int]]]:
    """The classes of ranks with the same curve, and the ranks of each class."""
    ranks: dict[AffineCurve, list[int]] = {}
    for rank, curve in enumerate(curves):
        ranks.setdefault(curve, []).append(rank)
    return [(curve, len(members)) for curve, members in ranks.items()], list(ranks.values())


def ranked(shares: Sequence[int], order: Sequence[Sequence[int]]) -> list[int]:
    """Sorts shares by rank. shares: in the order of the classes. order: the ranks of each class."""
    result = [0] * len(shares)
    for rank, share in zip((rank for members in order for rank in members), shares):
        result[rank] = share
    return result


def solve_by_rank(curves: Sequence[AffineCurve], samples: int, most: Sequence[int] | None = None) -> list[int]:
    """As `solve`, but with one curve for each rank, in the order of ranks."""
    rank_classes, order = classes(curves)
    return ranked(solve(rank_classes, samples, None if most is None else [most[rank] for members in order for rank in members]), order)


def largest_divisor(share: int, most: int, least: int) -> int:
    """The largest divisor of `share` between `least` and `most`. Raises `NothingFits` if there is none."""
    divisor = next((size for size in range(min(share, most), least - 1, -1) if share % size == 0), None)
    if divisor is None:
        need = "one sample" if least == 1 else f"micro-batches of {least} that divide a share of {share}"
        raise NothingFits(f"a rank cannot hold {need}, so no equal plan fits: leave equal out, and the others carry its part")
    return divisor
