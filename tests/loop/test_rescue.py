"""Out of memory in mid-training: the window runs again, smaller, exactly."""

import gc
import logging
import math
import random
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import autoaccum
from autoaccum.devices.cpu import Cpu
from autoaccum.errors import DeviceError
from autoaccum.loop.rescue import Rescued
from tests import jobs
from tests.digest import digest
from tests.plans import by_hand

MIB = 2**20
TEXT = "CUDA out of memory. Tried to allocate 2.00 GiB"


class Trap(nn.Module):
    """Passes its input on; runs out of memory where it is told to, once each: forward or backward, at a micro-batch's number."""

    def __init__(self):
        super().__init__()
        self.set = []  # (phase, number of the forward since the window began)
        self.forwards = 0

    def forward(self, inputs):
        number, self.forwards = self.forwards, self.forwards + 1
        if self._springs("forward", number):
            raise torch.OutOfMemoryError(TEXT)
        out = inputs.clone()
        out.register_hook(lambda grad: self._backward(number))
        return out

    def _backward(self, number):
        if self._springs("backward", number):
            raise torch.OutOfMemoryError(TEXT)

    def _springs(self, phase, number):
        for one in self.set:
            if one[0] == phase and one[1] <= number:
                self.set.remove(one)
                self.forwards = 0
                return True
        return False


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), Trap(), nn.Dropout(0.3), nn.Linear(12, 1))


def noisy_loss(model, batch):
    inputs, targets = batch
    shift = random.random() + np.random.rand()  # every generator that training may use
    return nn.functional.mse_loss(model(inputs) * shift, targets)


def make_job(**given):
    model = network()
    return autoaccum.Job(model, torch.optim.Adam(model.parameters(), lr=1e-2), noisy_loss, jobs.pairs(8, 6), **given)


def trap_of(job):
    return next(module for module in job.model.modules() if isinstance(module, Trap))


def state(job):
    return digest(job.model, job.optimizer)


def seeded():
    random.seed(1), np.random.seed(2), torch.manual_seed(3)


def run(job, plan, data, traps, **given):
    """Trains over `data`, with traps set per window. Returns the results."""
    seeded()
    loop, trap, results = autoaccum.Accumulator(job, plan, **given), trap_of(job), []
    for index, batch in enumerate(data):
        trap.forwards, trap.set = 0, list(traps.get(index, ()))
        results.append(loop.step(batch))
        assert not trap.set, "the trap was never reached"
    return results


TRAPS = st.dictionaries(
    st.integers(0, 49), st.lists(st.tuples(st.sampled_from(["forward", "backward"]), st.integers(0, 2)), min_size=1, max_size=2), min_size=1, max_size=5
)


