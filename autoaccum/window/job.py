"""`Job`: what is trained, that is model, optimizer, loss and batch."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from autoaccum.errors import JobError
from autoaccum.window import compiled

if TYPE_CHECKING:  # the command line imports this file without the cost of importing torch
    import torch

_ASCENTS = ("first_step", "perturb_weights", "ascent_step")  # methods of SAM and its kin, which evaluate the loss at moved weights too
# What a `fingerprint` identifies.
FINGERPRINTED = ("the model's parameters", "the optimizer", "autocast", "max_grad_norm", "the scaler")


@dataclass(frozen=True)
class Job:
    """The training job. Tuning, training and the equivalence check all use the same `Job`.

    model: the module whose parameters are trained.
    optimizer: one optimizer, or a sequence of optimizers that step together.
    loss: `loss(model, batch)`: returns the mean over the samples of `batch` (a scalar), or `(loss_sum, count)`.
    batch: a batch to measure with (its samples are repeated if a trial needs more), or `make_batch(n)`, which returns the
        worst case of n samples. Training must not exceed its shapes.
    data: the data for `autoaccum train`: a map-style dataset, or any iterable of batches.
    autocast: a torch dtype, or None.
    max_grad_norm: the norm to clip to, once per window, on the accumulated gradient; None for no clipping.
    count: `count(batch)`, for example the number of its label tokens. A scalar loss is then the mean over the counted items,
        and is weighted by their count. For a loss that returns `(loss_sum, count)`, `count` gives the window's count before
        the first forward. Called on the host.
    split: `split(batch, sizes)`, for batches that cannot be cut along the first dimension.
    samples: `samples(batch)`, the number of samples in a batch, if its first dimension does not count them. It goes with `split`, or with a
        function `make_batch(n)`, of whose batches the size is then not checked.
    keep: other objects with state that the loss changes (EMA, discriminator). Their state is restored after tuning.
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
    samples: Callable[[Any], int] | None = field(default=None, kw_only=True)
    keep: Sequence[Any] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        import torch

        if not isinstance(self.model, torch.nn.Module):
            raise JobError(f"model must be a torch.nn.Module, not {type(self.model).__name__}")
        if not self.optimizers or not all(isinstance(optimizer, torch.optim.Optimizer) for optimizer in self.optimizers):
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
        for name in ("count", "split", "samples"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise JobError(f"{name} must be a function, not {type(getattr(self, name)).__name__}")
        if not isinstance(self.keep, Sequence):
            raise JobError(f"keep must be a list of what is to be put back, not {type(self.keep).__name__}: keep=[...]")
        for name, verbs in (("scheduler", ("step",)), ("scaler", ("scale", "unscale_", "step", "update"))):
            given = getattr(self, name)
            if isinstance(given, type):
                raise JobError(f"{name} is the class {given.__name__}: give an instance, {name}={given.__name__}(...)")
            if given is not None and not all(callable(getattr(given, verb, None)) for verb in verbs):
                raise JobError(f"{name} must be a {'learning rate scheduler' if name == 'scheduler' else 'torch.amp.GradScaler'}, not {given!r}")
        if type(self.scheduler).__name__ == "ReduceLROnPlateau":
            raise JobError("ReduceLROnPlateau steps on a figure that only you have: leave scheduler out, and step it yourself, for instance with result.loss")
        lazy = [name for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()) if torch.nn.parameter.is_lazy(tensor)]
        if lazy:
            raise JobError(
                f"{lazy[0]!r} has no shape before the first forward (a lazy module): run the model once on a batch, and make the optimizer after that"
            )
        trains = {id(parameter) for parameter in self.model.parameters() if parameter.requires_grad}
        stepped = {id(parameter) for group in self._groups() for parameter in group["params"]}
        if trains and not trains & stepped:
            raise JobError("the optimizer holds none of the model's parameters: make it from model.parameters(), after the model is as it will train")
        evaluates_again = self.wants_closure or next((type(each).__name__ for each in self.optimizers if any(hasattr(each, verb) for verb in _ASCENTS)), "")
        if evaluates_again and len(self.optimizers) > 1:
            raise JobError(f"{evaluates_again} evaluates the loss inside step(), so it cannot be stepped together with others: give it alone")
        if self.wants_closure and self.scaler is not None:
            raise JobError(f"{self.wants_closure} evaluates the loss inside step(), where a GradScaler cannot unscale: train in bfloat16 or float32")

    @cached_property
    def optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """The optimizers as a tuple, also if there is only one."""
        return tuple(self.optimizer) if isinstance(self.optimizer, Sequence) else (self.optimizer,)

    @cached_property
    def wants_closure(self) -> str:
        """Class name of an optimizer that evaluates the loss itself inside `step(closure)`, as LBFGS does; "" if there is none."""
        for optimizer in self.optimizers:
            closure = inspect.signature(optimizer.step).parameters.get("closure")
            if closure is not None and closure.default is inspect.Parameter.empty:
                return type(optimizer).__name__
        return ""

    @cached_property
    def takes_closure(self) -> bool:
        """True if the one optimizer is not of torch and its `step` takes a closure: it may evaluate again (SAM).

        The optimizers of torch, except LBFGS, and of bitsandbytes evaluate a closure first, once, so they need none.
        """
        (optimizer, *others) = self.optimizers
        steps = type(optimizer).step
        parameters = inspect.signature(steps).parameters.values()
        takes = any(parameter.name == "closure" or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) for parameter in parameters)
        return not others and not steps.__module__.startswith(("torch.optim", "bitsandbytes.optim")) and takes

    @property
    def device(self) -> torch.device:
        """Device of the first parameter that requires a gradient. Raises `JobError` if no parameter does."""
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                return parameter.device
        raise JobError("no parameter of the model requires a gradient: nothing would be trained")

    def batch_of(self, samples: int) -> Any:
        """A batch of exactly `samples` samples, for measuring.

        Raises `JobError` if `make_batch` returned a different number of samples.
        """
        from autoaccum.data import batches

        if not callable(self.batch) and self.split is not None:
            have = self.samples_in(self.batch)
            if have < samples:
                raise JobError(
                    f"the batch holds {have} samples and a trial needs {samples}, and a batch that only split= can cut is not repeated: "
                    "give a larger batch, or a function make_batch(n)"
                )
            return self.batch if have == samples else self.split(self.batch, [samples, have - samples])[0]
        if not callable(self.batch):
            return batches.resize(self.batch, samples)
        batch = self.batch(samples)
        if self.split is None and self.samples is None and (got := batches.count(batch)) != samples:
            raise JobError(f"make_batch({samples}) returned {got} samples: return a batch of exactly the size asked for")
        return batch

    def samples_in(self, batch: Any) -> int:
        """The number of samples in a batch, by `samples` or by its first dimension.

        Raises `JobError` if the first dimension does not count them and there is no `samples`.
        """
        from autoaccum.data import counted

        return counted(batch, self.samples, cut_by_user=self.split is not None)

    def moved(self, device: str) -> Job:
        """Moves the model and the optimizer state to `device` and returns this job. The parameters stay the same objects."""
        self.model.to(device)
        for optimizer in self.optimizers:
            if optimizer.state:
                optimizer.load_state_dict(optimizer.state_dict())
        return self

    def trained(self) -> list[torch.Tensor]:
        """Every tensor that gets a gradient: the model's parameters, and those that only the optimizers hold (a loss head, a learned weight)."""
        tensors = {id(p): p for group in self._groups() for p in group["params"] if p.requires_grad}
        tensors |= {id(p): p for p in self.model.parameters() if p.requires_grad}
        return list(tensors.values())

    def stepped(self) -> list[torch.Tensor]:
        """Every tensor that the optimizers hold and that requires a gradient."""
        return [p for group in self._groups() for p in group["params"] if p.requires_grad]

    @cached_property
    def idle(self) -> list[torch.Tensor]:
        """Parameters of the model that get gradients but that no optimizer of this job holds.

        Computed at first use; later changes of the model or the optimizers are not seen.
        """
        stepped_ids = {id(p) for group in self._groups() for p in group["params"]}
        return [p for p in self.model.parameters() if p.requires_grad and id(p) not in stepped_ids]

    @property
    def is_compiled(self) -> bool:
        """True if `torch.compile` compiles a part of the model or of the loss."""
        return compiled.is_compiled(self.model, self.loss)

    @cached_property
    def replays_graphs(self) -> bool:
        """True if CUDA graphs are replayed in this job. Found out at first use, as `idle` is."""
        return self.device.type == "cuda" and compiled.replays_graphs(self.model, self.loss)

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def gradient_bytes(self) -> int:
        """Bytes of all gradients together, which stay resident between micro-batches."""
        return sum(p.nbytes for p in self.trained())


