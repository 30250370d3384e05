"""What is trained."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from autoaccum.errors import JobError

if TYPE_CHECKING:  # the command line reads this file's Source without paying for torch
    import torch


@dataclass(frozen=True)
class Job:
    """What is trained. Says each thing once, for tuning, for training and for checking.

    model: the module whose parameters train.
    optimizer: one optimizer, or a sequence that is stepped together.
    loss: `loss(model, batch)`, the mean over the samples of `batch` (a scalar), or `(loss_sum, count)`.
    batch: samples to measure with (repeated where a trial needs more), or `make_batch(n)`, the worst case
        of n samples. Its shapes are what training must not exceed.
    data: what `autoaccum train` trains on: a map-style dataset, or any iterable of batches.
    autocast: a torch dtype, or None. max_grad_norm: clipped once per window, on the summed gradient.
    count: `count(batch)`, e.g. its label tokens: a scalar loss is then the mean over what is counted, and is weighted
        so; for a loss that returns `(loss_sum, count)` it tells the window's count beforehand. Called on the host.
    split: `split(batch, sizes)`, where batches cannot be cut along the first dimension.
    keep: other stateful things that the loss touches (EMA, discriminator); put back after tuning.
    """

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer]
    loss: Callable[[Any, Any], Any]
    batch: Any
    data: Any = field(default=None, kw_only=True)
    scheduler: Any = field(default=None, kw_only=True)
    scaler: Any = field(default=None, kw_only=True)
    autocast: torch.dtype | None = field(default=None, kw_only=True)
    max_grad_norm: float | None = field(default=None, kw_only=True)
    count: Callable[[Any], Any] | None = field(default=None, kw_only=True)
    split: Callable[[Any, Sequence[int]], Sequence[Any]] | None = field(default=None, kw_only=True)
    keep: Sequence[Any] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        import torch

        if not isinstance(self.model, torch.nn.Module):
            raise JobError(f"model must be a torch.nn.Module, not {type(self.model).__name__}")
        if not self.optimizers or not all(isinstance(each, torch.optim.Optimizer) for each in self.optimizers):
            raise JobError(f"optimizer must be a torch.optim.Optimizer or a list of them, not {type(self.optimizer).__name__}")
        if not callable(self.loss):
            raise JobError(f"loss must be a function loss(model, batch), not {type(self.loss).__name__}")
        if self.batch is None:
            raise JobError("batch is None: give a batch to measure with, or a function make_batch(n)")
        if self.autocast is not None and not isinstance(self.autocast, torch.dtype):
            raise JobError(f"autocast must be a torch dtype such as torch.bfloat16, not {self.autocast!r}")
        if self.max_grad_norm is not None and (
            isinstance(self.max_grad_norm, bool) or not isinstance(self.max_grad_norm, (int, float)) or not self.max_grad_norm > 0
        ):
            raise JobError(f"max_grad_norm must be a number above 0, or None for no clipping, not {self.max_grad_norm!r}")
        for name in ("count", "split"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise JobError(f"{name} must be a function, not {type(getattr(self, name)).__name__}")
        if not isinstance(self.keep, Sequence):
            raise JobError(f"keep must be a list of what is to be put back, not {type(self.keep).__name__}: keep=[...]")
        for name, verbs in (("scheduler", ("step",)), ("scaler", ("scale", "unscale_", "step", "update"))):
            given = getattr(self, name)
            if given is not None and not all(callable(getattr(given, verb, None)) for verb in verbs):
                raise JobError(f"{name} must be a {'learning rate scheduler' if name == 'scheduler' else 'torch.amp.GradScaler'}, not {given!r}")
        if type(self.scheduler).__name__ == "ReduceLROnPlateau":
            raise JobError("ReduceLROnPlateau steps on a figure that only you have: leave scheduler out, and step it yourself, for instance with result.loss")
        trains = {id(parameter) for parameter in self.model.parameters() if parameter.requires_grad}
        stepped = {id(parameter) for group in self._groups() for parameter in group["params"]}
        if trains and not trains & stepped:
            raise JobError("the optimizer holds none of the model's parameters: make it from model.parameters(), after the model is as it will train")
        if self.wants_closure and len(self.optimizers) > 1:
            raise JobError(f"{self.wants_closure} evaluates the loss inside step(), so it cannot be stepped together with others: give it alone")
        if self.wants_closure and self.scaler is not None:
            raise JobError(f"{self.wants_closure} evaluates the loss inside step(), where a GradScaler cannot unscale: train in bfloat16 or float32")

    @cached_property
    def optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """The optimizers as a tuple, also where there is one."""
        return tuple(self.optimizer) if isinstance(self.optimizer, Sequence) else (self.optimizer,)

    @cached_property
    def wants_closure(self) -> str:
        """Name of an optimizer that evaluates the loss itself, inside `step(closure)`, as LBFGS does; "" without one."""
        for each in self.optimizers:
            closure = inspect.signature(each.step).parameters.get("closure")
            if closure is not None and closure.default is inspect.Parameter.empty:
                return type(each).__name__
        return ""

    @property
    def device(self) -> torch.device:
        """Where the parameters are. Raises `JobError` for a model without any that train."""
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                return parameter.device
        raise JobError("no parameter of the model requires a gradient: nothing would be trained")

    def batch_of(self, samples: int) -> Any:
        """A batch of exactly `samples` samples, for measuring.

        Raises `JobError` if `make_batch` returned another number of them.
        """
        from autoaccum.data import batches

        if not callable(self.batch):
            return batches.resize(self.batch, samples)
        made = self.batch(samples)
        if self.split is None and (got := batches.count(made)) != samples:
            raise JobError(f"make_batch({samples}) returned {got} samples: return a batch of exactly the size asked for")
        return made

    def moved(self, device: str) -> Job:
        """This job with its model and optimizer state on `device`; parameters keep their identity."""
        self.model.to(device)
        for each in self.optimizers:
            if each.state:
                each.load_state_dict(each.state_dict())
        return self

    def trained(self) -> list[torch.Tensor]:
        """Every tensor that gets a gradient: the model's, and the optimizers' own (a loss head, a learned weight)."""
        found = {id(p): p for group in self._groups() for p in group["params"] if p.requires_grad}
        found |= {id(p): p for p in self.model.parameters() if p.requires_grad}
        return list(found.values())

    def stepped(self) -> list[torch.Tensor]:
        """What the optimizers hold."""
        return [p for group in self._groups() for p in group["params"] if p.requires_grad]

    @cached_property
    def idle(self) -> list[torch.Tensor]:
        """The model's parameters that get gradients and that no optimizer of this job holds; as they were at first use."""
        held = {id(p) for group in self._groups() for p in group["params"]}
        return [p for p in self.model.parameters() if p.requires_grad and id(p) not in held]

    def _groups(self) -> list[dict[str, Any]]:
        return [group for each in self.optimizers for group in each.param_groups]

    def gradient_bytes(self) -> int:
        """Bytes of all gradients at once: what stays resident between micro-batches."""
        return sum(p.nbytes for p in self.trained())


