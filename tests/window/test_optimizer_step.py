"""Optimizers that evaluate the loss again inside their step: the window runs again, and only then."""

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autoaccum
from tests.plans import by_hand


class Sharp(torch.optim.Optimizer):
    """Sharpness-aware minimisation: ascend, evaluate again, descend from where it was."""

    def __init__(self, params, lr=0.1, rho=0.05):
        super().__init__(params, {"lr": lr, "rho": rho})

    def held(self):
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]

    @torch.no_grad()
    def ascend(self, *, through_data=False, zero=True):
        norm = torch.stack([p.grad.norm() for p in self.held()]).norm()
        for p in self.held():
            step = p.grad * (self.param_groups[0]["rho"] / (norm + 1e-12))
            self.state[p]["moved"] = step
            if through_data:
                p.data += step
            else:
                p.add_(step)
        if zero:
            self.zero_grad()

    @torch.no_grad()
    def descend(self):
        for p in self.held():
            p.sub_(self.state[p]["moved"])
            p.sub_(p.grad, alpha=self.param_groups[0]["lr"])
        self.zero_grad()


class Ascends(Sharp):
    def step(self, closure=None):
        self.ascend()
        with torch.enable_grad():
            closure()
        self.descend()


class EvaluatesFirst(Sharp):
    def step(self, closure):
        for _ in range(2):
            with torch.enable_grad():
                closure()
            if _ == 0:
                self.ascend()
        self.descend()


class ThroughData(Sharp):
    """Moves `.data`, which no version counts, and leaves the gradients to the closure."""

    def step(self, closure=None):
        self.ascend(through_data=True, zero=False)
        with torch.enable_grad():
            closure()
        self.descend()


class ZeroesData(Sharp):
    """Clears gradients through `.data`, and flips weights, which keeps their norm."""

    def step(self, closure=None):
        self.ascend(through_data=True, zero=False)
        for p in self.held():
            p.grad.data.zero_()
        with torch.enable_grad():
            closure()
        self.descend()


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(12, 4, dtype=torch.float64, generator=generator), torch.randn(12, 1, dtype=torch.float64, generator=generator)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def mse(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def flat(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def by_two_passes():
    model = network()
    optimizer = Sharp(model.parameters())
    for _ in range(3):
        mse(model, data()).backward()
        optimizer.ascend()
        mse(model, data()).backward()
        optimizer.descend()
    return flat(model)


@pytest.mark.parametrize("kind", [Ascends, EvaluatesFirst, ThroughData, ZeroesData])
@pytest.mark.parametrize("size", [5, 12])
def test_sharpness_aware_minimisation_is_that_of_the_whole_batch(kind, size):
    model = network()
    job = autoaccum.Job(model, kind(model.parameters()), mse, data())
    loop = autoaccum.Accumulator(job, by_hand(job, 12, size))
    for _ in range(3):
        loop.step(data())
    assert torch.allclose(flat(model), by_two_passes(), rtol=1e-12, atol=1e-14)


def calls_of(make):
    """How often the loss is called in a window of three micro-batches."""
    model, calls = network(), []

    def loss(model, batch):
        calls.append(len(batch[0]))
        return mse(model, batch)

    job = autoaccum.Job(model, make(model.parameters()), loss, data())
    autoaccum.Accumulator(job, by_hand(job, 12, 4)).step(data())
    return calls


class Closes(torch.optim.SGD):
    """As many outside of torch: evaluates a closure first, once, if it is given one."""

    def step(self, closure=None):
        if closure is not None:
            with torch.enable_grad():
                closure()
        return super().step()


@pytest.mark.parametrize("make", [torch.optim.AdamW, Closes, lambda parameters: Closes(parameters, lr=0.1)])
def test_an_optimizer_that_evaluates_at_most_once_costs_no_further_run(make):
    assert calls_of(make) == [4, 4, 4]


def test_each_further_evaluation_is_one_run_of_the_window():
    assert calls_of(Ascends) == [4] * 6
    assert calls_of(lambda parameters: torch.optim.LBFGS(parameters, max_iter=3, line_search_fn=None)) == [4] * 9


def test_another_threads_optimizer_may_step_while_a_window_runs():
    """Something else is trained in the same process; its steps change none of the job's weights."""
    other = nn.Linear(2, 1)
    theirs = torch.optim.SGD(other.parameters(), lr=0.1)

    def step_theirs():
        other(torch.ones(1, 2)).sum().backward()
        theirs.step()

    class Innocent(torch.autograd.Function):
        """Lets another thread step in the middle of backward."""

        @staticmethod
        def forward(context, x):
            return x * 1

        @staticmethod
        def backward(context, grad):
            thread = threading.Thread(target=step_theirs)
            thread.start()
            thread.join()
            return grad

    model = nn.Linear(2, 1)
    job = autoaccum.Job(model, torch.optim.SGD(model.parameters(), lr=0.1), lambda model, batch: Innocent.apply(model(batch)).mean(), torch.ones(4, 2))
    before = other.weight.detach().clone()
    autoaccum.tune(job, target_batch=4)
    autoaccum.Accumulator(job, by_hand(job, 4, 2)).step(torch.ones(4, 2))
    assert not torch.equal(before, other.weight)
