"""The epochs that `autoaccum train` runs, with the `Accumulator`. A demonstration, not a trainer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from autoaccum import devices
from autoaccum.data import Window, batches
from autoaccum.errors import PlanError
from autoaccum.loop import Accumulator
from autoaccum.plan import Plan
from autoaccum.units import parse_size
from autoaccum.virtual import VirtualGpu
from autoaccum.window import Job, Source, as_jobs, load


@dataclass(frozen=True)
class Epoch:
    """One epoch: its number, counted from 1, the mean loss over its samples, optimizer steps, samples, and seconds."""

    number: int
    loss: float
    steps: int
    samples: int
    seconds: float


def train(
    where: Source,
    plan: Plan,
    *,
    epochs: int,
    memory_limit: int | str | None = None,
    virtual: str | None = None,
    on_output: Callable[[str], None] = print,
) -> Iterator[Epoch]:
    """Trains the job with its plan and yields each epoch when it has ended.

    memory_limit: enforced during training on a CPU or a GPU, as in a container.
    virtual: a card to which all memory is charged; the job then runs on the CPU.
    on_output: called with a message if the job has no `data`. Such a job trains on its batch, one step an epoch.
    The order of samples depends only on the number of the epoch.
    Raises `PlanError` for data with fewer samples than the plan's share.
    """
    label = plan.device.label if virtual is None else "cpu"
    device = devices.get(label)
    device.prepare()
    jobs = load(where, device=label)
    if virtual is not None:
        jobs = [replace(each, loss=partial(_on_the_card, each.loss)) for each in as_jobs(jobs)]
    loop, job = Accumulator(jobs, plan), as_jobs(jobs)[0]
    if job.data is None:
        on_output(f"the job has no data=...: training on its batch alone, {plan.share} samples a step\n")
    elif _is_dataset(job.data) and len(job.data) < plan.share:
        raise PlanError(f"the job's data has {len(job.data)} samples, fewer than the target batch of {plan.share}: choose a smaller one")
    limit = parse_size(memory_limit) if memory_limit is not None else None
    gpu = None if virtual is None else VirtualGpu(virtual)
    cap: Any = device.capped(limit) if limit is not None else nullcontext()
    with cap, gpu or nullcontext():
        for number in range(1, epochs + 1):
            started, steps, samples, total = time.perf_counter(), 0, 0, 0.0
            windows = iter(plan.windows(_loader(job, plan, number), split=job.split, count=None if plan.target_tokens is None else job.count))
            while (window := _next(windows, gpu)) is not None:
                results = loop.step(window)
                last = results[-1] if isinstance(results, tuple) else results
                total += last.loss * last.samples
                steps, samples = steps + 1, samples + last.samples
            device.synchronize()
            with gpu.paused() if gpu is not None else nullcontext():
                yield Epoch(number, total / max(samples, 1), steps, samples, time.perf_counter() - started)


def _next(windows: Iterator[Window], gpu: VirtualGpu | None) -> Window | None:
    """The next window; None after the last. A virtual card is not charged for the window and the loader's data: they are host memory."""
    if gpu is None:
        return next(windows, None)
    with gpu.paused():
        window = next(windows, None)
        if window is not None:
            gpu.on_host(tensor for batch in window.parts for _, tensor in batches.tensors(batch))
    return window


def _on_the_card(loss: Callable[[Any, Any], Any], model: Any, batch: Any) -> Any:
    """The loss on a copy of the micro-batch, because moving it to a real card would make a copy."""
    return loss(model, batches.changed(batch, torch.clone))


def _loader(job: Job, plan: Plan, epoch: int) -> Iterable[Any]:
    if job.data is None:
        return [job.batch_of(plan.share)]
    if not _is_dataset(job.data):
        return job.data  # type: ignore[no-any-return]
    order = torch.Generator().manual_seed(epoch)
    return torch.utils.data.DataLoader(job.data, batch_size=plan.share, shuffle=True, generator=order)


def _is_dataset(data: Any) -> bool:
    """True for a map-style dataset or a tensor of samples. A list holds batches."""
    return hasattr(data, "__getitem__") and isinstance(data, Sized) and not isinstance(data, (list, tuple))