# Not shrunk: each example trains 100 windows.
@settings(max_examples=6, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(traps=TRAPS, grow_after=st.sampled_from([None, 2, 10]))
def test_50_windows_with_rescues_anywhere_end_as_if_planned_so_from_the_start(traps, grow_after):
    torch.manual_seed(9)
    data = [jobs.pairs(60 if index % 10 < 9 else 41, 6) for index in range(50)]  # a smaller last window in each epoch of ten
    job = make_job()
    rescued = run(job, by_hand(job, 60, 20), data, traps, grow_after=grow_after)
    assert [index for index, each in enumerate(rescued) if each.rescued] == sorted(traps)

    straight = make_job()
    seeded()
    for batch, ours in zip(data, rescued):
        plan = by_hand(straight, ours.samples, math.ceil(ours.samples / ours.micro_batches))
        trap_of(straight).forwards = 0
        theirs = autoaccum.Accumulator(straight, plan, on_oom="raise").step(batch)
        assert (theirs.micro_batches, theirs.loss) == (ours.micro_batches, ours.loss)
    assert same_training(job, straight)


def same_training(one, other):
    """Weights, buffers and optimizer state, bit by bit."""
    a, b = (each.model.state_dict() for each in (one, other))
    c, d = (each.optimizer.state_dict()["state"] for each in (one, other))
    return all(torch.equal(a[name], b[name]) for name in a) and all(torch.equal(c[key][name], d[key][name]) for key in c for name in c[key])


def test_the_smaller_size_is_the_next_that_makes_a_difference_and_stays(caplog):
    torch.manual_seed(9)
    data = [jobs.pairs(24, 6) for _ in range(4)]
    job = make_job()
    with caplog.at_level(logging.WARNING, logger="autoaccum"):
        results = run(job, by_hand(job, 24, 8), data, {1: [("backward", 2)], 2: [("forward", 0), ("forward", 0)]})
    assert [each.micro_batches for each in results] == [3, 4, 6, 6]  # 8 x 3, 6 x 4, then 5 x 5 and 4 x 6
    assert results[0].rescued is None and results[3].rescued is None
    assert str(results[1].rescued) == (
        "out of memory in backward of micro-batch 3 of 8 x 3: the window ran again, whole, as 6 x 4; micro-batches stay at 6 or less"
    )
    assert [record.getMessage() for record in caplog.records] == [str(results[1].rescued), str(results[2].rescued)]
    assert results[2].rescued.attempts == 2 and "of 6 x 4, and in 1 smaller size: the window ran again, whole, as 4 x 6" in str(results[2].rescued)


def test_it_grows_back_only_where_that_was_asked_for():
    torch.manual_seed(9)
    data = [jobs.pairs(24, 6) for _ in range(8)]
    steps = []
    for grow_after in (None, 3):
        job = make_job()
        results = run(job, by_hand(job, 24, 8), data, {1: [("forward", 0), ("forward", 0)]}, grow_after=grow_after)
        steps.append([each.micro_batches for each in results])
    assert steps == [[3, 5, 5, 5, 5, 5, 5, 5], [3, 5, 5, 5, 5, 4, 4, 4]]


def test_a_smaller_last_window_is_cut_so_that_it_changes_something():
    """At 7 samples, most sizes below 8 make the same two micro-batches of 4 and 3."""
    torch.manual_seed(9)
    job = make_job()
    results = run(job, by_hand(job, 24, 8), [jobs.pairs(24, 6), jobs.pairs(7, 6)], {1: [("forward", 0)]})
    assert results[1].micro_batches == 2 and results[1].rescued.before == (7,) and results[1].rescued.after == (4, 3)


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_when_the_smallest_runs_out_too_the_error_comes_through_and_nothing_is_changed(phase):
    job = make_job()
    loop = autoaccum.Accumulator(job, by_hand(job, 12, 4))
    batch = jobs.pairs(12, 6)
    trap = trap_of(job)
    seeded()
    loop.step(batch)
    before = state(job)
    trap.set = [(phase, 0)] * 20
    with pytest.raises(torch.OutOfMemoryError, match=TEXT) as raised:
        loop.step(batch)
    # BatchNorm forbids micro-batches of one sample, so 2 is the smallest.
    assert any("of at most 2 samples; the window cannot be cut smaller" in note for note in raised.value.__notes__)
    trap.set, trap.forwards = [], 0
    assert state(job) != before  # the trap itself counts its forwards
    trap.forwards = 3
    assert state(job) == before


def test_what_is_not_an_out_of_memory_passes_through_untouched():
    job = make_job()
    mistake = ValueError("a mistake of the user's")

    def loss(model, batch):
        raise mistake

    with pytest.raises(ValueError) as raised:
        autoaccum.Accumulator(job, by_hand(job, 12, 4)).step(jobs.pairs(12, 6), loss)
    assert raised.value is mistake and not getattr(mistake, "__notes__", [])


def test_it_can_be_turned_off():
    job = make_job()
    trap_of(job).set = [("forward", 1)]
    with pytest.raises(torch.OutOfMemoryError):
        autoaccum.Accumulator(job, by_hand(job, 12, 4), on_oom="raise").step(jobs.pairs(12, 6))
    with pytest.raises(autoaccum.UsageError, match="on_oom"):
        autoaccum.Accumulator(job, by_hand(job, 12, 4), on_oom="retry")


class RunsOutInStep(torch.optim.SGD):
    def step(self, closure=None):
        super().step(closure)
        raise torch.OutOfMemoryError(TEXT)


def test_once_the_optimizer_has_begun_nothing_is_run_again():
    model = network()
    job = autoaccum.Job(model, RunsOutInStep(model.parameters(), lr=0.1), noisy_loss, ())
    with pytest.raises(torch.OutOfMemoryError) as raised:
        autoaccum.Accumulator(job, by_hand(job, 12, 4)).step(jobs.pairs(12, 6))
    assert any("in the optimizer's step: weights may have changed" in note for note in raised.value.__notes__)
    assert trap_of(job).forwards == 3


class RunsOutOnceAfterUnscaling(torch.amp.GradScaler):
    ran_out = False

    def unscale_(self, optimizer):
        super().unscale_(optimizer)
        if not self.ran_out:
            self.ran_out = True
            raise torch.OutOfMemoryError(TEXT)


def test_running_out_after_unscaling_leaves_no_mark_in_the_scaler():
    """Its `load_state_dict` would leave "unscale_() has already been called"."""
    ended = []
    for scaler in (RunsOutOnceAfterUnscaling("cpu", init_scale=256.0), torch.amp.GradScaler("cpu", init_scale=256.0)):
        job = make_job(scaler=scaler, max_grad_norm=1.0)
        seeded()
        rescued = isinstance(scaler, RunsOutOnceAfterUnscaling)
        result = autoaccum.Accumulator(job, by_hand(job, 12, 4 if rescued else 3)).step(jobs.pairs(12, 6))
        assert (result.rescued is not None) == rescued and (not rescued or result.rescued.phase == "clip")
        ended.append(job)
    assert same_training(*ended)


class Counting(nn.Module):
    """State of every kind that a forward may change: small and large buffers, in place, through `.data`, or replaced."""

    def __init__(self):
        super().__init__()
        self.register_buffer("small", torch.zeros(3))
        self.register_buffer("queue", torch.zeros(600_000))
        self.register_buffer("codebook", torch.zeros(600_000))
        self.register_buffer("table", torch.arange(600_000.0), persistent=False)
        self.register_buffer("replaced", torch.zeros(2))

    def forward(self, inputs):
        with torch.no_grad():
            self.small += len(inputs)
            self.queue[: len(inputs)] += 1
            self.codebook.data.add_(1)  # changes without its version being counted
        self.replaced = self.replaced + 1
        return inputs


def test_buffers_of_every_kind_and_what_is_kept_come_back():
    def make():
        model = nn.Sequential(Counting(), *network())
        kept = nn.Linear(2, 2)
        nn.init.ones_(kept.weight)
        generator = torch.Generator().manual_seed(5)

        def loss(model, batch):
            with torch.no_grad():
                kept.weight.mul_(1.01)
            return noisy_loss(model, (batch[0] + torch.randn(batch[0].shape, generator=generator), batch[1]))

        return autoaccum.Job(model, torch.optim.Adam(model.parameters()), loss, (), keep=[kept, generator]), kept

    torch.manual_seed(9)
    data = [jobs.pairs(24, 6) for _ in range(6)]
    (job, kept), (straight, theirs) = make(), make()
    results = run(job, by_hand(job, 24, 8), data, {0: [("forward", 1)], 4: [("backward", 2)]})
    seeded()
    for batch, ours in zip(data, results):
        autoaccum.Accumulator(straight, by_hand(straight, 24, math.ceil(24 / ours.micro_batches)), on_oom="raise").step(batch)
    assert same_training(job, straight) and torch.equal(kept.weight, theirs.weight)
    a, b = dict(job.model.named_buffers()), dict(straight.model.named_buffers())
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("changes", [False, True])
def test_where_the_host_has_no_memory_for_copies_only_a_window_that_changed_a_large_buffer_ends(monkeypatch, changes):
    """Quantised weights never change; a queue does."""

    class Holding(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("packed", torch.zeros(600_000, dtype=torch.int32))

        def forward(self, inputs):
            if changes:
                self.packed.data[0] += 1
            return inputs

    torch.manual_seed(9)
    model = nn.Sequential(Holding(), *network())
    job = autoaccum.Job(model, torch.optim.Adam(model.parameters()), noisy_loss, ())
    host = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=host.total, available=MIB, percent=99.0))
    data, traps = [jobs.pairs(24, 6) for _ in range(3)], {1: [("backward", 1)]}
    if changes:
        with pytest.raises(DeviceError, match=r"a buffer of 2 MiB, which had no copy .*load your last checkpoint"):
            run(job, by_hand(job, 24, 8), data, traps)
    else:
        assert [each.rescued is not None for each in run(job, by_hand(job, 24, 8), data, traps)] == [False, True, False]


