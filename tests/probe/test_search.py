"""The search on devices of known truth. Nothing here knows of tensors."""

import math
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoaccum.errors import PlanError
from autoaccum.plan import arithmetic
from autoaccum.probe import search

BUDGET = 10**10


@dataclass(frozen=True)
class Shown:
    micro_batch: int
    accumulation_steps: int
    fits: bool
    peak_bytes: int | None
    base_bytes: int | None = None
    activation_bytes: int | None = None


class Device:
    """Runs a trial by a rule: `fits(micro_batch, steps)`, or by the largest size that fits."""

    def __init__(self, rule, fixed=0.3, tells_base=True, gradients=0):
        self.rule = rule if callable(rule) else lambda size, steps: size <= rule
        self.largest = None if callable(rule) else rule
        self.fixed, self.tells_base, self.gradients, self.tried = fixed, tells_base, gradients, []

    def __call__(self, size, steps):
        self.tried.append(size)
        fits = self.rule(size, steps)
        slope = (1 - self.fixed) * BUDGET / ((self.largest or 50) + 0.5)
        peak = int(self.fixed * BUDGET + slope * size)
        return Shown(size, steps, fits, min(peak, BUDGET) if fits else None, int(self.fixed * BUDGET) if self.tells_base else None)

    def search(self, target, **given):
        options = {name: given.pop(name) for name in ("daring",) if name in given}
        return search.largest(self, target, arithmetic.candidate_sizes(target, **given), budget_bytes=lambda: BUDGET, gradient_bytes=self.gradients, **options)


TARGETS = st.one_of(st.integers(1, 300), st.integers(1, 100_000))


