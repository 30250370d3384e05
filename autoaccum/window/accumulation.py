"""`run`: one window, from the first forward to the optimizer step.

Trials and training both call it, so a trial measures exactly what training runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from autoaccum.data import LearnedCut, batches, prefetch
from autoaccum.distributed import WindowVote
from autoaccum.errors import JobError
from autoaccum.window import weights
from autoaccum.window.batch_norm import RunningStats
from autoaccum.window.job import Job
from autoaccum.window.optimizer_step import clip, scaled_step, step_with_closure, unmark
from autoaccum.window.result import PhaseCallback, WindowGradients, WindowLoss, WindowResult, silent
from autoaccum.window.weights import SeparateTerms, scale_gradients


def run(
    job: Job,
    loss: Callable[[Any, Any], Any],
    pieces: Iterable[prefetch.Piece],
    *,
    samples: int,
    device: torch.device,
    scaler: Any = None,
    stats: RunningStats | None = None,
    crossing: WindowVote | None = None,
    graphs: bool | None = None,
    on_phase: PhaseCallback = silent,
) -> WindowResult:
    """Runs forward and backward for every micro-batch of a window, then one optimizer step.

    loss: `loss(model, batch)`, as in `Job`.
    pieces: pairs of (micro-batch, number of its samples), on the host. Each micro-batch moves to the device when its turn comes,
        and is dropped after its backward. With a closure or a `count`, the pieces are iterated more than once.
    samples: the number of samples in all pieces together.
    scaler: a GradScaler, or None.
    stats: corrects BatchNorm's running statistics; None leaves them uncorrected.
    crossing: the vote of all ranks on this window; None if there is one rank only.
    graphs: True if CUDA graphs are replayed (see `compiled`); None for what the job's own model and loss do.
    on_phase: called at the start of each phase: forward, backward, sync (gradients are reduced across ranks), clip (everything
        from there to the first optimizer's step), step.
    Raises `JobError` for a loss of the wrong kind. Exceptions from the job's own code pass through unchanged.
    """

    def evaluated(on_phase: PhaseCallback) -> WindowGradients:
        with stats.corrected() if stats is not None else nullcontext():
            return gradients(job, loss, pieces, samples=samples, device=device, scaler=scaler, stats=stats, crossing=crossing, graphs=graphs, on_phase=on_phase)

    try:
        return _stepped(job, evaluated, samples if crossing is None else crossing.samples, scaler, on_phase)
    except BaseException:
        unmark(job, scaler)
        raise


def _stepped(job: Job, evaluated: Callable[[PhaseCallback], WindowGradients], samples: int, scaler: Any, on_phase: PhaseCallback) -> WindowResult:
    window_gradients = evaluated(on_phase)
    grad_norm = clip(job, scaler, window_gradients.micro_batches, on_phase)
    on_phase("step", window_gradients.micro_batches - 1)
    infs: tuple[torch.Tensor, ...] = ()
    if scaler is not None:
        infs = scaled_step(job, scaler)
    elif job.wants_closure or job.takes_closure:
        step_with_closure(job, window_gradients, evaluated, on_phase)
    else:
        for optimizer in job.optimizers:
            optimizer.step()
    for optimizer in job.optimizers:  # as `zero_grad` does, which is slower
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
    return WindowResult(window_gradients.loss, samples, window_gradients.micro_batches, window_gradients.counted, grad_norm, infs, window_gradients.by_term)


def gradients(
    job: Job,
    loss: Callable[[Any, Any], Any],
    pieces: Iterable[prefetch.Piece],
    *,
    samples: int,
    device: torch.device,
    scaler: Any = None,
    stats: RunningStats | None = None,
    crossing: WindowVote | None = None,
    graphs: bool | None = None,
    on_phase: PhaseCallback = silent,
) -> WindowGradients:
    """Runs forward and backward for every micro-batch, and reduces gradients and loss across ranks.

    This is the part of `run` before clipping, with the same arguments.
    """
    if (of_window := getattr(loss, "of_window", None)) is not None:  # a loss that must see the whole window before its first micro-batch
        loss = of_window(job, pieces, samples, device, crossing)
    autocast = torch.autocast(device.type, dtype=job.autocast) if job.autocast is not None else None
    # Counted on the host before the first forward: a weight by count needs the count of the whole window.
    learned = pieces if isinstance(pieces, LearnedCut) else None  # a window that is cut while it runs
    counted = [float(job.count(piece)) if size else 0.0 for piece, size in pieces] if job.count is not None and learned is None else []
    of_samples, of_count = (float(samples), sum(counted)) if crossing is None else crossing.owed(counted)
    if job.count is not None and learned is not None and crossing is None:
        of_count = sum(float(job.count(part)) for part in learned.parts)
    for parameter in _graded(job):  # backward adds to gradients that are left from before
        parameter.grad = None
    graphs = job.replays_graphs if graphs is None else graphs
    zeros = _zero_gradients(job) if graphs else []
    if crossing is not None:
        crossing.gather()
    losses: list[torch.Tensor] = []
    counts: list[torch.Tensor | float] = []
    apart: SeparateTerms | None = None
    backwards = 0
    index, crosses = -1, -1 if crossing is None else crossing.crosses_at(pieces, counted)
    for piece, size in prefetch.feed(pieces, device) if learned is None or learned.ahead else learned:
        index += 1
        on_phase("forward", index)
        if job.count is not None and learned is not None:
            counted.append(float(job.count(piece)) if size else 0.0)
        if stats is not None:
            stats.share(size / samples)
        batch = batches.copied(batches.move(piece, device, non_blocking=True))
        with _ALONE if crossing is None else crossing.around(last=index == crosses):
            if graphs:
                torch.compiler.cudagraph_mark_step_begin()
            if autocast is None:
                returned = loss(job.model, batch)
            else:
                with autocast:
                    returned = loss(job.model, batch)
            if graphs:
                returned = _copied(returned)
            if index == 0 and weights.has_terms(returned):
                apart = SeparateTerms(list(_graded(job)), over_ranks=crossing is not None, graphs=graphs)
            if apart is not None:
                terms = weights.terms(returned, samples=size, of_samples=of_samples, counted_by_user=bool(counted))
                on_phase("backward", index)
                backwards += 1
                apart.backward(terms, scaler)
                losses.append(torch.stack([term.value.detach() for term in terms]).sum())
                del terms
            else:
                value, count = weights.contribution(
                    returned, samples=size, of_samples=of_samples, count=counted[index] if counted else None, of_count=of_count if counted else None
                )
                on_phase("backward", index)
                # What counts nothing contributes nothing; a mean over no items is nan, and so is its gradient.
                if (counted[index] == 0) if counted else weights.is_of_nothing(value, count):
                    if crossing is not None and crossing.in_step:
                        value.nan_to_num().backward()
                    value = torch.zeros_like(value)
                else:
                    backwards += 1
                    (value if scaler is None else scaler.scale(value)).backward()
                losses.append(value.detach() if count is None else weights.without_nothing(value.detach(), count))
                if count is not None:
                    counts.append(count)
                del value
        del returned, batch, piece  # frees graph and activations before the next micro-batch
    for parameter, zero in zeros:
        # A sharded gradient is added to in its local part.
        if (
            parameter.grad is zero and getattr(zero, "_local_tensor", zero)._version == 0
        ):  # backward did not come here, and without a gradient no optimizer steps it
            parameter.grad = None
    if apart is not None and apart.has_one_denominator:
        counts = apart.counts()
    by_term: dict[str, WindowLoss] = {}
    if crossing is not None:
        on_phase("sync", max(index, 0))
        crossing.settle(backwards)
        total, total_count = crossing.totals(WindowLoss(losses, None).sum() if losses else None, counts, device)
        # The reduced gradients are divided by the window's samples, and so is the loss.
        factor = None if total_count is None else weights.late_factor([total_count], crossing.samples)
        window_loss, count_of_all = WindowLoss([total], factor), of_count * crossing.averaged if job.count is not None else total_count
    elif not losses:
        raise JobError("a window of no micro-batches: give at least one")
    elif apart is not None and not apart.has_one_denominator:
        by_term = apart.combine(samples)
        factor, count_of_all = None, None
        window_loss = WindowLoss([term.sum() for term in by_term.values()], None)
    else:
        factor = weights.late_factor(counts, samples) if counts else None
        if learned is not None and counted and any(counted) and sum(counted) != of_count:
            # Where the counts of pieces are not that of the whole, the pieces are what was trained on.
            factor = torch.tensor(of_count / sum(counted), dtype=torch.float64, device=device)
            of_count = sum(counted)
        window_loss, count_of_all = WindowLoss(losses, factor, counts), sum(counts) if counts else of_count if counted else None
    if apart is not None and apart.has_one_denominator:
        by_term = apart.losses(factor)
    if factor is not None:
        # With a scaler the gradients are still scaled; the multiplication keeps that scale.
        scale_gradients([parameter.grad for parameter in _graded(job) if parameter.grad is not None], factor)
    return WindowGradients(window_loss, count_of_all, index + 1, by_term)


def _zero_gradients(job: Job) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Gives each tensor that trains a gradient of zeros, to which backward adds: https://github.com/pytorch/pytorch/issues/169545"""
    zeros = [(parameter, torch.zeros_like(parameter)) for parameter in _graded(job) if parameter.requires_grad]
    for parameter, zero in zeros:
        parameter.grad = zero
    return zeros


def _copied(returned: Any) -> Any:
    """What the loss returned, in memory of its own. The same tensor stays the same: terms of a loss may share their count."""
    copies: dict[int, torch.Tensor] = {}
    return batches.changed(returned, lambda tensor: copies.setdefault(id(tensor), tensor.clone()))


_ALONE: AbstractContextManager[object] = nullcontext()


def _graded(job: Job) -> Iterator[torch.Tensor]:
    """Yields every tensor that backward may give a gradient to."""
    yield from job.idle
    for optimizer in job.optimizers:
        for group in optimizer.param_groups:
            yield from group["params"]
