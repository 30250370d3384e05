"""What compiling saves is used: the search runs in eager mode, and the compiled window tells how much more fits."""

import warnings
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import nn

import autoaccum
from autoaccum.devices.cpu import Cpu
from autoaccum.devices.memory import Memory
from autoaccum.probe import Limits, Request
from autoaccum.probe.rehearsal import rehearsing
from autoaccum.tuner import compiled_sizes
from autoaccum.tuner.one_device import tune_one_device
from autoaccum.tuner.trial_log import TrialLog


class Ledger(Cpu):
    """A device of 4,000 bytes, of which a job says itself how much it takes."""

    def __init__(self):
        super().__init__()
        self.taken = 0

    def memory(self, *, who=True):
        return Memory(4000, 4000, 0, 0, (), "physical")

    def held_bytes(self):
        return 100

    live_bytes = held_bytes

    @contextmanager
    def watch(self):
        self.restart()
        yield self

    def restart(self):
        self.taken = 0

    def take(self, nbytes):
        self.taken = max(self.taken, nbytes)
        if nbytes > 3900:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much")

    def peak_bytes(self):
        return 100 + self.taken

    def lap_bytes(self):
        return 100 + self.taken

    def retries(self):
        return 0

    def capped(self, budget_bytes):
        return nullcontext()


class Taking(nn.Module):
    """Takes 100 bytes a sample in eager mode, and compiled what its compiler says."""

    def __init__(self, ledger):
        super().__init__()
        self.weight, self.ledger = nn.Parameter(torch.ones(1)), ledger

    def forward(self, batch):
        if not torch.compiler.is_compiling():
            self.ledger.take(100 * len(batch))
        return (self.weight * batch).mean()


@pytest.mark.parametrize("bytes_compiled, steps", [(100, 4), (60, 2), (30, 1), (140, 5)])
def test_what_compiling_saves_or_takes_decides_how_much_fits(bytes_compiled, steps):
    """120 samples: in eager mode 39 fit, 30 x 4."""
    torch.compiler.reset()
    ledger = Ledger()

    def compiler(graph, _inputs):
        def run(*given):
            ledger.take(bytes_compiled * max(len(each) for each in given if each.dim()))
            return graph(*given)

        return run

    model = torch.compile(Taking(ledger), backend=compiler, dynamic=False)
    job = autoaccum.Job(model, torch.optim.SGD(model.parameters(), lr=0.0), lambda m, b: m(b), torch.zeros(4))
    with rehearsing(job, ledger, Limits(headroom="0")) as rehearsal:
        rehearsal._copies = False  # the ledger is in this process
        plan = tune_one_device(rehearsal, Request(target_batch=120), TrialLog(None), "job", ())
    assert plan.accumulation_steps == steps
    assert sum(trial.full for trial in plan.trials) <= 3


def test_a_compiler_that_fails_at_a_larger_size_costs_no_plan():
    torch.compiler.reset()
    ledger = Ledger()

    def compiler(graph, inputs):
        def run(*given):
            samples = max(len(each) for each in given if each.dim())
            if samples > 30:
                raise RuntimeError("out of resource: shared memory, Required: 147456")
            ledger.take(30 * samples)
            return graph(*given)

        return run

    model = torch.compile(Taking(ledger), backend=compiler, dynamic=False)
    job = autoaccum.Job(model, torch.optim.SGD(model.parameters(), lr=0.0), lambda m, b: m(b), torch.zeros(4))
    with rehearsing(job, ledger, Limits(headroom="0")) as rehearsal:
        rehearsal._copies = False
        plan = tune_one_device(rehearsal, Request(target_batch=120), TrialLog(None), "job", ())
    assert plan.micro_batches == (30,) * 4
    assert any("larger micro-batches were not tried compiled, because 120 x 1 failed: out of resource" in each for each in plan.warnings), plan.warnings


def test_an_uneven_window_is_said_to_compile_twice():
    torch.compiler.reset()
    model = torch.compile(nn.Linear(2, 1), backend="eager")
    job = autoaccum.Job(model, torch.optim.SGD(model.parameters(), lr=0.0), lambda m, b: m(b).mean(), torch.zeros(4, 2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        autoaccum.tune(job, target_batch=29, max_micro_batch=10)
        autoaccum.tune(job, target_batch=30, max_micro_batch=10)
    said = [str(each.message) for each in caught if "torch.compile compiled" in str(each.message)]
    assert said == ["torch.compile compiled 2 graphs for the micro-batches of 10 and 9: equal=True trains in micro-batches of one size, which compile once"]


class Reading:
    """A reading of a job of `fixed + slope x size` bytes, or less when compiled."""

    base_bytes = full = None

    def __init__(self, size, steps, slope, budget, full=False):
        self.micro_batch, self.accumulation_steps, self.full, self.base_bytes = size, steps, full, 100
        self.peak_bytes = self.activation_bytes = 100 + slope * size
        self.fits = self.peak_bytes <= budget


@pytest.mark.parametrize("slope, answer, most", [(8, 120, 1), (10, 60, 1), (20, 40, 1), (40, 24, 0)])
def test_few_sizes_are_compiled_and_only_those_that_need_fewer_steps(slope, answer, most):
    """120 samples; eager mode takes 40 bytes a sample and the budget has room for 24 of them."""
    budget, tried = 100 + 40 * 24, []

    def confirm(sizes):
        tried.append(sizes[0])
        return Reading(sizes[0], len(sizes), slope, budget, full=True)

    readings = [Reading(size, -(-120 // size), 40, budget) for size in (4, 20, 24)]
    found = compiled_sizes.larger(confirm, confirm((24,) * 5), [20, 24, 30, 40, 60, 120], 120, readings=readings, gradient_bytes=0, budget_bytes=budget)
    assert found.micro_batch == answer and found.fits and len(tried) - 1 == most
