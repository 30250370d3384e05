"""The built-in job: the network of the classic gradient accumulation tutorial.

1200 samples, 8-16-1, SGD with learning rate 0.01; four epochs at an effective batch of 120.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from autoaccum.window import Job


def make_job(samples: int = 1200, hidden: int = 16, lr: float = 0.01) -> Job:
    """A regression that learns within a few epochs; the same numbers on every machine and run."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(samples, 8, generator=generator)
    targets = inputs @ torch.linspace(-1, 1, 8).unsqueeze(1) + 0.1 * torch.randn(samples, 1, generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, hidden), nn.ReLU(), nn.Linear(hidden, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return Job(model, optimizer, _loss, (inputs[:120], targets[:120]), data=torch.utils.data.TensorDataset(inputs, targets))


def _loss(model: Any, batch: Any) -> torch.Tensor:
    inputs, targets = batch
    return nn.functional.mse_loss(model(inputs), targets)
