"""One window, in the order things happen.

Trials and training both run this, so that what was rehearsed is what is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from autoaccum import batches, feeding, weighting
from autoaccum.errors import JobError
from autoaccum.job import Job
from autoaccum.reading import Say
from autoaccum.running_stats import RunningStats
from autoaccum.sync import Crossing


class Terms:
    """The loss of a window, left on the device as what each micro-batch contributed: adding up waits until somebody asks."""

    def __init__(self, terms: list[torch.Tensor], factor: torch.Tensor | None) -> None:
        self._terms, self._factor = terms, factor
        if len(terms) > 16:  # not to hold on to as many tensors for every result that somebody keeps
            self._terms = [self.sum()]
            self._factor = None

    def sum(self) -> torch.Tensor:
        """Their sum, 0-d. In single precision at least."""
        wide = [term.float() for term in self._terms] if self._terms[0].dtype in _HALVES else self._terms
        total = torch.stack(wide).sum()
        return total if self._factor is None else total * self._factor


class Ran(NamedTuple):
    """One window that ran. Tensors stay on their device; reading them is the caller's choice to wait.

    terms: the loss. counted: what sums were divided by, None for means over samples.
    infs: of several optimizers and devices, more than 0 where the scaler found inf or nan in a gradient, and no
    optimizer stepped then; empty without a scaler.
    """

    terms: Terms
    samples: int
    micro_batches: int
    counted: torch.Tensor | float | None
    grad_norm: torch.Tensor | None
    infs: tuple[torch.Tensor, ...]

    @property
    def loss(self) -> torch.Tensor:
        """The window's mean, 0-d, on its device."""
        return self.terms.sum()

    @property
    def skipped(self) -> bool:
        """True if the optimizers did not step, because of inf or nan in a gradient. Waits for the device."""
        return any(bool(inf > 0) for inf in self.infs)


_HALVES = (torch.float16, torch.bfloat16)


def _silent(phase: str, index: int) -> None: ...


def run(
    job: Job,
    loss: Callable[[Any, Any], Any],
    pieces: Iterable[feeding.Piece],
    *,
    samples: int,
    device: torch.device,
    scaler: Any = None,
    stats: RunningStats | None = None,
    crossing: Crossing | None = None,
    say: Say = _silent,
) -> Ran:
    """Forward and backward for every piece, then one optimizer step.

    loss: `loss(model, batch)`, as in `Job`. pieces: (micro-batch, its samples), on the host; each is moved when
    its turn comes and dropped after. With a closure or a `count`, they are gone through more than once.
    samples: of the pieces together.
    scaler: a GradScaler, or None. stats: corrects BatchNorm's running statistics, where that was asked for.
    crossing: where the window has other ranks, too. say: told of each phase: forward, backward, sync (gradients cross), clip (all between
    that and the first optimizer's step), step.
    Raises `JobError` for a loss of the wrong kind; what the job's own code raises comes through.
    """

    def evaluated(say: Say) -> Gradients:
        with stats.corrected() if stats is not None else nullcontext():
            return gradients(job, loss, pieces, samples=samples, device=device, scaler=scaler, stats=stats, crossing=crossing, say=say)

    try:
        return _stepped(job, evaluated, samples if crossing is None else crossing.samples, scaler, say)
    except BaseException:
        unmark(job, scaler)
        raise


def _stepped(job: Job, evaluated: Callable[[Say], Gradients], samples: int, scaler: Any, say: Say) -> Ran:
    made = evaluated(say)
    grad_norm = _clipped(job, scaler, made.micro_batches, say)
    say("step", made.micro_batches - 1)
    infs: tuple[torch.Tensor, ...] = ()
    if scaler is not None:
        infs = _scaled_step(job, scaler)
    elif job.wants_closure:
        _step_with_closure(job, made, evaluated, say)
    else:
        for optimizer in job.optimizers:
            optimizer.step()
    for optimizer in job.optimizers:
        optimizer.zero_grad(set_to_none=True)
    return Ran(made.terms, samples, made.micro_batches, made.counted, grad_norm, infs)


