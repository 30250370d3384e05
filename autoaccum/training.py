"""Epochs of a job with the accumulating loop: what `autoaccum train` runs. A demonstration, not a trainer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from autoaccum import batches, devices
from autoaccum.errors import PlanError
from autoaccum.job import Source, load
from autoaccum.loop import Accumulator
from autoaccum.plan import Plan
from autoaccum.units import parse_size


@dataclass(frozen=True)
class Epoch:
    """One epoch: its number from 1, mean loss over its samples, optimizer steps, samples, seconds."""

    number: int
    loss: float
    steps: int
    samples: int
    seconds: float


def train(where: Source, plan: Plan, *, epochs: int, memory_limit: int | str | None = None, say: Callable[[str], None] = print) -> Iterator[Epoch]:
    """Trains the job as planned and yields each epoch when it has ended.

    memory_limit: enforced while training on a CPU or a GPU, as a container would. A job without `data`
    trains on its batch, one step an epoch, and `say` is told. The order of samples depends on nothing but the
    epoch. Raises `PlanError` for data of fewer samples than the plan's share.
    """
    device = devices.get(plan.device.label)
    device.prepare()
    job = load(where, device=plan.device.label)
    loop = Accumulator(job, plan)
    if job.data is None:
        say(f"the job has no data=...: training on its batch alone, {plan.share} samples a step\n")
    elif _is_dataset(job.data) and len(job.data) < plan.share:
        raise PlanError(f"the job's data has {len(job.data)} samples, fewer than the target batch of {plan.share}: choose a smaller one")
    limit = parse_size(memory_limit) if memory_limit is not None else None
    with device.capped(limit) if limit is not None else nullcontext():
        for number in range(1, epochs + 1):
            started, steps, samples, total = time.perf_counter(), 0, 0, torch.zeros((), dtype=torch.float64)
            for batch in _windows(job.data if job.data is not None else [job.batch_of(plan.share)], plan.share, number):
                result = loop.step(batch)
                total += result.loss * result.samples
                steps, samples = steps + 1, samples + result.samples
            device.synchronize()
            yield Epoch(number, float(total) / max(samples, 1), steps, samples, time.perf_counter() - started)


def _windows(data: Any, share: int, epoch: int) -> Iterable[Any]:
    if _is_dataset(data):
        order = torch.Generator().manual_seed(epoch)
        return torch.utils.data.DataLoader(data, batch_size=share, shuffle=True, generator=order)
    return (piece for batch in data for piece in _cut(batch, share))


def _is_dataset(data: Any) -> bool:
    """A map-style dataset, or a tensor of samples; a list is one of batches."""
    return hasattr(data, "__getitem__") and isinstance(data, Sized) and not isinstance(data, (list, tuple))


def _cut(batch: Any, share: int) -> list[Any]:
    samples = batches.count(batch)
    return batches.split(batch, [min(share, samples - start) for start in range(0, samples, share)])
