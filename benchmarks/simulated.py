"""Devices of known truth: what a window takes is arithmetic, and going over the budget raises torch's own out-of-memory.

A step takes weights + gradients (those of an earlier micro-batch, while they are there) + the optimizer's state (once it has
stepped) + activations of the n samples; `SCENARIOS` differ in how activations grow, where it runs out, and what else happens, a
difficulty each.
"""

from __future__ import annotations

import math
import random
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

BUDGET = 16 * 2**30
WEIGHTS = 0.1  # of the budget
TARGETS = (120, 127, 1000)


@dataclass(frozen=True)
class Scenario:
    """maximum: the most samples that fit beside gradients and state, 0 for none. asked: from where a search may go downwards.

    power: activations grow as n to it. optimizer, gradients: their share of the budget. jump: a share more from half the maximum on.
    hump: sizes that take more than there is, although larger ones fit. noise: each batch takes up to that share more.
    long: one batch in 13 takes a quarter more. leak: share of the budget that every out-of-memory leaves behind.
    phase: where it runs out. samples: the dataset's length.
    """

    name: str
    maximum: int
    asked: int = 512
    power: float = 1.0
    optimizer: float = 0.0
    gradients: float = 0.0
    jump: float = 0.0
    hump: range = range(0)
    noise: float = 0.0
    long: bool = False
    leak: float = 0.0
    phase: str = "forward"
    samples: int = 0

    def activations(self, n: int) -> float:
        """Bytes, of a batch that is no longer than usual."""
        if not self.maximum:
            return 2.0 * BUDGET
        worst = (1 + self.noise) * (1.25 if self.long else 1.0)
        room = BUDGET * (1 - WEIGHTS - self.gradients - self.optimizer - self.jump) / worst
        # A little less than the room at the maximum, more than the room one sample above it.
        grown = room * (n / (self.maximum + 0.5)) ** self.power
        grown += BUDGET * self.jump / worst * (2 * n > self.maximum)
        return 2.0 * BUDGET if n in self.hump else grown

    def fits(self, n: int, *, alone: bool = False) -> bool:
        """Whether any window of micro-batches of n runs, in training; alone: the only one of its window."""
        held = BUDGET * (WEIGHTS + self.optimizer + (0 if alone else self.gradients))
        return held + self.activations(n) * (1 + self.noise) * (1.25 if self.long else 1.0) <= BUDGET

    def fewest(self, target: int) -> int:
        """Accumulation steps of the best plan, of whatever micro-batches; 0 where there is none."""
        if self.fits(target, alone=True):
            return 1
        largest = self.largest(target)
        return math.ceil(target / largest) if largest else 0

    def largest(self, most: int, *, alone: bool = False) -> int:
        """The largest size up to `most` that fits; 0 where none does."""
        return max((n for n in range(1, most + 1) if self.fits(n, alone=alone)), default=0)


SCENARIOS = (
    *(Scenario(f"line, {most}", most, asked) for most, asked in ((1, 512), (2, 512), (7, 512), (40, 512), (184, 512), (347, 512), (3001, 4096), (40_000, 65_536))),
    Scenario("none fits", 0),
    Scenario("all fits", 2000, 512),
    Scenario("optimizer state at the second step, 40", 40, optimizer=0.3),
    Scenario("optimizer state at the second step, 500", 500, 1024, optimizer=0.45),
    Scenario("gradients of an earlier micro-batch, 48", 48, gradients=0.15),
    Scenario("gradients of an earlier micro-batch, 600", 600, 1024, gradients=0.15),
    Scenario("n^1.5, 40", 40, power=1.5),
    Scenario("n^1.5, 1200", 1200, 4096, power=1.5),
    Scenario("n^0.7, 300", 300, power=0.7),
    Scenario("a jump of 15 %", 260, jump=0.15),
    Scenario("a hump: 64 to 95 fail", 120, hump=range(64, 96)),
    Scenario("2 % of noise", 150, noise=0.02),
    Scenario("one batch in 13 a quarter longer", 90, long=True),
    Scenario("each out-of-memory leaks 1 %", 200, leak=0.01),
    Scenario("a dataset of 100", 5000, 96, samples=100),
    Scenario("runs out in backward", 77, phase="backward"),
)  # fmt: skip


class Device:
    """One device of a scenario: counts what is run on it, and keeps the time."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.ran: list[int] = []  # the size of every forward
        self.ooms = self.samples = 0
        self.seconds = 0.0
        self.leaked = 0.0
        self.held_by_activations = 0.0
        self.limit = float(BUDGET)
        self.when_taken: Callable[[], object] = lambda: None
        self._random = random.Random(scenario.name)
        self._optimizer: Callable[[], Any] = lambda: None  # weak references
        self._weight: Callable[[], Any] = lambda: None

    def build(self) -> torch.nn.Module:
        """A model of one weight whose forward and backward run on this device."""
        forwarded, backwarded = self.forward, self.backward  # not attributes of the model's: what tries it out may copy those

        class Net(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = torch.nn.Parameter(torch.zeros(1))

            def forward(self, inputs: torch.Tensor, **_: Any) -> torch.Tensor:
                forwarded(len(inputs))
                return _Backward.apply((inputs * self.weight).mean(), backwarded)

        net = Net()
        self._weight = weakref.ref(net.weight)
        return net

    def made(self, optimizer: torch.optim.Optimizer) -> None:
        """Its state counts once it has stepped."""
        self._optimizer = weakref.ref(optimizer)

    def held(self) -> float:
        """Bytes without activations."""
        weight, optimizer = self._weight(), self._optimizer()
        gradients = self.scenario.gradients if weight is not None and weight.grad is not None else 0.0
        state = self.scenario.optimizer if optimizer is not None and optimizer.state else 0.0
        return BUDGET * (WEIGHTS + gradients + state) + self.leaked

    def forward(self, n: int) -> None:
        """Raises `torch.OutOfMemoryError` where the scenario has it there."""
        self.ran.append(n)
        self.samples += n
        more = 1 + self._random.uniform(-1, 1) * self.scenario.noise
        if self.scenario.long and len(self.ran) % 13 == 0:
            more *= 1.25
        self.held_by_activations = self.scenario.activations(n) * more
        if self.scenario.phase == "forward":
            self._take()

    def backward(self) -> None:
        """The same, where it runs out there."""
        self._take()
        self.held_by_activations = 0.0

    def _take(self) -> None:
        usual = self.scenario.maximum or 100  # samples that take a second
        if self.held() + self.held_by_activations > self.limit:
            self.ooms += 1
            self.seconds += 0.3 + min(self.ran[-1], usual) / usual  # it computed until memory was full
            self.leaked += self.scenario.leak * BUDGET
            self.held_by_activations = 0.0
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 16.00 GiB of which 1.00 GiB is free.")
        self.seconds += 0.02 + self.ran[-1] / usual
        self.when_taken()

    def counted(self) -> dict[str, int]:
        """So far: trials (runs of forwards of one size), out-of-memory events, samples."""
        return {"trials": sum(before != after for before, after in zip([0, *self.ran], self.ran)), "ooms": self.ooms, "samples": self.samples}


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, backwarded: Callable[[], None]) -> torch.Tensor:  # type: ignore[override]
        ctx.backwarded = backwarded
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        ctx.backwarded()
        return gradient, None
