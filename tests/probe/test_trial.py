"""One rehearsal, measured, undone."""

import gc
import time
import warnings
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

import autoaccum
from autoaccum import oom
from autoaccum.devices.cpu import Cpu
from autoaccum.probe import Request
from autoaccum.probe.evaluation import Evaluation
from autoaccum.probe.readings import Limits
from autoaccum.probe.rehearsal import rehearsing
from autoaccum.tuner.one_device import tune_one_device
from autoaccum.tuner.trial_log import TrialLog
from autoaccum.window import snapshot
from tests import jobs
from tests.seen import Seen

MIB = 2**20


@pytest.fixture
def rehearse():
    """Runs trials of a job in place, under a limit of so many MiB above what is held."""

    def run(job, *windows, above=None, full=False, **given):
        limit = None if above is None else int((Cpu().held_bytes() + above * MIB) / 0.97)
        with rehearsing(job, Cpu(), Limits(limit), **given) as rehearsal:
            return [rehearsal.measure(window, full=full) for window in windows]

    return run


def test_the_peak_grows_by_what_a_sample_keeps(rehearse):
    low, high = rehearse(jobs.hungry(mib=2), (10, 10), (40, 40))
    per_sample = (high.peak_bytes - low.peak_bytes) / 30 / MIB
    assert low.fits and high.fits and 3.8 < per_sample < 9  # its values, those before `exp`, and gradients on the way back
    assert low.activation_bytes <= low.peak_bytes and low.base_bytes < low.peak_bytes


def test_the_same_trial_shows_the_same_peak_whatever_ran_before(rehearse):
    first, _, _, again = rehearse(jobs.hungry(mib=2), (20, 20), (50, 50), (3, 3), (20, 20))
    assert abs(first.peak_bytes - again.peak_bytes) < 4 * MIB


def test_gradients_are_resident_with_two_micro_batches_and_not_with_one(rehearse):
    """A model of 100 MiB whose activations are nothing: one micro-batch peaks at its gradients, as two do; only held longer."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 3_000_000, bias=False))
    job = autoaccum.Job(model, torch.optim.SGD(model.parameters(), lr=0.0), lambda m, b: m(b).mean(), torch.ones(4, 8))
    alone, split = rehearse(job, (4,), (4, 4))
    assert split.base_bytes - alone.base_bytes == pytest.approx(job.gradient_bytes(), rel=0.05)
    assert split.activation_bytes - alone.activation_bytes > 0.8 * job.gradient_bytes()


def test_a_real_out_of_memory_is_an_outcome_and_its_memory_comes_back(rehearse):
    gc.collect()
    before = Cpu().held_bytes()
    (reading,) = rehearse(jobs.hungry(mib=4), (100, 20), above=100)
    assert reading.outcome == "oom" and reading.phase == "forward" and not reading.fits
    assert Cpu().held_bytes() < before + 10 * MIB


def test_the_limit_of_the_process_is_what_it_was(rehearse):
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    rehearse(jobs.hungry(mib=4), (100, 20), (2, 2), above=100)
    with pytest.raises(ValueError):
        rehearse(jobs.fails_above(1), (2, 2), above=100)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_what_is_not_enforced_is_still_over_budget(rehearse):
    (reading,) = rehearse(jobs.hungry(mib=4), (40, 40), above=100, enforce=False)
    assert reading.outcome == "over-budget" and reading.phase == "step"


def test_a_confirming_run_is_the_whole_window_after_one_micro_batch(rehearse):
    steps, sizes = Seen(), Seen()

    def loss(model, batch):
        sizes.append(len(batch[0]))
        return jobs.mse(model, batch)

    job = jobs.small(loss)
    job.optimizer.register_step_post_hook(lambda *_: steps.append(len(sizes)))
    rehearse(job, (4, 3, 3), full=True)
    assert sizes == [4, 4, 3, 3] and steps == [1, 4]
    sizes.clear(), steps.clear()
    rehearse(job, (4, 3, 3))
    assert sizes == [4, 4, 3] and steps == [1, 3]


def test_a_snapshot_in_the_measured_memory_is_not_counted(rehearse):
    """In place on a CPU the copy of the weights sits beside them: 120 MiB that training will not have."""
    model = torch.nn.Linear(1000, 30_000)
    job = autoaccum.Job(model, torch.optim.SGD(model.parameters(), lr=0.0), lambda m, b: m(b).mean(), torch.ones(4, 1000))
    (with_copy,) = rehearse(job, (4, 4))
    (without,) = rehearse(job, (4, 4), parameters=False)
    assert abs(with_copy.peak_bytes - without.peak_bytes) < 8 * MIB


def test_other_errors_come_through_with_where_they_happened(rehearse):
    with pytest.raises(ValueError) as raised:
        rehearse(jobs.fails_above(3), (2, 2), (4, 4))
    assert raised.value.__notes__ == ["autoaccum: raised in forward, at a micro-batch of 4"]


def test_the_weight_of_the_whole_window_is_in_the_peak_of_a_cpu(rehearse):
    """The loop holds the effective batch on the host, which on a CPU is the memory that is measured."""
    model = torch.nn.Linear(MIB // 4, 1)
    job = autoaccum.Job(model, torch.optim.SGD(model.parameters(), lr=0.0), lambda m, b: m(b).mean(), torch.ones(4, MIB // 4))
    small, large = rehearse(job, (4, 4), (4,) * 25)
    assert large.peak_bytes - small.peak_bytes == pytest.approx(92 * MIB, rel=0.1)


def test_doubtful_words_are_told_apart_by_what_the_budget_had_left():
    error = RuntimeError("could not create a primitive")
    assert oom.is_oom(error, left_bytes=10 * MIB, taken_bytes=200 * MIB)
    assert not oom.is_oom(error, left_bytes=8000 * MIB, taken_bytes=200 * MIB)


@pytest.mark.parametrize("mib, told", [(100, "oom"), (8, "raised")])
def test_a_doubtful_failure_is_judged_by_the_peak_not_by_what_is_left_afterwards(rehearse, mib, told):
    """A backward has freed what it held when its exception arrives."""

    def loss(model, batch):
        torch.ones(mib, MIB, dtype=torch.uint8)  # and let go of
        raise RuntimeError("could not create a primitive")

    if told == "raised":
        with pytest.raises(RuntimeError, match="primitive"):
            rehearse(jobs.small(loss), (4, 4), above=130)
    else:
        (reading,) = rehearse(jobs.small(loss), (4, 4), above=130)
        assert reading.outcome == "oom" and reading.doubtful


def test_the_collector_is_as_it_was_before_and_after(rehearse):
    """Inside, it looks at what trials left alone; who had frozen objects keeps them frozen."""
    gc.unfreeze()  # conftest has frozen what was there before
    frozen = Seen()

    def loss(model, batch):
        frozen.append(gc.get_freeze_count())
        return jobs.mse(model, batch)

    rehearse(jobs.small(loss), (4, 4))
    assert min(frozen) > 10_000 > 1000 > gc.get_freeze_count()
    gc.freeze()
    try:
        theirs = gc.get_freeze_count()
        rehearse(jobs.small(), (4, 4))
        assert gc.get_freeze_count() > 0.9 * theirs  # some were freed
    finally:
        gc.unfreeze()


class Searching(Cpu):
    """A device on whose first `searches` windows a library's search takes 2 GiB and has the allocator flush its cache."""

    def __init__(self, searches, always=False):
        super().__init__()
        self._searches, self._always = searches, always
        self.windows = self.released = 0

    @contextmanager
    def watch(self):
        with super().watch() as inner:
            yield _Counted(self, inner)

    def release(self):
        self.released += 1
        super().release()

    def synchronize(self):
        self.windows += 0.5  # before and after each

    @property
    def flushes(self):
        return self.windows if self._always else min(self.windows, self._searches)


