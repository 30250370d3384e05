"""A loss that draws sizes at random: the worst of several windows is planned, and the spread is told."""

import random

import pytest
import torch
from torch import nn

import autoaccum
from tests import jobs
from tests.jobs import MIB


def scales(model, batch):
    """Multi-scale training: every call draws a size."""
    wide = model(batch)[:, :1] * torch.ones(random.choice([MIB // 8, MIB // 4, MIB // 2]))
    return (wide.exp() * 0).mean() + model(batch).mean()


class Deep(nn.Module):
    """Stochastic depth: layers that keep their output are left out at random."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        wide = self.weight * torch.ones(len(x), MIB // 8)
        for _ in range(int(torch.randint(1, 9, ()))):
            wide = wide.tanh()
        return wide


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["scales", "depth"])
def test_the_worst_of_several_windows_is_planned_and_told(kind):
    torch.manual_seed(0)
    random.seed(0)
    model = nn.Linear(4, 2) if kind == "scales" else Deep()
    loss = scales if kind == "scales" else (lambda model, batch: model(batch).mean())
    job = autoaccum.Job(model, torch.optim.SGD(model.parameters(), lr=0.0), loss, torch.ones(32, 4))
    with pytest.warns(UserWarning, match=r"micro-batches of 32 took between .* draws sizes at random.*largest of [5-9] windows"):
        autoaccum.tune(job, target_batch=96, max_micro_batch=32)


def test_a_long_window_is_run_whole_only_where_sizes_are_drawn():
    """Of 48 micro-batches the first two and the last show what the others do, unless random numbers are drawn on the host."""
    ran = []

    def steady(model, batch):
        ran.append(len(batch))
        return model(batch).mean()

    def drawing(model, batch):
        ran.append(len(batch))
        return scales(model, batch)

    lengths = {}
    for loss in (steady, drawing):
        model = nn.Linear(4, 2)
        ran.clear()
        plan = autoaccum.tune(model, torch.optim.SGD(model.parameters(), lr=0.0), loss, torch.ones(8, 4), target_batch=96, max_micro_batch=2)
        assert plan.micro_batches == (2,) * 48 and plan.samples_per_second > 0
        lengths[loss] = len(ran)
    assert lengths[steady] < 20 and lengths[drawing] > 96


def test_micro_batches_that_take_the_same_are_not_suspected():
    plan = autoaccum.tune(jobs.hungry(mib=1), target_batch=60, max_micro_batch=20)
    assert not any("at random" in warning for warning in plan.warnings)
