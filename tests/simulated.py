"""Jobs to simulate, and a process of its own to do it in: tracing turns torch inside out for good."""

import functools
import json
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import autoaccum
from tests import forked

ROOT = Path(__file__).parent.parent


def in_a_process(code, *arguments, timeout=200):
    """Runs `code`, which finds `tell(value)` and the names of this module, and returns what it told."""
    head = (
        "import json, sys, torch; torch.set_num_threads(1)\n"
        "from tests.simulated import *\n"
        "from autoaccum.virtual import phantom\n"
        "from autoaccum.virtual.empty_weights import without_memory\n"
        "from autoaccum.simulate import kernels, tape\nfrom autoaccum.trace import fake\n"
        "from autoaccum.simulate.allocator import Allocator\n"
        "def tell(value): print('\\ntold:' + json.dumps(value))\n"
    )
    # What was put into torch's tables is gone before its own destructors run.
    tail = "\nimport os\nsys.stdout.flush(); os._exit(0)\n"
    done = forked.run(head + code + tail, *arguments, timeout=timeout)
    told = [line for line in done.stdout.splitlines() if line.startswith("told:")]
    assert told and done.returncode == 0, f"nothing was told (exit code {done.returncode}): {done.stdout[-2000:]}{done.stderr[-3000:]}"
    return json.loads(told[-1].removeprefix("told:"))


def mlp(width=256, **given):
    model = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width), nn.ReLU(), nn.Linear(width, 10))
    batch = (torch.zeros(2, width), torch.zeros(2, dtype=torch.long))
    return autoaccum.Job(model, torch.optim.Adam(model.parameters()), classes, batch, **given)


def classes(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.first, self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)])

    def forward(self, x):
        return F.relu(x + self.norms[1](self.second(F.relu(self.norms[0](self.first(x))))))


def conv(channels=32, **given):
    body = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), Residual(channels), nn.MaxPool2d(2), Residual(channels), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(body, nn.Linear(channels, 10))
    batch = (torch.zeros(2, 3, 32, 32), torch.zeros(2, dtype=torch.long))
    return autoaccum.Job(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), classes, batch, **given)


class Layer(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.again = heads, False
        self.qkv, self.out, self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.one, self.two = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x):
        return checkpoint(self._forward, x, use_reentrant=False) if self.again else self._forward(x)

    def _forward(self, x):
        n, t, w = x.shape
        q, k, v = self.qkv(self.one(x)).view(n, t, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(n, t, w))
        return x + self.down(F.dropout(F.gelu(self.up(self.two(x))), 0.1, self.training))


class Decoder(nn.Module):
    def __init__(self, width=128, layers=3, length=64, words=500):
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
        self.layers, self.head = nn.Sequential(*(Layer(width, 4) for _ in range(layers))), nn.Linear(width, words)

    def forward(self, ids):
        return self.head(self.layers(self.words(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))))


def next_word(model, ids):
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def decoder(again=False, optimizer=torch.optim.AdamW, optimizer_options=None, **given):
    model = Decoder()
    for layer in model.layers:
        layer.again = again
    return autoaccum.Job(model, optimizer(model.parameters(), lr=1e-3, **(optimizer_options or {})), next_word, torch.zeros(2, 65, dtype=torch.long), **given)


def branching():
    """Does other things above eight samples."""
    job = mlp()

    def loss(model, batch):
        hidden = batch[0]
        if len(hidden) > 8:
            hidden = torch.cat([hidden, hidden * 2]).relu()[: len(hidden)]
        return F.cross_entropy(model(hidden), batch[1])

    return autoaccum.Job(job.model, job.optimizer, loss, job.batch)


def pairwise():
    """Every sample beside every other."""
    model = nn.Linear(64, 64)

    def loss(model, batch):
        made = model(batch[0])
        return F.cross_entropy(made @ made.t(), torch.arange(len(made), device=made.device))

    return autoaccum.Job(model, torch.optim.AdamW(model.parameters()), loss, (torch.zeros(2, 64),))


