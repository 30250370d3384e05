"""Shares: against brute force, against what they must satisfy, and what is said where there are none."""

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import autoaccum
from autoaccum.distributed.fleet import Fleet
from autoaccum.distributed.shares import equal_share, in_lockstep, solve
from autoaccum.distributed.speed_curves import AffineCurve, TableCurve


def brute(curves, samples):
    """The least time of the slowest rank over every way to share out."""
    return min(
        max(curve.seconds(after - before) for curve, before, after in zip(curves, (0, *cuts), (*cuts, samples)))
        for cuts in itertools.combinations_with_replacement(range(samples + 1), len(curves) - 1)
    )


def some_curve(draw):
    if draw.random() < 0.5:
        return AffineCurve(
            draw.randint(0, 9), draw.choice([0, 0.3, 1, draw.random()]), draw.choice([0, 0.1, 1, draw.random()]), draw.choice([0, draw.random() * 3])
        )
    steps = list(itertools.accumulate(draw.choice([0, 0, draw.random(), -0.1]) for _ in range(draw.randint(1, 9))))
    return TableCurve([max(each, 0.0) for each in steps], draw.choice([0, draw.random()]))


def test_allocation_equals_brute_force_on_3000_random_fleets():
    draw = random.Random(0)
    for _ in range(3000):
        ranks = draw.choice([2, 3])
        samples, curves = draw.randint(1, 24 if ranks == 3 else 40), [some_curve(draw) for _ in range(ranks)]
        if not any(curve.most for curve in curves):
            continue
        shares = solve([(curve, 1) for curve in curves], samples)
        assert sum(shares) == samples
        assert max(curve.seconds(share) for curve, share in zip(curves, shares)) == pytest.approx(brute(curves, samples), abs=1e-9), (curves, samples)
        for curve, share in zip(curves, shares):
            sizes = curve.sizes(share)
            assert sum(sizes) == share and all(0 < size <= curve.most for size in sizes)
            assert curve.window_seconds + sum(map(curve.micro_seconds, sizes)) == pytest.approx(curve.seconds(share))


affine = st.builds(AffineCurve, st.integers(0, 64), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))


@given(st.lists(st.tuples(affine, st.integers(1, 40)), min_size=1, max_size=6), st.integers(0, 3000))
@settings(max_examples=200, deadline=None)
def test_no_single_sample_would_be_better_off_elsewhere(of, samples):
    if not any(curve.most for curve, _ in of):
        return
    shares = solve(of, samples)
    curves = [curve for curve, count in of for _ in range(count)]
    assert sum(shares) == samples and all(share == 0 or curve.most for curve, share in zip(curves, shares))
    slowest = max(curve.seconds(share) for curve, share in zip(curves, shares))
    # In the best plan nobody who is among the slowest can hand a sample to somebody who would still be done sooner.
    late = [rank for rank, share in enumerate(shares) if share and curves[rank].seconds(share) == slowest]
    if len(late) == 1 and curves[late[0]].seconds(shares[late[0]] - 1) < slowest:
        assert all(
            curve.seconds(share + 1) >= slowest * (1 - 1e-9) for rank, (curve, share) in enumerate(zip(curves, shares)) if rank != late[0] and curve.most
        )


@given(st.lists(st.tuples(affine, st.integers(1, 5)), min_size=1, max_size=4), st.integers(1, 500), st.data())
@settings(max_examples=100, deadline=None)
def test_a_smaller_window_gives_no_rank_more_than_its_share(of, target, data):
    if not any(curve.most for curve, _ in of):
        return
    fleet = Fleet.planned([curve for curve, count in of for _ in range(count)], target)
    samples = data.draw(st.integers(0, target))
    tail = fleet.of(samples)
    assert sum(tail) == samples and all(part <= share for part, share in zip(tail, fleet.shares))
    for rank in range(len(fleet.curves)):
        assert sum(fleet.sizes(rank, samples)) == tail[rank]


