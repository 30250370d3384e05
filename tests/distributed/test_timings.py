"""A rank's speed from its timings: found again, never negative, and alike where only noise differs."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import autoaccum
from autoaccum.distributed.fleet import Fleet
from autoaccum.distributed.timings import alike, fitted


@given(st.floats(0, 0.1), st.floats(0, 0.1), st.floats(1e-4, 0.1), st.integers(1, 100))
@settings(deadline=None)
def test_a_line_through_timings_is_found_again(window, step, sample, most):
    half = max(most // 2, 1)
    timed = [(steps, steps * size, window + step * steps + sample * steps * size) for steps, size in ((2, most), (2, half), (4, half))]
    found = fitted(timed)
    assert min(found) >= 0
    for steps, samples, seconds in timed:
        assert found[0] + found[1] * steps + found[2] * samples == pytest.approx(seconds, rel=1e-6)


def test_noise_makes_no_time_negative():
    draw = random.Random(3)
    for _ in range(500):
        rows = [(steps, steps * size, draw.uniform(0.5, 1.5) * (0.01 + 0.002 * steps * size)) for steps, size in ((2, 8), (2, 4), (4, 4), (2, 8))]
        assert min(fitted(rows)) >= 0
    with pytest.raises(autoaccum.PlanError, match="nothing was timed"):
        fitted([])


def timed(window, step, sample, most, noise=1.0):
    half = max(most // 2, 1)
    return [(steps, steps * size, noise * (window + step * steps + sample * steps * size)) for steps, size in ((2, most), (2, half), (4, half))]


def test_noise_between_equal_cards_makes_no_unequal_shares():
    draw = random.Random(4)
    for _ in range(100):
        ranks = [("T4", 20, timed(0.001, 0.002, 0.0001, 20, draw.uniform(0.9, 1.1))) for _ in range(4)]
        shares = Fleet.planned(alike(ranks), 203).shares
        assert max(shares) - min(shares) <= 1


def test_unlike_speeds_memory_and_models_stay_unlike():
    same = timed(0.0, 0.002, 0.001, 20)
    found = alike([("T4", 20, same), ("T4", 20, timed(0.0, 0.002, 0.003, 20)), ("L4", 20, same), ("T4", 8, timed(0.0, 0.002, 0.001, 8)), ("T4", 0, ())])
    assert found[1].sample_seconds > 2 * found[0].sample_seconds and [curve.most for curve in found] == [20, 20, 20, 8, 0]
    assert [curve.gpu for curve in found] == ["T4", "T4", "L4", "T4", "T4"]