def as_jobs(jobs: Job | Sequence[Job]) -> tuple[Job, ...]:
    """One job, or several that run one after the other in every window (a GAN's two), as a tuple.

    Raises `JobError` for anything else, and for jobs on different devices.
    """
    found = (jobs,) if isinstance(jobs, Job) else tuple(jobs) if isinstance(jobs, (list, tuple)) else ()
    if not found or not all(isinstance(each, Job) for each in found):
        raise JobError(f"a Job or a list of Jobs is needed, not {type(jobs).__name__}")
    if len({each.device for each in found}) > 1:
        raise JobError(f"jobs that run in turn must be on one device, not on {' and '.join(str(each.device) for each in found)}")
    return found


def is_compiled(jobs: Sequence[Job]) -> bool:
    """True where `torch.compile` wraps a model or a part of it, or `model.compile()` was called."""
    modules = [module for job in jobs for module in job.model.modules()]
    return any(hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None for module in modules)


def fingerprint(jobs: Sequence[Job]) -> str:
    """Sixteen hex digits that change with the parameters' shapes and types, the optimizers, autocast, clipping and scaler."""
    from autoaccum.distributed import unwrapped

    told = []
    for job in jobs:
        told += [f"{name} {tuple(p.shape)} {p.dtype} {p.requires_grad}" for name, p in unwrapped(job.model).named_parameters()]
        told += [type(each).__name__ for each in job.optimizers]
        told += [str(job.autocast), str(job.max_grad_norm), str(job.scaler is not None)]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]