@given(target=TARGETS, largest=st.integers(1, 120_000))
@settings(max_examples=400)
def test_the_candidates_are_the_largest_micro_batches_of_each_number_of_steps(target, largest):
    sizes = arithmetic.candidate_sizes(target, most=largest)
    assert sizes == sorted(set(sizes)) and sizes[0] == 1 and sizes[-1] <= min(target, largest)
    for size in sizes[:: max(len(sizes) // 50, 1)]:
        assert size == math.ceil(target / math.ceil(target / size))
    # None that would save a step is missing.
    assert math.ceil(target / sizes[-1]) == math.ceil(target / min(target, largest))


@given(target=TARGETS, largest=st.integers(1, 5000), fixed=st.sampled_from([0.05, 0.3, 0.8]), tells_base=st.booleans())
@settings(max_examples=300)
def test_the_answer_is_the_fewest_steps_that_fit(target, largest, fixed, tells_base):
    device = Device(largest, fixed, tells_base)
    found = device.search(target)
    assert found.accumulation_steps == math.ceil(target / min(largest, target))
    assert found.micro_batch in device.tried and found.micro_batch <= largest
    assert max(device.tried) <= target
    assert found.smallest_refused is None or found.smallest_refused > largest
    assert len(device.tried) == len(set(device.tried)), "no size is tried twice"


@given(target=st.integers(1, 3000), refused=st.sets(st.integers(1, 3000)), tells_base=st.booleans())
@settings(max_examples=200)
def test_whatever_memory_does_the_answer_ran_and_fitted(target, refused, tells_base):
    device = Device(lambda size, steps: size not in refused, tells_base=tells_base)
    found = device.search(target)
    if found.micro_batch:
        assert found.micro_batch in device.tried and found.micro_batch not in refused
        assert found.micro_batch == max(size for size in device.tried if size not in refused)
    else:
        assert not [size for size in device.tried if size not in refused]


@given(target=st.integers(1, 5000), largest=st.integers(1, 6000), smallest=st.integers(1, 3))
def test_no_micro_batch_of_a_window_is_smaller_than_the_smallest(target, largest, smallest):
    for size in arithmetic.candidate_sizes(target, smallest=smallest, most=largest):
        assert target // math.ceil(target / size) >= smallest


@given(target=st.integers(1, 3000), largest=st.integers(1, 3000), before=st.lists(st.integers(1, 3000), max_size=8))
@settings(max_examples=200)
def test_what_earlier_searches_settled_is_not_run_again(target, largest, before):
    """Readings of any sizes, of windows of other targets; the answer is the same."""
    device = Device(largest)
    known = [device(size, 2) for size in before]
    device.tried.clear()
    found = search.largest(device, target, arithmetic.candidate_sizes(target), budget_bytes=lambda: BUDGET, known=known)
    assert found.accumulation_steps == math.ceil(target / min(largest, target))
    fits, fails = [size for size in before if size <= largest], [size for size in before if size > largest]
    resident = [size for size in device.tried if size < target]
    assert all(size > max(fits, default=0) and size < min(fails, default=target) for size in resident)


@given(target=st.integers(1, 3000), largest=st.integers(1, 3000))
def test_the_same_search_again_runs_nothing(target, largest):
    device, readings = Device(largest), []

    def fits(size, steps):
        readings.append(device(size, steps))
        return readings[-1]

    first = search.largest(fits, target, arithmetic.candidate_sizes(target), budget_bytes=lambda: BUDGET)
    device.tried.clear()
    again = search.largest(device, target, arithmetic.candidate_sizes(target), budget_bytes=lambda: BUDGET, known=readings)
    assert not device.tried and (again.micro_batch, again.smallest_refused) == (first.micro_batch, first.smallest_refused)


def test_equal_micro_batches_divide_the_target():
    assert arithmetic.candidate_sizes(120, most=40, equal=True) == [1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 24, 30, 40]
    assert arithmetic.candidate_sizes(127, most=40, equal=True) == [1]
    assert Device(40).search(127, equal=True).accumulation_steps == 127


@pytest.mark.parametrize(
    ("target", "largest", "answer"), [(120, 40, (40, 3)), (120, 39, (30, 4)), (120, 50, (40, 3)), (127, 40, (32, 4)), (1000, 347, (334, 3))]
)
def test_the_same_question_to_all(target, largest, answer):
    device = Device(largest)
    found = device.search(target)
    assert (found.micro_batch, found.accumulation_steps) == answer
    assert len(device.tried) <= 5


def test_nothing_fits_after_the_smallest_and_the_whole_window_were_tried():
    device = Device(lambda size, steps: False)
    assert device.search(500).micro_batch == 0
    assert 1 in device.tried and 500 in device.tried


def test_the_window_in_one_piece_may_fit_where_halves_do_not():
    """With one step no gradients are resident: 2048 x 1 fits, and 1024 x 2 does not."""
    device = Device(lambda size, steps: steps == 1 or size <= 700, gradients=BUDGET)
    found = device.search(2048)
    assert (found.micro_batch, found.accumulation_steps) == (2048, 1)


def test_in_one_piece_is_tried_even_where_one_sample_beside_its_gradients_does_not_fit():
    found = Device(lambda size, steps: steps == 1, gradients=BUDGET // 2).search(64)
    assert (found.micro_batch, found.accumulation_steps) == (64, 1)


def test_a_size_that_fails_below_one_that_fits_does_not_hide_it():
    """A library picks another algorithm for 20 to 50; 60 fits. The second reading falls into the hump."""
    device = Device(lambda size, steps: size <= 15 or size == 60, fixed=0.5, tells_base=False)
    found = search.largest(device, 120, [1, 20, 60, 120], budget_bytes=lambda: BUDGET)
    assert 20 in device.tried or found.micro_batch == 60
    assert found.micro_batch == max(size for size in device.tried if device.rule(size, 2))


def test_without_daring_nothing_runs_that_is_predicted_not_to_fit():
    device = Device(50)
    found = device.search(120, daring=False)
    assert (found.micro_batch, found.accumulation_steps) == (40, 3)
    assert max(device.tried) <= 50 and found.predicted_refusal == 60 and found.smallest_refused is None


def test_the_exact_largest_is_found_among_all_sizes():
    device = Device(347)
    assert device.search(1000, every=True).largest_fit == 347
    assert len(device.tried) <= 8


def test_nothing_to_try_is_an_error():
    with pytest.raises(PlanError):
        search.largest(Device(1), 1, [], budget_bytes=lambda: 1)
