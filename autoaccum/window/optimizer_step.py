"""The optimizer step at the end of a window: unscale, clip, and step the optimizers once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from autoaccum.errors import JobError
from autoaccum.window.job import Job
from autoaccum.window.result import PhaseCallback, WindowGradients, silent


def unmark(job: Job, scaler: Any) -> None:
    """Removes the scaler's record of this job's optimizers.

    Otherwise the next window raises "unscale_() has already been called".
    """
    for optimizer in job.optimizers:
        getattr(scaler, "_per_optimizer_states", {}).pop(id(optimizer), None)


def clip(job: Job, scaler: Any, micro_batches: int, on_phase: PhaseCallback) -> torch.Tensor | None:
    """Unscales and clips once, on the gradient of the whole window. Returns the norm before clipping, or None without clipping."""
    on_phase("clip", micro_batches - 1)
    # Several optimizers step together or not at all, so all are checked for inf before the first one steps.
    if scaler is not None and (job.max_grad_norm is not None or len(job.optimizers) > 1):
        for optimizer in _with_gradients(job):
            scaler.unscale_(optimizer)
    # Only the tensors that this job steps: parameters of another job, or of no optimizer, must not change the norm.
    if job.max_grad_norm is None:
        return None
    norm = torch.nn.utils.clip_grad_norm_(job.stepped(), job.max_grad_norm)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # with sharded gradients, each rank holds a part of the norm


def scaled_step(job: Job, scaler: Any) -> tuple[torch.Tensor, ...]:
    """Steps every optimizer through the scaler, or none of them if any gradient holds an inf.

    Returns the scaler's found-inf flags, which are tensors on the device.
    """
    may_step = len(job.optimizers) == 1 or not any(bool(inf > 0) for optimizer in _with_gradients(job) for inf in _infs(scaler, optimizer))
    optimizers = _with_gradients(job)
    for optimizer in optimizers:
        if may_step:
            scaler.step(optimizer)
    infs = tuple(inf for optimizer in optimizers for inf in _infs(scaler, optimizer))
    if optimizers:
        scaler.update()
    return infs


def _with_gradients(job: Job) -> list[torch.optim.Optimizer]:
    """The optimizers that have a gradient.

    A scaler cannot step an optimizer without gradients, for instance in a window in which nothing counts.
    """
    return [optimizer for optimizer in job.optimizers if any(p.grad is not None for group in optimizer.param_groups for p in group["params"])]


def _infs(scaler: Any, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    if not scaler.is_enabled():
        return []
    # No public API reads this without waiting for the device; `get_scale()` before and after the step waits twice.
    return list(scaler._found_inf_per_device(optimizer).values())


def step_with_closure(job: Job, first: WindowGradients, evaluated: Callable[[PhaseCallback], WindowGradients], on_phase: PhaseCallback) -> None:
    """Steps an optimizer that may evaluate the loss itself, through a closure.

    A call of the closure returns `first`, which is already computed, while weights and gradients are as `first` left them. Each other
    call runs the window again: SAM moves the weights before it evaluates, LBFGS evaluates several times.
    The first evaluation runs before `step`, where an out-of-memory does no harm: inside `step`, weights may have changed already.
    """
    pending: list[WindowGradients] = [first]
    state = _EvaluationState(job)

    def closure() -> torch.Tensor:
        if pending and state.is_untouched():
            return pending.pop().loss.sum()
        pending.clear()
        window_gradients = evaluated(lambda _, index: on_phase("step", index))
        clip(job, None, window_gradients.micro_batches, silent)
        return window_gradients.loss.sum()

    (optimizer,) = job.optimizers
    # The user's own hooks of `step` may clip gradients or decay weights: what they leave is the state that the first evaluation stands for.
    hook = optimizer.register_step_pre_hook(lambda *_: state.note())
    try:
        optimizer.step(closure)  # type: ignore[arg-type] # a closure may return a tensor: https://docs.pytorch.org/docs/stable/optim.html
    finally:
        hook.remove()


class _EvaluationState:
    """The weights and gradients after an evaluation, to find out whether something has changed them since.

    Versions count in-place changes, but not those through `.data`. So sums and norms are compared too, for optimizers that are not of torch.
    """

    def __init__(self, job: Job) -> None:
        self._tensors = job.stepped()
        has_values = not any(isinstance(tensor, FakeTensor) for tensor in self._tensors)
        self._by_figures = job.wants_closure != "LBFGS" and has_values
        self.note()

    def note(self) -> None:
        """Takes the state of now for the state after the evaluation."""
        self._figures = self._figures_now() if self._by_figures else None
        self._marks = self._marks_now()

    def is_untouched(self) -> bool:
        """True if no weight and no gradient was changed or replaced."""
        if self._marks_now() != self._marks:
            return False
        return self._figures is None or all(torch.equal(now, then) for now, then in zip(self._figures_now(), self._figures))

    def _marks_now(self) -> list[tuple[int, int, int, int]]:
        return [
            (tensor._version, tensor.data_ptr(), 0 if tensor.grad is None else id(tensor.grad), 0 if tensor.grad is None else tensor.grad._version)
            for tensor in self._tensors
        ]

    def _figures_now(self) -> list[torch.Tensor]:
        with torch.no_grad():
            held = [*self._tensors, *(tensor.grad for tensor in self._tensors if tensor.grad is not None)]
            return [torch.stack([tensor.detach().sum(), tensor.detach().norm()]) for tensor in held if tensor.layout == torch.strided]


@contextmanager
def only_we_step(jobs: Sequence[Job], on_phase: PhaseCallback) -> Iterator[PhaseCallback]:
    """Context that raises `JobError` if an optimizer of the jobs' parameters steps inside backward, where each micro-batch would be a step of its own.

    Other optimizers may step, as another thread does that trains something else.
    on_phase: as in `run`. Pass the yielded callback to `run` instead: it calls this one.
    The context costs 36 microseconds a window, so training uses it for its first window only.
    """
    current_phase = ""

    def noted(phase: str, index: int) -> None:
        nonlocal current_phase
        current_phase = phase
        on_phase(phase, index)

    def refuse(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if current_phase == "backward" and any(id(parameter) in trained_ids for group in optimizer.param_groups for parameter in group["params"]):
            raise JobError(
                f"{type(optimizer).__name__} steps in a backward hook, so every micro-batch would change the weights: "
                "gradients cannot be accumulated; step it after the window, or train without accumulation"
            )

    trained_ids = {id(parameter) for job in jobs for parameter in job.trained()}
    hook = register_optimizer_step_pre_hook(refuse)
    try:
        yield noted
    finally:
        hook.remove()