def test_of_two_jobs_the_second_is_rescued_alone():
    """The first one's optimizer has stepped by then."""
    torch.manual_seed(9)
    batch = jobs.pairs(24, 6)

    def made():
        return [make_job(), make_job()]

    both = made()
    trap_of(both[1]).set = [("backward", 1)]
    seeded()
    first, second = autoaccum.Accumulator(both, by_hand(both, 24, 8)).step(batch)
    assert first.rescued is None and first.micro_batches == 3 and second.rescued is not None and second.micro_batches == 4
    straight = made()
    seeded()
    autoaccum.Accumulator(straight[0], by_hand(straight[0], 24, 8)).step(batch)
    autoaccum.Accumulator(straight[1], by_hand(straight[1], 24, 6)).step(batch)
    assert same_training(both[0], straight[0]) and same_training(both[1], straight[1])


def test_nothing_of_the_failed_window_lives_when_it_runs_again():
    """Activations, and what the exception's frames held."""
    job = make_job()
    alive, seen = [], []

    def loss(model, batch):
        if not trap_of(job).set:
            gc.collect()
            seen.append(sum(each() is not None for each in alive))
        held_by_the_frame = torch.ones(3)
        alive.append(weakref.ref(held_by_the_frame))
        hidden = model(batch[0])
        alive.append(weakref.ref(hidden))
        return nn.functional.mse_loss(hidden, batch[1])

    trap_of(job).set = [("backward", 1)]
    loop = autoaccum.Accumulator(job, by_hand(job, 12, 4))
    assert loop.step(jobs.pairs(12, 6), loss).rescued is not None
    assert seen[0] == 0


