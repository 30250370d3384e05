"""The work that every system is given: one model, its data, a loss, an optimizer, and the effective batch that is wanted.

Nothing of autoaccum is imported here: most of the systems' environments do not have it.
"""

from __future__ import annotations

import hashlib
import pickle
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch
from torch.utils.data import DataLoader, Dataset


class Samples(Dataset):
    """`length` samples, read whole batches at a time; `make(n)` is a batch of n."""

    def __init__(self, length: int, make: Callable[[int], dict[str, torch.Tensor]]) -> None:
        self._length, self.make = length, make

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: each[0] for name, each in self.make(1).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        return self.make(len(indices))


def resident(samples: Samples, most: int, place: str) -> Samples:
    """The samples as slices of one batch of `most` that lies on the device."""
    whole = {name: each.to(place) for name, each in samples.make(most).items()}
    return Samples(len(samples), lambda n: {name: each[:n] if n <= most else each[torch.arange(n, device=place) % most] for name, each in whole.items()})


def as_it_is(batch: Any) -> Any:
    """The collator: what `Samples` reads is a batch already."""
    return batch


class Work:
    """What a system gets, and whom it tells.

    target: the effective batch, in samples; who searches downwards begins there. windows: optimizer steps to train.
    build: makes the model, drawing from torch's generator. A batch is a dict of tensors, and the model returns its loss
    (mean over the samples) for one. limit_bytes: what the process may hold, enforced. device: the simulated one, None for real memory.
    place: "cpu" or "cuda". On a card the samples lie there already, for every system, so that what is compared is not how they are fed;
    `fed` says so. from_host: leave them on the host, to see what feeding takes.
    """

    def __init__(
        self,
        target: int,
        windows: int,
        samples: Samples,
        build: Callable[[], torch.nn.Module],
        *,
        limit_bytes: int = 0,
        device: Any = None,
        place: str = "cpu",
        from_host: bool = False,
    ) -> None:
        self.fed = "from the host" if from_host or place == "cpu" else "on the device"
        samples = samples if self.fed == "from the host" else resident(samples, target, place)
        self.target, self.windows, self.samples, self.limit_bytes, self.device, self.place = target, windows, samples, limit_bytes, device, place
        self._build = build
        self.sizes: tuple[int, ...] = ()
        self.stepped = 0
        self.whole_windows = 0  # of them, those that held the target
        self.seconds: float | None = None
        self.state_unchanged = self.random_unchanged = True
        self.trials: int | None = None  # where a system counts its own
        self.searched: dict[str, int] = {}  # what a simulated device had counted when training made its first step
        self.handed_over = False  # whether it gave an answer for the plain loop to train with
        self.steps_of_windows: list[int] = []  # the micro-batches of each window, where a system tells them
        self.ended: list[float] = []  # when each optimizer step was made
        self.seed()
        self.model = build().to(place)
        self.parameters = tuple(self.model.parameters())
        self._before = digest(self.model), random_digest()
        self._started = self.clock()

    def clock(self) -> float:
        """Seconds; a simulated device has its own."""
        if self.place == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() if self.device is None else self.device.seconds

    def seed(self) -> None:
        """As most scripts begin."""
        torch.manual_seed(0)
        random.seed(0)
        numpy.random.seed(0)

    def build(self) -> torch.nn.Module:
        """The model anew, for systems whose recipe builds it inside."""
        self.model = self._build().to(self.place)
        return self.model

    def optimizer(self) -> torch.optim.Optimizer:
        """Adam, for the model as it is now."""
        made = torch.optim.Adam(self.model.parameters(), lr=1e-5)
        if self.device is not None:
            self.device.made(made)
        return made

    def batch(self, samples: int) -> dict[str, torch.Tensor]:
        """The worst case of so many samples; here all are alike."""
        return {name: each.to(self.place) for name, each in self.samples.__getitems__(range(samples)).items()}

    def as_loaded(self, samples: int) -> dict[str, torch.Tensor]:
        """The same, where a loader leaves it."""
        return self.samples.__getitems__(range(samples))

    def loader(self, micro_batch: int) -> DataLoader[Any]:
        """In order, the rest dropped."""
        return DataLoader(self.samples, batch_size=micro_batch, collate_fn=as_it_is, drop_last=True)

    def found(self, sizes: Sequence[int], *, goes_on: bool = False) -> None:
        """Said when training with these micro-batches a window begins; the last word counts. goes_on: the steps made already
        stay, where the others say that training begins anew."""
        now = self.clock()
        self.sizes = tuple(sizes)
        if not goes_on:
            self.stepped = self.whole_windows = 0
        if not self.stepped:
            self.seconds = now - self._started
            self.state_unchanged, self.random_unchanged = digest(self.model) == self._before[0], random_digest() == self._before[1]
            self._started += self.clock() - now  # what that took is not the system's

    def step_was_made(self, samples: int, micro_batches: int | None = None) -> None:
        """Said after every optimizer step of training, with how many samples it saw, and in how many micro-batches if that changes."""
        if micro_batches is not None:
            self.steps_of_windows.append(micro_batches)
        self.stepped += 1
        if self.device is not None and self.stepped == 1:  # the first since training began, or began anew
            self.searched = self.device.counted()
        self.whole_windows += samples == self.target
        self.ended.append(self.clock())

    def train(self, sizes: Sequence[int], optimizer: torch.optim.Optimizer | None = None) -> None:
        """The plain loop by hand, for systems that only search."""
        self.model.to(self.place)  # Lightning leaves it on the CPU
        self.handed_over = True
        self.found(sizes)
        optimizer = optimizer or self.optimizer()
        for _ in range(self.windows):
            for size in sizes:
                (self.model(**self.batch(size)) * (size / sum(sizes))).backward()
            optimizer.step()
            optimizer.zero_grad()
            self.step_was_made(sum(sizes))


def in_pieces(target: int, micro_batch: int) -> tuple[int, ...]:
    """The window as slices: micro-batches, and what is left."""
    whole, rest = divmod(target, micro_batch)
    return (micro_batch,) * whole + ((rest,) if rest else ())


def accumulated(target: int, micro_batch: int) -> tuple[int, ...]:
    """By the usual recipe, `target // micro_batch` equal steps."""
    micro_batch = min(micro_batch, target)
    return (micro_batch,) * (target // micro_batch)


def digest(model: torch.nn.Module) -> str:
    """Of parameters, buffers, gradients and modes."""
    told = [(name, each.shape, each.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()) for name, each in model.state_dict().items()]
    told += [(name, each.grad is None or not each.grad.any().item()) for name, each in model.named_parameters()]
    told += [(name, each.training) for name, each in model.named_modules()]
    return hashlib.sha256(pickle.dumps(told)).hexdigest()


def random_digest() -> str:
    """Of the generators."""
    told: list[Any] = [random.getstate(), torch.get_rng_state().numpy().tobytes()]
    if torch.cuda.is_available():
        told += [each.numpy().tobytes() for each in torch.cuda.get_rng_state_all()]
    name, keys, *rest = numpy.random.get_state()
    told.append([name, keys.tobytes(), rest])
    return hashlib.sha256(pickle.dumps(told)).hexdigest()