class Gradients(NamedTuple):
    """The window's gradient is in `.grad`; this is what is known of it."""

    terms: Terms
    counted: torch.Tensor | float | None
    micro_batches: int


def gradients(
    job: Job,
    loss: Callable[[Any, Any], Any],
    pieces: Iterable[feeding.Piece],
    *,
    samples: int,
    device: torch.device,
    scaler: Any = None,
    stats: RunningStats | None = None,
    crossing: Crossing | None = None,
    say: Say = _silent,
) -> Gradients:
    """The first part of `run`, with the same arguments: forward and backward for every piece, and what crosses ranks."""
    autocast = torch.autocast(device.type, dtype=job.autocast) if job.autocast is not None else None
    # On the host, beforehand: weights by count need the whole window's.
    counted = [float(job.count(piece)) if size else 0.0 for piece, size in pieces] if job.count is not None else []
    of_samples, of_count = (float(samples), sum(counted)) if crossing is None else crossing.owed(counted)
    for parameter in _graded(job):  # gradients that someone left would be added; `zero_grad` itself costs more
        parameter.grad = None
    if crossing is not None:
        crossing.gather()
    terms: list[torch.Tensor] = []
    counts: list[torch.Tensor | float] = []
    backwards = 0
    index, crosses = -1, -1 if crossing is None else crossing.crosses_at(pieces, counted)
    for piece, size in feeding.feed(pieces, device):
        index += 1
        say("forward", index)
        if stats is not None:
            stats.share(size / samples)
        batch = batches.move(piece, device, non_blocking=True)
        with _ALONE if crossing is None else crossing.around(last=index == crosses):
            if autocast is None:
                returned = loss(job.model, batch)
            else:
                with autocast:
                    returned = loss(job.model, batch)
            term, count = weighting.contribution(
                returned, samples=size, of_samples=of_samples, count=counted[index] if counted else None, of_count=of_count if counted else None
            )
            say("backward", index)
            if counted and counted[index] == 0:  # owes nothing; a mean over nothing is nan, and so is its gradient
                if crossing is not None and crossing.in_step:
                    term.nan_to_num().backward()
                term = torch.zeros_like(term)
            else:
                backwards += 1
                (term if scaler is None else scaler.scale(term)).backward()
        terms.append(term.detach())
        if count is not None:
            counts.append(count)
        del returned, term, batch, piece  # no graph and no activation outlives its micro-batch
    if crossing is not None:
        say("sync", max(index, 0))
        crossing.settle(backwards)
        total, total_count = crossing.totals(Terms(terms, None).sum() if terms else None, counts, device)
        # What crossed is divided by the window's samples; so is the loss.
        factor = None if total_count is None else weighting.late_factor([total_count], crossing.samples)
        made = Gradients(Terms([total], factor), of_count * crossing.averaged if job.count is not None else total_count, index + 1)
    elif not terms:
        raise JobError("a window of no micro-batches: give at least one")
    else:
        factor = weighting.late_factor(counts, samples) if counts else None
        made = Gradients(Terms(terms, factor), sum(counts) if counts else of_count if counted else None, index + 1)
    if factor is not None:
        # Under a scaler the gradients are still scaled, which a factor keeps.
        _scale([parameter.grad for parameter in _graded(job) if parameter.grad is not None], factor)
    return made


_ALONE: AbstractContextManager[object] = nullcontext()


def unmark(job: Job, scaler: Any) -> None:
    """Takes the scaler's marks off this job's optimizers: "unscale_() has already been called" would meet the next window."""
    for optimizer in job.optimizers:
        getattr(scaler, "_per_optimizer_states", {}).pop(id(optimizer), None)


def _graded(job: Job) -> Iterator[torch.Tensor]:
    """Every tensor that backward may give a gradient."""
    yield from job.idle
    for optimizer in job.optimizers:
        for group in optimizer.param_groups:
            yield from group["params"]