def normed():
    """Refuses a micro-batch of one sample."""
    model = nn.Sequential(nn.Linear(64, 8192), nn.BatchNorm1d(8192), nn.Linear(8192, 2048))
    return autoaccum.Job(model, torch.optim.AdamW(model.parameters()), lambda model, batch: model(batch[0]).mean(), (torch.zeros(8, 64),))


def ragged():
    """A shape that depends on values, which nobody has."""
    job = mlp()

    def loss(model, batch):
        return model(batch[0]).sum() * torch.bincount(batch[1]).sum()

    return autoaccum.Job(job.model, job.optimizer, loss, job.batch)


def elsewhere():
    """A tensor that stays on the host, as no real card would take it either."""
    job = mlp()

    class Holder:
        def __init__(self):
            self.mean = torch.zeros(256)

        def __call__(self, model, batch):
            return F.cross_entropy(model(batch[0] - self.mean), batch[1])

    return autoaccum.Job(job.model, job.optimizer, Holder(), job.batch)


def asking():
    """Reads values from the device, and masks by them."""
    job = mlp()

    def loss(model, batch):
        out = model(batch[0])
        if torch.isnan(out).any() or out.abs().max().item() > 1e30:
            raise RuntimeError("diverged")
        kept = batch[1] != 3
        return F.cross_entropy(out[kept], batch[1][kept])

    return autoaccum.Job(job.model, job.optimizer, loss, job.batch)


def closure_on_a_device(device="cpu"):
    """Built where it is told to be, as jobs that take a device are."""
    model = nn.Linear(8, 4, device=device)
    weights = torch.ones(4, device=device)

    def loss(model, batch):
        return F.cross_entropy(model(batch[0].to(device)), batch[1].to(device), weight=weights)

    return autoaccum.Job(model, torch.optim.SGD(model.parameters(), lr=0.1), loss, (torch.zeros(2, 8), torch.zeros(2, dtype=torch.long)))


def hooked():
    """Steps inside backward, as some optimizers do to hold no gradients."""
    job = mlp()
    for parameter in job.model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: None)
    return job


def sparse():
    model = nn.Sequential(nn.Embedding(1000, 16, sparse=True), nn.Flatten(), nn.Linear(64, 10))
    batch = (torch.zeros(2, 4, dtype=torch.long), torch.zeros(2, dtype=torch.long))
    return autoaccum.Job(model, torch.optim.SGD(model.parameters(), lr=0.1), classes, batch)


def helped(device="cpu"):
    """A loss that is a partial, of a function that calls another, with a configuration around its tensors."""
    model = nn.Linear(8, 4)
    model.device = device
    config = {"device": device, "weights": [torch.ones(4)]}

    def moved(batch):
        return batch[0].to(config["device"]), batch[1].to(device)

    def loss(model, batch, smoothing):
        inputs, targets = moved(batch)
        return F.cross_entropy(model(inputs.to(model.device)), targets, weight=config["weights"][0]) + smoothing.sum()

    return autoaccum.Job(model, torch.optim.SGD(model.parameters(), lr=0.1), functools.partial(loss, smoothing=torch.ones(1)), closure_on_a_device().batch)


def adds_its_own():
    """A backward that adds two tensors out of place, while both live on."""

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            one, other = gradient * 2, gradient * 3
            both = one + other if adds_its_own.plus else one - other
            return both * one

    model = nn.Linear(1024, 1024)
    return autoaccum.Job(model, torch.optim.SGD(model.parameters(), lr=0.1), lambda m, b: Twice.apply(m(b)).mean(), torch.zeros(2, 1024))


adds_its_own.plus = True


def huge():
    """27 GiB of weights and twice that of Adam's state, which nobody here has."""
    model = nn.Sequential(*(nn.Linear(16384, 16384, bias=False) for _ in range(27)))
    return autoaccum.Job(model, torch.optim.Adam(model.parameters()), lambda m, b: m(b).mean(), torch.zeros(2, 16384))