def as_jobs(jobs: Job | Sequence[Job]) -> tuple[Job, ...]:
    """Returns one job, or several jobs that run one after the other in every window (a GAN has two), as a tuple.

    Raises `JobError` for anything else, and for jobs on different devices.
    """
    as_tuple = (jobs,) if isinstance(jobs, Job) else tuple(jobs) if isinstance(jobs, (list, tuple)) else ()
    if not as_tuple or not all(isinstance(job, Job) for job in as_tuple):
        raise JobError(f"a Job or a list of Jobs is needed, not {type(jobs).__name__}")
    if len({job.device for job in as_tuple}) > 1:
        raise JobError(f"jobs that run in turn must be on one device, not on {' and '.join(str(job.device) for job in as_tuple)}")
    return as_tuple


def fingerprint(jobs: Sequence[Job]) -> str:
    """Identifies the jobs: eight hex digits for each of `FINGERPRINTED`, in this order, joined by "-".

    The parameters are compared by name, shape, dtype and requires_grad, the optimizers by class, the scaler by whether there is one.
    """
    from autoaccum.distributed import unwrapped

    settings = (
        [f"{name} {tuple(p.shape)} {p.dtype} {p.requires_grad}" for job in jobs for name, p in unwrapped(job.model).named_parameters()],
        [[type(optimizer).__name__ for optimizer in job.optimizers] for job in jobs],
        [job.autocast for job in jobs],
        [job.max_grad_norm for job in jobs],
        [job.scaler is not None for job in jobs],
    )
    return "-".join(hashlib.sha256(repr(each).encode()).hexdigest()[:8] for each in settings)


def differing(measured: str, now: str) -> tuple[str, ...]:
    """Those of `FINGERPRINTED` in which two fingerprints differ; all of them if they cannot be told apart."""
    pairs = list(zip(measured.split("-"), now.split("-")))
    if len(pairs) != len(FINGERPRINTED):
        return FINGERPRINTED if measured != now else ()
    return tuple(name for name, (before, after) in zip(FINGERPRINTED, pairs) if before != after)
