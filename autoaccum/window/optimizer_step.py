"""The end of a window: unscale, clip, and step the optimizers once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from autoaccum.errors import JobError
from autoaccum.window.job import Job
from autoaccum.window.phases import PhaseCallback, silent
from autoaccum.window.result import WindowGradients


def unmark(job: Job, scaler: Any) -> None:
    """Takes the scaler's marks off this job's optimizers: "unscale_() has already been called" would meet the next window."""
    for optimizer in job.optimizers:
        getattr(scaler, "_per_optimizer_states", {}).pop(id(optimizer), None)


def clip(job: Job, scaler: Any, micro_batches: int, on_phase: PhaseCallback) -> torch.Tensor | None:
    """Unscales and clips once, on the gradient of the whole window; its norm before, if clipping was asked for."""
    on_phase("clip", micro_batches - 1)
    # Several optimizers step together or not at all, so all must have looked for inf before the first steps.
    if scaler is not None and (job.max_grad_norm is not None or len(job.optimizers) > 1):
        for optimizer in _with_gradients(job):
            scaler.unscale_(optimizer)
    # Only what is stepped: a part of the model that is another job's, or nobody's, has no say in the norm.
    if job.max_grad_norm is None:
        return None
    norm = torch.nn.utils.clip_grad_norm_(job.stepped(), job.max_grad_norm)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of sharded gradients, every rank has a part


def scaled_step(job: Job, scaler: Any) -> tuple[torch.Tensor, ...]:
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


def step_with_closure(job: Job, first: WindowGradients, evaluated: Callable[[PhaseCallback], WindowGradients], on_phase: PhaseCallback) -> None:
    """The optimizer's first evaluation is the one that has been made; what it asks for later runs the window again.

    Made before `step`, the first evaluation can still run out of memory harmlessly: inside, weights may have moved.
    """
    made: list[WindowGradients] = [first]

    def closure() -> torch.Tensor:
        if made:
            return made.pop().terms.sum()
        found = evaluated(lambda _, index: on_phase("step", index))
        clip(job, None, found.micro_batches, silent)
        return found.terms.sum()

    (optimizer,) = job.optimizers
    optimizer.step(closure)  # type: ignore[arg-type] # a closure may return a tensor: https://docs.pytorch.org/docs/stable/optim.html


@contextmanager
def only_we_step(on_phase: PhaseCallback) -> Iterator[PhaseCallback]:
    """Refuses an optimizer that steps inside backward, where each micro-batch would be a step of its own.

    say: as in `run`, which gets the one that comes back. Costs 36 microseconds a window, so training has it around
    its first window only.
    """
    now = ""

    def noted(phase: str, index: int) -> None:
        nonlocal now
        now = phase
        on_phase(phase, index)

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
