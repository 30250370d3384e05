"""Jobs that tests tune: small, and each with one thing about it. Also loaded by path, as users' files are."""

import os
import random
import signal
import sys
import time

import torch
from torch import nn

import autoaccum

MIB = 2**20


def mse(model, batch):
    inputs, targets = batch
    return nn.functional.mse_loss(model(inputs), targets)


def pairs(samples, features=8):
    return torch.randn(samples, features), torch.randn(samples, 1)


class Hungry(nn.Module):
    """Takes `mib` MiB per sample between forward and backward: `exp` keeps its result."""

    def __init__(self, mib=1.0):
        super().__init__()
        self.per_sample = int(mib * MIB / 4)
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, samples):
        return (self.weight * torch.ones(samples, self.per_sample)).exp().mean()


def hungry_loss(model, batch):
    return model(len(batch))


def hungry(mib=1.0):
    model = Hungry(mib)
    return autoaccum.Job(model, torch.optim.SGD(model.parameters(), lr=0.0), hungry_loss, torch.zeros(4, 1))


def small(loss=mse, batch=None, **given):
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    return autoaccum.Job(model, torch.optim.Adam(model.parameters()), loss, pairs(8) if batch is None else batch, **given)


def fails_at_build():
    raise RuntimeError("the checkpoint is corrupt")


def fails_above(most=8):
    def loss(model, batch):
        if len(batch[0]) > most:
            raise ValueError(f"cannot take more than {most} samples")
        return mse(model, batch)

    return small(loss)


def not_scalar():
    return small(lambda model, batch: model(batch[0]))


def needs_no_grad():
    return small(lambda model, batch: mse(model, batch).detach())


def returns_float():
    return small(lambda model, batch: mse(model, batch).item())


def nan_loss():
    return small(lambda model, batch: mse(model, batch) * float("nan"))


def wrong_size():
    return small(batch=lambda samples: pairs(samples + 1))


def hangs_above(most=30):
    def loss(model, batch):
        while len(batch[0]) > most:
            time.sleep(0.05)
        return mse(model, batch)

    return small(loss)


def hangs_with_a_marker(marker):
    """Never ends, and says by a file that it has begun."""

    def loss(model, batch):
        open(marker, "w").close()
        while True:
            time.sleep(0.05)

    return small(loss)


def killed_above(most=30):
    def loss(model, batch):
        if len(batch[0]) > most:
            os.kill(os.getpid(), signal.SIGKILL)
        return mse(model, batch)

    return small(loss)


def forks_and_is_killed_above(most=30):
    """A helper process holds on to every descriptor of the child, long after the child is gone."""

    def loss(model, batch):
        if len(batch[0]) > most:
            if os.fork() == 0:
                time.sleep(100)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)
        return mse(model, batch)

    return small(loss)


def exits(code=3):
    def loss(model, batch):
        os._exit(code)

    return small(loss)


def chatty(mib=3):
    def loss(model, batch):
        print("x" * 1000)
        return mse(model, batch)

    print("y" * mib * MIB)
    sys.stdout.flush()
    os.write(1, b"straight to descriptor 1\n")
    return small(loss)


def not_a_job():
    return 42


def with_arguments(width, depth=2):
    return small()


def reads_argv():
    if sys.argv[1:] != ["--epochs", "3"]:
        raise SystemExit(f"unexpected arguments {sys.argv[1:]}")
    return small()


class Hump(nn.Module):
    """Sizes from 10 to 99 take far more memory than larger ones, as when a library picks another algorithm."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, samples):
        mib = 400 if 10 <= samples < 100 else samples
        return (self.weight * torch.ones(mib, MIB // 4)).exp().mean()


def hump():
    model = Hump()
    return autoaccum.Job(model, torch.optim.SGD(model.parameters(), lr=0.0), hungry_loss, torch.zeros(4, 1))


class Bends(nn.Module):
    """Memory that grows with the square of the micro-batch."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, samples):
        return (self.weight * torch.ones(samples, samples, MIB // 128)).exp().mean()


def bends():
    model = Bends()
    return autoaccum.Job(model, torch.optim.SGD(model.parameters(), lr=0.0), hungry_loss, torch.zeros(4, 1))


class LateState(torch.optim.SGD):
    """Its state, as big as many samples, appears only when it first steps."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if "late" not in self.state[parameter]:
                    self.state[parameter]["late"] = torch.ones(100 * MIB // 4)
        return super().step(closure)


def late_state(mib=1.0):
    model = Hungry(mib)
    return autoaccum.Job(model, LateState(model.parameters(), lr=0.0), hungry_loss, torch.zeros(4, 1))


def random_everywhere():
    """Uses every generator that training may use."""
    import numpy as np

    def loss(model, batch):
        random.random()
        np.random.rand()
        return mse(model, (batch[0] + torch.randn_like(batch[0]), batch[1]))

    return small(loss)


def slow_above(most=30):
    """Above `most` samples, forward takes long; in one process that shows when it has ended."""

    def loss(model, batch):
        until = time.monotonic() + (1.2 if len(batch[0]) > most else 0)
        while time.monotonic() < until:
            pass
        return mse(model, batch)

    return small(loss)


def crawls_above(most=30):
    """Above `most` samples each takes a millisecond more, as where a cache is too small."""

    def loss(model, batch):
        until = time.monotonic() + (0.001 * len(batch[0]) if len(batch[0]) > most else 0)
        while time.monotonic() < until:
            pass
        return mse(model, batch)

    return small(loss)


def sum_loss():
    return small(lambda model, batch: mse(model, batch) * len(batch[0]))


def two_in_turn():
    """A discriminator and a generator, on the same batches."""
    generator, judge = nn.Linear(8, 1), nn.Linear(1, 1)

    def judge_loss(model, batch):
        inputs, real = batch
        return nn.functional.softplus(model(generator(inputs).detach())).mean() + nn.functional.softplus(-model(real)).mean()

    def generator_loss(model, batch):
        return nn.functional.softplus(-judge(model(batch[0]))).mean()

    data = torch.utils.data.TensorDataset(*pairs(60))
    return [
        autoaccum.Job(judge, torch.optim.Adam(judge.parameters()), judge_loss, pairs(8), data=data),
        autoaccum.Job(generator, torch.optim.Adam(generator.parameters()), generator_loss, pairs(8)),
    ]


def normed():
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))
    return autoaccum.Job(model, torch.optim.Adam(model.parameters()), mse, pairs(8))