def test_an_error_that_the_caller_is_handling_stays_whole():
    job = make_job()
    trap_of(job).set = [("forward", 1)]
    loop = autoaccum.Accumulator(job, by_hand(job, 12, 4))
    try:
        raise ValueError("before")
    except ValueError as before:
        assert loop.step(jobs.pairs(12, 6)).rescued is not None
        assert before.__traceback__ is not None


def test_a_sample_left_alone_under_batch_norm_is_explained():
    job = make_job()
    loop = autoaccum.Accumulator(job, by_hand(job, 4, 2))
    loop.step(jobs.pairs(4, 6))
    with pytest.raises(ValueError, match="more than 1 value per channel") as raised:
        loop.step(jobs.pairs(3, 6))
    assert any("drop_last=True" in note and "3 samples" in note for note in raised.value.__notes__)


class Graph:
    def __init__(self, samples):
        self.inputs, self.targets = jobs.pairs(samples, 6)


def test_micro_batches_that_cannot_be_cut_are_not_rescued_and_it_says_so():
    job = make_job()
    trap_of(job).set = [("forward", 1)]
    loop = autoaccum.Accumulator(job, by_hand(job, 12, 4))
    with pytest.raises(torch.OutOfMemoryError) as raised:
        loop.step_micro(
            [Graph(4) for _ in range(3)],
            lambda model, graph: nn.functional.mse_loss(model(graph.inputs), graph.targets),
            samples=lambda graph: len(graph.inputs),
        )
    assert any("cannot be cut smaller" in note for note in raised.value.__notes__)


