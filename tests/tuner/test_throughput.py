"""The fastest plan, on devices of known speed. That real windows are timed is tested in test_tuning."""

from hypothesis import given
from hypothesis import strategies as st

from autoaccum.plan import arithmetic
from autoaccum.probe.readings import Reading
from autoaccum.tuner import throughput


def window(size, seconds, peak, fits=True):
    return Reading(size, 1, "fits" if fits else "oom", "step", peak, 1.0, window_seconds=seconds, full=True)


def found(target, largest, seconds, fits=lambda size: True):
    """The chosen micro-batch, and those that were timed."""
    sizes, timed = arithmetic.candidate_sizes(target, most=largest), []

    def run(size):
        timed.append(size)
        return window(size, seconds(size), size, fits(size))

    return throughput.fastest(run, sizes[:-1], run(sizes[-1])).micro_batch, timed


def test_the_fastest_is_found_and_what_only_gets_slower_is_left():
    assert found(512, 128, lambda size: 1.0 if size == 64 else 2.0)[0] == 64
    chosen, timed = found(512, 128, lambda size: 128 / size)
    assert chosen == 128 and len(timed) <= 4


def test_of_equally_fast_ones_the_smallest_peak_wins_and_no_size_is_timed_twice():
    chosen, timed = found(512, 128, lambda size: 1.0 if size >= 52 else 1.03)
    assert chosen == min(size for size in timed if size >= 52)
    assert len(set(timed)) == len(timed) <= 8


@given(
    target=st.integers(1, 2000),
    largest=st.integers(1, 2000),
    cost=st.dictionaries(st.integers(1, 2000), st.floats(0.1, 10)),
    refused=st.sets(st.integers(1, 2000)),
)
def test_the_answer_was_timed_fits_and_is_about_the_best_of_those(target, largest, cost, refused):
    def seconds(size):
        return cost.get(size, 1.0)

    top = arithmetic.candidate_sizes(target, most=largest)[-1]
    chosen, timed = found(target, largest, seconds, lambda size: size == top or size not in refused)
    fitted = [size for size in timed if size == top or size not in refused]
    assert chosen in fitted and seconds(chosen) <= 1.02 * min(map(seconds, fitted))