class _Counted:
    def __init__(self, device, inner):
        self._device, self._inner = device, inner
        self.restart()

    def restart(self):
        self._before = self._device.flushes
        self._inner.restart()

    def peak_bytes(self):
        return self._inner.peak_bytes() + (2048 * MIB if self.retries() else 0)

    def lap_bytes(self):
        return self._inner.lap_bytes()

    def retries(self):
        return self._device.flushes - self._before


@pytest.mark.parametrize("windows", [(4,), (4, 4), (4, 3)])
@pytest.mark.parametrize("searches", [0, 1, 2])
def test_a_search_for_kernels_that_flushes_the_cache_once_condemns_no_size(windows, searches):
    device = Searching(searches)
    with rehearsing(jobs.small(), device, Limits(Cpu().held_bytes() + 1024 * MIB)) as rehearsal:
        for full in (False, True):
            device.windows = 0
            reading = measure_here(rehearsal, windows, full)
            assert reading.fits and reading.peak_bytes < 2048 * MIB


def measure_here(rehearsal, windows, full):
    rehearsal._copies = False  # the device counts in this process
    return rehearsal.measure(windows, full=full)


class SearchingInEvaluation(Searching):
    """Its flush is of the first forward without gradients, as a search for kernels of another shape is."""

    def __init__(self):
        super().__init__(0)
        self.forwards = 0

    @property
    def flushes(self):
        return min(self.forwards, 1)


def test_a_search_for_kernels_in_the_first_forward_of_an_evaluation_is_not_its_peak():
    device = SearchingInEvaluation()

    def run(model, batch):
        device.forwards += 1
        return model(batch[0])

    with rehearsing(jobs.small(), device, Limits(Cpu().held_bytes() + 1024 * MIB), evaluation=Evaluation(run)) as rehearsal:
        rehearsal._copies = False
        reading = rehearsal.evaluate(8, trained=4)
    assert (reading.outcome, device.forwards) == ("fits", 2)


class Refilling(Searching):
    """Its allocator flushes whenever a window begins with a cache that was used."""

    def __init__(self):
        super().__init__(0)
        self._flushes = self._since = 0

    def release(self):
        super().release()
        self._since = 0

    def synchronize(self):
        super().synchronize()
        self._since += 0.5
        if self._since > 1 and self._since == int(self._since):
            self._flushes += 1

    @property
    def flushes(self):
        return self._flushes