def lockstep_brute(curves, samples, meeting):
    """Over all numbers of steps, and all ways to fill each of two kinds of step."""
    best = math.inf
    together = sum(curve.most for curve in curves)
    for steps in range(-(-samples // together), samples + 1):
        size, larger = divmod(samples, steps)

        def one(total):
            ways = (way for way in itertools.product(*(range(curve.most + 1) for curve in curves)) if sum(way) == total)
            return min((max(curve.micro_seconds(each) for curve, each in zip(curves, way)) for way in ways), default=math.inf) + meeting

        best = min(best, larger * one(size + 1) + (steps - larger) * one(size) if larger else steps * one(size))
    return best


def test_lockstep_equals_brute_force():
    draw = random.Random(2)
    for _ in range(150):
        curves = [AffineCurve(draw.randint(1, 5), draw.random(), draw.random()) for _ in range(draw.choice([2, 3]))]
        samples, meeting = draw.randint(1, 20), draw.choice([0.0, 0.5])
        shares, steps = in_lockstep([(curve, 1) for curve in curves], samples, meeting)
        fleet = Fleet(tuple(curves), tuple(shares), True, steps)
        sizes = [fleet.sizes(rank, samples) for rank in range(len(curves))]
        assert sum(shares) == samples and all(len(each) == steps and max(each) <= curve.most for curve, each in zip(curves, sizes))
        took = sum(max(curve.micro_seconds(size) for curve, size in zip(curves, step)) + meeting for step in zip(*sizes))
        assert took == pytest.approx(lockstep_brute(curves, samples, meeting)), (curves, samples, meeting)


def test_unlike_cards_get_what_lets_all_finish_together():
    curves = [AffineCurve(40, 0.02, 0.001), AffineCurve(35, 0.02, 0.002), AffineCurve(4, 0.02, 0.006)]
    fleet = Fleet.planned(curves, 120)
    times = [curve.seconds(share) for curve, share in zip(curves, fleet.shares)]
    assert sum(fleet.shares) == 120 and max(times) - min(times) < 0.03
    assert Fleet.from_dict(fleet.as_dict()) == fleet


def test_equal_shares_and_the_targets_that_would_allow_them():
    assert equal_share(119, 7) == 17
    with pytest.raises(autoaccum.PlanError, match="120 cannot be shared equally by 7 ranks: 119 and 126 do"):
        equal_share(120, 7)
    fleet = Fleet.planned([AffineCurve(12, 0, 1), AffineCurve(7, 0, 2)], 40, equal=True)
    assert fleet.shares == (20, 20) and fleet.sizes(0, 40) == fleet.sizes(1, 40) == (5, 5, 5, 5)
    for samples in range(1, 40):  # whoever is faster: in a smaller window, too, nobody runs more micro-batches than another
        shares, sizes = fleet.of(samples), [fleet.sizes(rank, samples) for rank in range(2)]
        assert shares == (samples - samples // 2, samples // 2) and len(sizes[0]) == len(sizes[1]) and max(map(max, sizes)) <= 5
    with pytest.raises(autoaccum.NothingFits, match="leave equal out"):
        Fleet.planned([AffineCurve(12, 0, 1), AffineCurve(0, 0, 2)], 40, equal=True)


def test_where_a_layer_needs_two_samples_none_is_left_alone():
    for target in range(4, 60):
        fleet = Fleet.planned([AffineCurve(2, 0.1, 1.0), AffineCurve(5, 0.1, 1.1), AffineCurve(3, 0.1, 7.0)], target, pairs=True)
        assert sum(fleet.shares) == target
        assert all(min(fleet.sizes(rank, target), default=2) >= 2 for rank in range(3)), target
    with pytest.raises(autoaccum.NothingFits, match="micro-batches of 2 that divide a share of 7"):
        Fleet.planned([AffineCurve(6, 0.1, 1.0)] * 3, 21, equal=True, pairs=True)
    with pytest.raises(autoaccum.NothingFits, match="a micro-batch of one sample is forbidden"):
        Fleet.planned([AffineCurve(1, 0, 1), AffineCurve(1, 0, 1)], 4, pairs=True)


def test_what_cannot_be_shared_out():
    with pytest.raises(autoaccum.NothingFits, match="no rank can hold one sample"):
        solve([(AffineCurve(0, 1, 1), 4)], 12)
    with pytest.raises(autoaccum.PlanError, match="more than the ranks' shares allow"):
        solve([(AffineCurve(4, 1, 1), 2)], 12, most=[5, 6])
    with pytest.raises(autoaccum.PlanError, match="cannot share 12 samples out among 0 ranks"):
        solve([], 12)
    with pytest.raises(autoaccum.PlanError, match="negative"):
        AffineCurve(4, -1.0, 1.0)


def test_ranks_that_no_sample_slows_down_share_alike():
    assert Fleet.planned([AffineCurve(40, 0.01, 0.0)] * 3, 120).shares == (40, 40, 40)
    assert max(Fleet.planned([AffineCurve(200, 0.01, 0.0)] * 3, 120).shares) <= 40