@pytest.mark.slow
def test_a_real_out_of_memory_in_mid_epoch_is_rescued_and_memory_is_back_to_what_it_was():
    """40 samples take 80 MiB; the limit that comes in the middle of the epoch leaves room for 50."""
    job = jobs.hungry(mib=2)
    data = [torch.zeros(120, 1) for _ in range(8)]
    plan = autoaccum.tune(job, target_batch=120, max_micro_batch=40)
    loop, cpu = autoaccum.Accumulator(job, plan), Cpu()
    results = [loop.step(batch) for batch in data[:4]]
    before = cpu.held_bytes()
    with cpu.capped(before + 105 * MIB):
        results += [loop.step(batch) for batch in data[4:]]
    rescued = [each.rescued is not None for each in results]
    assert not any(rescued[:4]) and rescued[4] and not rescued[-1]  # what the C library keeps may cost one more on the way
    assert results[4].rescued.kept_bytes < 8 * MIB
    counts = [each.micro_batches for each in results[4:]]
    assert counts[0] > 3 and counts == sorted(counts)
    assert cpu.held_bytes() < before + 8 * MIB


def test_500_windows_leave_nothing_behind():
    """After 50 windows of warm-up neither live tensors nor resident bytes grow."""
    job = make_job()
    loop, cpu = autoaccum.Accumulator(job, by_hand(job, 24, 8)), Cpu()
    batch = jobs.pairs(24, 6)

    def live():
        gc.collect()
        return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())

    for number in range(550):
        if number == 50:
            tensors, resident = live(), cpu.held_bytes()
        trap_of(job).forwards = 0
        trap_of(job).set = [("backward", 2)] if number == 100 else []
        loop.step(batch)
    assert live() == tensors
    assert cpu.held_bytes() < resident * 1.01


def test_the_line_tells_of_memory_that_did_not_come_back():
    assert "40 MiB did not come back" in str(Rescued("forward", 0, (8, 8), (6, 5, 5), 1, 40 * MIB))


class Remembering(nn.Module):
    """Buffers that come late, are given other memory, or cannot be written in place."""

    def __init__(self):
        super().__init__()
        self.register_buffer("late", None)
        self.register_buffer("moved", torch.zeros(3))
        self.register_buffer("expanded", torch.zeros(1).expand(4))
        self.register_buffer("sparse", torch.eye(3).to_sparse())
        with torch.inference_mode():
            self.register_buffer("frozen", torch.ones(2))

    def forward(self, inputs):
        with torch.no_grad():
            self.late = torch.zeros(2) if self.late is None else self.late + 1
            self.moved.data = self.moved.data + 1
            self.expanded.untyped_storage().copy_((self.expanded[:1] + 1).untyped_storage())
            if not hasattr(self, "added"):
                self.register_buffer("added", torch.zeros(1))
            self.added += 1
        return inputs


class Average:
    """Kept, and neither a module nor a tensor."""

    def __init__(self):
        self.shadow, self.steps = {"weight": torch.zeros(2)}, [0]
        self.dice, self.numbers = random.Random(4), np.random.default_rng(4)


def test_late_moved_and_odd_buffers_and_objects_that_are_kept_come_back_too():
    def make():
        model, kept = nn.Sequential(Remembering(), *network()), Average()

        def loss(model, batch):
            kept.shadow["weight"] += 1
            kept.steps.append(kept.dice.random())
            return noisy_loss(model, (batch[0] + kept.numbers.random(), batch[1]))

        return autoaccum.Job(model, torch.optim.Adam(model.parameters()), loss, (), keep=[kept]), kept

    torch.manual_seed(9)
    data = [jobs.pairs(24, 6) for _ in range(6)]
    (job, kept), (straight, theirs) = make(), make()
    results = run(job, by_hand(job, 24, 8), data, {0: [("forward", 1)], 2: [("backward", 0)], 5: [("backward", 2)]})
    seeded()
    for batch, ours in zip(data, results):
        autoaccum.Accumulator(straight, by_hand(straight, 24, math.ceil(24 / ours.micro_batches)), on_oom="raise").step(batch)
    a, b = dict(job.model.named_buffers()), dict(straight.model.named_buffers())
    assert a.keys() == b.keys() and all(torch.equal(a[name].to_dense(), b[name].to_dense()) for name in a)
    assert torch.equal(kept.shadow["weight"], theirs.shadow["weight"]) and kept.steps == theirs.steps
    assert kept.dice.getstate() == theirs.dice.getstate() and kept.numbers.random() == theirs.numbers.random()


