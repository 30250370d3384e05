"""One window, in the order things happen.

Trials and training both run this, so that what was rehearsed is what is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from autoaccum import batches, weighting
from autoaccum.job import Job
from autoaccum.reading import Say


@dataclass(frozen=True)
class Ran:
    """One window that ran. Tensors stay on their device; reading them is the caller's choice to wait.

    loss: the window's mean, 0-d. count: what sums were divided by, None for means over samples.
    skipped: True if the scaler found inf or nan in a gradient and the optimizers did not step.
    """

    loss: torch.Tensor
    samples: int
    micro_batches: int
    count: torch.Tensor | float | None
    grad_norm: torch.Tensor | None
    skipped: bool


def _silent(phase: str, index: int) -> None: ...


def run(
    job: Job,
    loss: Callable[[Any, Any], Any],
    pieces: Iterable[tuple[Any, int]],
    *,
    samples: int,
    device: torch.device,
    count: float | None = None,
    scaler: Any = None,
    say: Say = _silent,
) -> Ran:
    """Forward and backward for every piece, then one optimizer step.

    loss: `loss(model, batch)`, as in `Job`. pieces: (micro-batch, its samples), on the host; each is moved when its turn comes and dropped after.
    samples: of the whole window. count: what sums of the whole window are divided by, where it is known
    beforehand. scaler: a GradScaler, or None.
    Raises `JobError` for a loss of the wrong kind; what the job's own code raises comes through.
    """
    autocast = torch.autocast(device.type, dtype=job.autocast) if job.autocast is not None else nullcontext()
    for optimizer in job.optimizers:
        optimizer.zero_grad(set_to_none=True)  # gradients that someone left would be added to the first window
    total: torch.Tensor | None = None
    counts: list[torch.Tensor | float] = []
    ran = 0
    for index, (batch, size) in enumerate(pieces):
        say("forward", index)
        with autocast:
            returned = loss(job.model, batches.move(batch, device, non_blocking=True))
        part = weighting.contribution(returned, samples=size, of_samples=samples, of_count=count)
        say("backward", index)
        (part.term if scaler is None else scaler.scale(part.term)).backward()
        total = part.term.detach() if total is None else total + part.term.detach()
        if part.count is not None:
            counts.append(part.count)
        del returned, part, batch  # no graph and no activation outlives its micro-batch
        ran += 1
    assert total is not None  # a window has at least one micro-batch
    # Gradients of several ranks would cross here: after the last backward, before anything reads them.
    say("step", ran - 1)
    if counts:
        factor = weighting.late_factor(counts, samples)
        total = total * factor
        # One call per dtype and device; under a scaler the gradients are still scaled, which a factor keeps.
        torch._foreach_mul_([p.grad for p in job.trained() if p.grad is not None], factor)
    grad_norm = None
    if job.max_grad_norm is not None:
        if scaler is not None:
            for optimizer in job.optimizers:
                scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(job.trained(), job.max_grad_norm)
    skipped = False
    for optimizer in job.optimizers:
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
    if scaler is not None:
        before = scaler.get_scale()
        scaler.update()
        skipped = scaler.get_scale() < before
    for optimizer in job.optimizers:
        optimizer.zero_grad(set_to_none=True)
    return Ran(total, samples, ran, sum(counts) if counts else None, grad_norm, skipped)
