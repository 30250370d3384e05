"""How right a loop's gradient is: windows of which the whole batch's gradient is known, in double precision.

Nothing of autoaccum is imported here: systems that need an environment of their own run the same cases there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Batch = tuple[torch.Tensor, torch.Tensor]
Loss = Callable[[nn.Module, Batch], Any]


@dataclass(frozen=True)
class Case:
    """An epoch of windows of micro-batches. `whole` is the last window in one piece: its gradient is the right one.

    steps: micro-batches of a full window. loss: a mean, over samples or tokens. summed: the same for who can be told the sum and its count.
    """

    name: str
    make: Callable[[], nn.Module]
    whole: Batch
    windows: Sequence[Sequence[Batch]]
    steps: int
    loss: Loss
    summed: Loss | None = None


def mse(model: nn.Module, batch: Batch) -> torch.Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def token_mean(model: nn.Module, batch: Batch) -> torch.Tensor:
    """A mean over labels, as most language models' `.loss` is; labels of -100 are left out."""
    return nn.functional.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def token_sum(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum, and what it is divided by."""
    loss = nn.functional.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten(), reduction="sum")
    return loss, (batch[1] != -100).sum()


def network(width: int) -> nn.Module:
    torch.manual_seed(0)
    if width == 1:
        return nn.Linear(8, 1)
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))


def speaker() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(30, 16), nn.Linear(16, 30))


def cases() -> Iterator[Case]:
    torch.manual_seed(1)
    batch = torch.randn(120, 8), torch.randn(120, 1)
    yield Case("50 + 50 + 20 samples", lambda: network(16), batch, [_split(batch, (50, 50, 20))], 3, mse)
    ids = torch.randint(0, 30, (22, 12))
    labels = ids.clone()
    for row, length in enumerate(torch.randint(1, 12, (22,)).tolist()):
        labels[row, length:] = -100
    tokens = [_split((ids[start : start + 16], labels[start : start + 16]), 4) for start in (0, 16)]
    yield Case("token mean, 4 x 4", speaker, (ids[:16], labels[:16]), tokens[:1], 4, token_mean, token_sum)
    yield Case("token mean, tail of 4 + 2", speaker, (ids[16:], labels[16:]), tokens, 4, token_mean, token_sum)
    numbers = torch.arange(1.0, 23).unsqueeze(1)
    tail = [_split((numbers[start : start + 16],) * 2, 4) for start in (0, 16)]
    yield Case("22 samples at 4 x 4, the tail", lambda: nn.Linear(1, 1, bias=False), (numbers[16:],) * 2, tail, 4, lambda m, b: m(b[0]).mean())


def _split(batch: Batch, sizes: int | tuple[int, ...]) -> list[Batch]:
    return list(zip(*(each.split(sizes) for each in batch)))


class Recorder(torch.optim.SGD):
    """Changes nothing, and keeps the gradients that it last stepped with."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.0)

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)  # a closure may make the gradients; with a rate of 0 they are what they were
        self.last = [p.grad.clone() for group in self.param_groups for p in group["params"]]
        return loss


def errors(train: Callable[[Case, nn.Module, Recorder], None], only: Callable[[Case], bool] = lambda case: True) -> dict[str, float]:
    """Of every case, the relative error of the last window's gradient. `train` runs the case's windows with the system's own loop."""
    before, found = torch.get_default_dtype(), {}
    torch.set_default_dtype(torch.float64)
    try:
        for case in filter(only, cases()):
            model = case.make()
            optimizer = Recorder(model.parameters())
            train(case, model, optimizer)
            model = case.make()
            right = torch.autograd.grad(case.loss(model, case.whole), list(model.parameters()))
            flat, theirs = (torch.cat([each.flatten() for each in gradients]) for gradients in (right, optimizer.last))
            found[case.name] = float((theirs - flat).norm() / flat.norm())
    finally:
        torch.set_default_dtype(before)
    return found