def test_running_out_before_the_first_forward_is_rescued_too():
    """In the second window, after a step: counting, joining or copying the first micro-batch takes memory as well."""
    fails = [False]

    def count(batch):
        if fails[0]:
            fails[0] = False
            raise torch.OutOfMemoryError(TEXT)
        return len(batch[0])

    job = make_job(count=count)
    loop = autoaccum.Accumulator(job, by_hand(job, 12, 4))
    loop.step(jobs.pairs(12, 6))
    fails[0] = True
    assert loop.step(jobs.pairs(12, 6)).rescued.phase == "forward"


def test_a_mistake_while_the_caller_handles_an_out_of_memory_is_no_out_of_memory():
    job = make_job()
    loop = autoaccum.Accumulator(job, by_hand(job, 12, 4))
    tried = []

    def loss(model, batch):
        tried.append(len(batch[0]))
        raise ValueError("a mistake of the user's")

    with pytest.raises(ValueError, match="a mistake"):
        try:
            raise torch.OutOfMemoryError(TEXT)
        except torch.OutOfMemoryError:
            loop.step(jobs.pairs(12, 6), loss)
    assert tried == [4] and loop.micro_batch == 4


def test_a_mistake_after_unscaling_leaves_no_mark_in_the_scaler():
    class Fails(torch.optim.SGD):
        fails = True

        def step(self, closure=None):
            if self.fails:
                raise KeyboardInterrupt
            return super().step(closure)

    model = network()
    job = autoaccum.Job(model, Fails(model.parameters(), lr=0.1), noisy_loss, (), scaler=torch.amp.GradScaler("cpu", init_scale=16.0), max_grad_norm=1.0)
    loop = autoaccum.Accumulator(job, by_hand(job, 12, 4))
    with pytest.raises(KeyboardInterrupt):
        loop.step(jobs.pairs(12, 6))
    job.optimizer.fails = False
    assert loop.step(jobs.pairs(12, 6)).samples == 12


def test_a_window_that_cannot_be_rescued_leaves_the_size_as_it_was():
    job = make_job()
    loop = autoaccum.Accumulator(job, by_hand(job, 12, 4))
    trap_of(job).set = [("forward", 0)] * 20
    with pytest.raises(torch.OutOfMemoryError):
        loop.step(jobs.pairs(12, 6))
    trap_of(job).set = []
    assert loop.micro_batch == 4 and loop.step(jobs.pairs(12, 6)).micro_batches == 3


def test_growing_back_waits_longer_after_each_time_that_it_was_too_much():
    job = make_job()
    loop = autoaccum.Accumulator(job, by_hand(job, 12, 4), grow_after=2)

    def loss(model, batch):
        if len(batch[0]) > 3:
            raise torch.OutOfMemoryError(TEXT)
        return noisy_loss(model, batch)

    rescued = [number for number in range(20) if loop.step(jobs.pairs(12, 6), loss).rescued]
    assert rescued == [0, 3, 8, 17]  # after 2, 4 and 8 windows without trouble


def test_two_jobs_grow_back_after_as_many_windows_as_one():
    steps = []
    for number in (1, 2):
        several = [make_job() for _ in range(number)]
        loop = autoaccum.Accumulator(several, by_hand(several, 12, 4), grow_after=4)
        trap_of(several[0]).set = [("forward", 0)]
        results = [loop.step(jobs.pairs(12, 6)) for _ in range(8)]
        steps.append([(each if number == 1 else each[0]).micro_batches for each in results])
    assert steps[0] == steps[1]


def test_raising_says_where_it_ran_out():
    job = make_job()
    trap_of(job).set = [("backward", 1)]
    with pytest.raises(torch.OutOfMemoryError) as raised:
        autoaccum.Accumulator(job, by_hand(job, 12, 4), on_oom="raise").step(jobs.pairs(12, 6))
    assert raised.value.__notes__ == ["autoaccum: ran out of memory in backward of micro-batch 2, of at most 4 samples"]


def lbfgs_job():
    model = network()
    return autoaccum.Job(model, torch.optim.LBFGS(model.parameters(), max_iter=4), jobs.mse, ())