def _scale(grads: list[torch.Tensor], factor: torch.Tensor) -> None:
    """One call per dtype and device, and a factor of that dtype: mixed ones are multiplied one by one."""
    alike: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    for grad in grads:
        own = grad.to_local() if hasattr(grad, "to_local") else grad  # of a sharded one, this rank's part
        alike.setdefault((own.dtype, own.device), []).append(own)
    for (dtype, device), group in alike.items():
        torch._foreach_mul_(group, factor.to(device, dtype))


def _clipped(job: Job, scaler: Any, micro_batches: int, say: Say) -> torch.Tensor | None:
    """Unscales and clips once, on the gradient of the whole window; its norm before, if clipping was asked for."""
    say("clip", micro_batches - 1)
    # Several optimizers step together or not at all, so all must have looked for inf before the first steps.
    if scaler is not None and (job.max_grad_norm is not None or len(job.optimizers) > 1):
        for optimizer in _with_gradients(job):
            scaler.unscale_(optimizer)
    # Only what is stepped: a part of the model that is another job's, or nobody's, has no say in the norm.
    if job.max_grad_norm is None:
        return None
    norm = torch.nn.utils.clip_grad_norm_(job.stepped(), job.max_grad_norm)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of sharded gradients, every rank has a part


def _scaled_step(job: Job, scaler: Any) -> tuple[torch.Tensor, ...]:
    """An inf in any gradient skips the step of every optimizer. Returns the device's marks of what was found."""
    together = len(job.optimizers) == 1 or not any(bool(inf > 0) for optimizer in _with_gradients(job) for inf in _infs(scaler, optimizer))
    stepping = _with_gradients(job)
    for optimizer in stepping:
        if together:
            scaler.step(optimizer)
    infs = tuple(inf for optimizer in stepping for inf in _infs(scaler, optimizer))
    if stepping:
        scaler.update()
    return infs


def _with_gradients(job: Job) -> list[torch.optim.Optimizer]:
    """A scaler knows nothing to do with an optimizer that has none, for instance in a window in which nothing counts."""
    return [each for each in job.optimizers if any(p.grad is not None for group in each.param_groups for p in group["params"])]


def _infs(scaler: Any, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    if not scaler.is_enabled():
        return []
    # No public way to ask without waiting for the device; `get_scale()` before and after waits twice.
    return list(scaler._found_inf_per_device(optimizer).values())


def _step_with_closure(job: Job, first: Gradients, evaluated: Callable[[Say], Gradients], say: Say) -> None:
    """The optimizer's first evaluation is the one that has been made; what it asks for later runs the window again.

    Made before `step`, the first evaluation can still run out of memory harmlessly: inside, weights may have moved.
    """
    made: list[Gradients] = [first]

    def closure() -> torch.Tensor:
        if made:
            return made.pop().terms.sum()
        found = evaluated(lambda _, index: say("step", index))
        _clipped(job, None, found.micro_batches, _silent)
        return found.terms.sum()

    (optimizer,) = job.optimizers
    optimizer.step(closure)  # type: ignore[arg-type] # a closure may return a tensor: https://docs.pytorch.org/docs/stable/optim.html


@contextmanager
def only_we_step(say: Say) -> Iterator[Say]:
    """Refuses an optimizer that steps inside backward, where each micro-batch would be a step of its own.

    say: as in `run`, which gets the one that comes back. Costs 36 microseconds a window, so training has it around
    its first window only.
    """
    now = ""

    def noted(phase: str, index: int) -> None:
        nonlocal now
        now = phase
        say(phase, index)

    def refuse(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if now == "backward":
            raise JobError(
                f"{type(optimizer).__name__} steps in a backward hook, so every micro-batch would change the weights: "
                "gradients cannot be accumulated; step it after the window, or train without accumulation"
            )

    hook = register_optimizer_step_pre_hook(refuse)
    try:
        yield noted
    finally:
        hook.remove()