def test_a_size_that_flushes_a_used_cache_in_every_window_stays_refused():
    with rehearsing(jobs.small(), Refilling(), Limits()) as rehearsal:
        assert measure_here(rehearsal, (4, 4), False).outcome == "over-budget"


def test_a_size_that_flushes_the_cache_in_every_window_stays_refused():
    with rehearsing(jobs.small(), Searching(0, always=True), Limits()) as rehearsal:
        reading = measure_here(rehearsal, (4, 4), False)
    assert reading.outcome == "over-budget"


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: invalid configuration argument\nCUDA kernel errors might be asynchronously reported",
        "Expected canUse32BitIndexMath(input) && canUse32BitIndexMath(output) to be true, but got false.",
        "nonzero is not supported for tensors with more than INT_MAX elements, See https://github.com/pytorch/pytorch/issues/51871",
        "value cannot be converted to type int without overflow",
    ],
)
def test_a_kernels_limit_is_an_upper_bound_for_the_search_and_is_told(text):
    def loss(model, batch):
        if len(batch[0]) > 20:
            raise RuntimeError(text)
        return jobs.mse(model, batch)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plan = autoaccum.tune(jobs.small(loss), target_batch=60)
    assert (plan.micro_batch, plan.smallest_refused) == (20, 30)
    assert any("a kernel cannot take a micro-batch of 30" in str(each.message) and text.splitlines()[0][:40] in str(each.message) for each in caught)
    assert "more than a kernel can take" in plan.explain()


def test_where_a_kernel_takes_no_size_the_search_ends_with_its_words():
    def loss(model, batch):
        raise RuntimeError("CUDA error: invalid configuration argument")

    with pytest.raises(RuntimeError, match="invalid configuration argument") as raised:
        autoaccum.tune(jobs.small(loss), target_batch=60)
    assert "raised in forward, at a micro-batch of 1" in raised.value.__notes__[0]


def test_a_lost_context_ends_the_search_and_the_jobs_own_exception_comes_last(monkeypatch):
    def loss(model, batch):
        monkeypatch.setattr(snapshot, "same_content", lost)
        raise RuntimeError("CUDA error: device-side assert triggered")

    def lost(*_):
        raise RuntimeError("CUDA error: device-side assert triggered")

    with pytest.raises(RuntimeError, match="device-side assert") as raised:
        autoaccum.tune(jobs.small(loss), target_batch=60)
    notes = "\n".join(raised.value.__notes__)
    assert "raised in forward, at a micro-batch of" in notes and "load your last checkpoint" in notes


@pytest.mark.slow
def test_a_size_whose_samples_take_much_longer_is_over_budget():
    """Where memory pages instead of running out (WSL2, Windows, swap), time is what runs out. Here from 40 samples on."""

    def loss(model, batch):
        samples = len(batch[0])
        spent = time.perf_counter() + (0.001 if samples < 40 else 0.01) * samples
        while time.perf_counter() < spent:
            pass
        return jobs.mse(model, batch)

    def planned(free_mib):
        with rehearsing(jobs.small(loss), Nearly(free_mib), Limits(headroom="0")) as rehearsal:
            return tune_one_device(rehearsal, Request(target_batch=60), TrialLog(None), "job", ())

    plan = planned(64)
    assert (plan.micro_batch, plan.smallest_refused) == (30, 60)
    assert any("a sample takes" in each and "taken as over budget" in each for each in plan.warnings)
    assert planned(100_000).micro_batch == 60  # slow for another reason: there is memory left


class Nearly(Cpu):
    """A machine that has so many MiB left."""

    def __init__(self, free_mib):
        super().__init__()
        self._free = free_mib * MIB

    def memory(self, *, who=True):
        held = self.held_bytes()
        return replace(super().memory(who=who), total_bytes=held + self._free, free_bytes=self._free, ours_bytes=held, binding_limit="physical")


def test_values_are_written_back_once_and_not_after_every_trial():
    """Memory does not depend on them. What trials run on is what earlier ones left, and the end is the beginning, bit by bit."""
    seen = []

    def loss(model, batch):
        if model.training and torch.is_grad_enabled():
            seen.append(float(model[0].weight.detach().sum()))
        return jobs.mse(model, batch)

    job = jobs.small(loss)
    before = {name: each.clone() for name, each in job.model.state_dict().items()}
    with rehearsing(job, Cpu(), Limits(), enforce=False) as rehearsal:
        rehearsal.measure((4, 4))
        first = list(seen)
        seen.clear()
        rehearsal.measure((8, 8))
    assert seen[0] != first[0]
    assert all(torch.equal(before[name], each) for name, each in job.model.state_dict().items())


def test_values_that_many_trials_have_driven_off_are_no_reason_to_warn():
    job = jobs.small()
    job.optimizer.param_groups[0]["lr"] = 1e30
    with rehearsing(job, Cpu(), Limits(), enforce=False) as rehearsal:
        readings = [rehearsal.measure((size,)) for size in (2, 4, 8)]
    assert len({bool(reading.remarks) for reading in readings}) == 1 and readings[0].fits