def test_with_a_closure_the_first_evaluation_is_rescued_and_a_later_one_raises():
    batch = jobs.pairs(12, 6)
    job = lbfgs_job()
    trap_of(job).set = [("backward", 1)]
    assert autoaccum.Accumulator(job, by_hand(job, 12, 4)).step(batch).rescued.after == (3, 3, 3, 3)
    job = lbfgs_job()
    trap_of(job).set = [("forward", 3)]  # the first of the second evaluation
    with pytest.raises(torch.OutOfMemoryError) as raised:
        autoaccum.Accumulator(job, by_hand(job, 12, 4)).step(batch)
    assert any("in the optimizer's step: weights may have changed" in note for note in raised.value.__notes__)


def test_corrected_running_statistics_are_not_moved_by_what_failed():
    torch.manual_seed(9)
    batch = jobs.pairs(24, 6)
    job, straight = make_job(), make_job()
    run(job, by_hand(job, 24, 8), [batch], {0: [("backward", 2)]}, correct_running_stats=True)
    seeded()
    autoaccum.Accumulator(straight, by_hand(straight, 24, 6), correct_running_stats=True).step(batch)
    assert same_training(job, straight) and job.model[1].num_batches_tracked == 1


def test_a_trainer_that_keeps_itself_may_hold_the_loop():
    class Trainer:
        def __init__(self):
            self.seen = []
            model = network()
            self.job = autoaccum.Job(model, torch.optim.Adam(model.parameters()), self.loss, (), keep=[self])
            self.loop = autoaccum.Accumulator(self.job, by_hand(self.job, 12, 4))

        def loss(self, model, batch):
            self.seen.append(len(batch[0]))
            return noisy_loss(model, batch)

    trainer = Trainer()
    trap_of(trainer.job).set = [("forward", 1)]
    assert trainer.loop.step(jobs.pairs(12, 6)).rescued.after == (3, 3, 3, 3)
    assert trainer.loop.micro_batch == 3 and trainer.seen == [3] * 4  # what the failed window had noted is gone


def test_what_no_optimizer_of_the_job_holds_can_be_stepped_by_its_owner():
    model = network()
    other = torch.optim.SGD(model[0].parameters(), lr=0.1)
    job = autoaccum.Job(model, torch.optim.SGD(model[5].parameters(), lr=0.1), noisy_loss, ())
    before = model[0].weight.clone()
    autoaccum.Accumulator(job, by_hand(job, 12, 4)).step(jobs.pairs(12, 6))
    other.step()
    assert not torch.equal(before, model[0].weight)


def test_batches_that_cannot_be_cut_run_out_once():
    job = make_job()
    tried = []

    def loss(model, graph):
        tried.append(graph)
        raise torch.OutOfMemoryError(TEXT)

    loop = autoaccum.Accumulator(job, by_hand(job, 12, 4))
    with pytest.raises(torch.OutOfMemoryError):
        loop.step_micro([Graph(2) for _ in range(6)], loss, samples=lambda graph: len(graph.inputs))
    assert len(tried) == 1 and loop.micro_batch == 4


def split_job(fails):
    """A job whose own function cuts batches, and fails as it is told."""
    job = make_job()

    def split(batch, sizes):
        fails(max(sizes))
        return list(zip(*(field.split(list(sizes)) for field in batch)))

    return replace(job, split=split)


def test_a_split_that_runs_out_of_memory_is_rescued():
    def fails(largest):
        if largest > 2:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory")

    job = split_job(fails)
    result = autoaccum.Accumulator(job, by_hand(job, 12, 6)).step(jobs.pairs(12, 6))
    assert result.rescued.phase == "split" and max(result.rescued.after) <= 2 and result.samples == 12


def test_a_split_that_fails_for_another_reason_says_so():
    def fails(largest):
        raise ValueError("no such field")

    job = split_job(fails)
    with pytest.raises(ValueError, match="no such field") as raised:
        autoaccum.Accumulator(job, by_hand(job, 12, 6)).step(jobs.pairs(12, 6))
    assert "raised in split=, before the window's first micro-batch: no weight was changed" in raised.value.__notes__[0]
