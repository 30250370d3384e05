"""What is trained, and how to load it from a file."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from autoaccum.errors import JobError, UsageError

if TYPE_CHECKING:  # the command line reads this file's Source without paying for torch
    import torch

DEMO = "autoaccum.demo:make_job"


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
        from autoaccum import batches

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


def in_turn(jobs: Job | Sequence[Job]) -> tuple[Job, ...]:
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
    from autoaccum.engines import unwrapped

    told = []
    for job in jobs:
        told += [f"{name} {tuple(p.shape)} {p.dtype} {p.requires_grad}" for name, p in unwrapped(job.model).named_parameters()]
        told += [type(each).__name__ for each in job.optimizers]
        told += [str(job.autocast), str(job.max_grad_norm), str(job.scaler is not None)]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Source:
    """Where a job comes from: `file.py[:make_job]` or `package.module[:make_job]`, and its arguments.

    settings are keyword arguments of the function; argv is what the file sees as `sys.argv[1:]`.
    """

    where: str
    settings: dict[str, Any] = field(default_factory=dict)
    argv: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """How reports call it: `"demo"` for the built-in job."""
        return "demo" if self.where == DEMO else self.where

    @property
    def parts(self) -> tuple[str, str]:
        """The file or module, and the name of the function in it."""
        place, _, function = self.where.rpartition(":") if ":" in self.where else (self.where, "", "")
        return place, function or "make_job"

    def digest(self) -> str:
        """Of the file's text; "" for a module, whose file is not known before it is imported."""
        place, _ = self.parts
        return hashlib.sha256(Path(place).read_bytes()).hexdigest()[:16] if place.endswith(".py") else ""


def source(where: str | None, settings: Iterable[str] = (), argv: Iterable[str] = ()) -> Source:
    """Reads JOB and the `name=value` texts of `--set` as the command line gives them.

    Values are Python literals where they can be read as one, else text. None is the built-in demo.
    Raises `UsageError` for an empty or missing file and for a setting without a name.
    """
    if where is not None and not where.strip():
        raise UsageError("JOB is empty: give file.py:make_job or package.module:make_job, or leave it out for the built-in demo")
    values: dict[str, Any] = {}
    for text in settings:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"--set {text!r} is not name=value: write for instance --set layers=4")
        try:
            values[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            values[name] = value
    found = Source(DEMO if where in (None, "demo") else where, values, tuple(argv))
    place, function = found.parts
    if not function.isidentifier():
        raise UsageError(f"{function!r} in JOB {where!r} is not the name of a function: write file.py:make_job")
    if place.endswith(".py"):
        if not Path(place).is_file():
            raise UsageError(f"there is no file {place!r}: JOB is file.py:make_job or package.module:make_job")
    elif "/" in place or not all(part.isidentifier() for part in place.split(".")):
        raise UsageError(f"JOB {place!r} is neither a .py file nor a module's dotted name: write file.py:make_job or package.module:make_job")
    return found


def load(where: Source | str, *, device: str | None = None) -> Job | Sequence[Job]:
    """Imports the file, calls its function and returns the `Job` (or the list of jobs that run in turn), on `device` if one is given.

    A function with a parameter `device` gets it; else model and optimizer are moved.
    Raises `UsageError` where there is no such module or function, `JobError` where importing the file trains
    or ends the process, and where something else than a `Job` comes back. What the user's own code raises comes
    through as it is.
    """
    origin = source(where) if isinstance(where, str) else where
    place, name = origin.parts
    module = _imported(place, origin)
    make = getattr(module, name, None)
    if not callable(make):
        near = [each for each in vars(module) if callable(getattr(module, each)) and each.startswith("make")]
        hint = f"; it has {', '.join(near[:5])}" if near else f": add `def {name}(): return autoaccum.Job(model, optimizer, loss, batch)`"
        raise UsageError(f"{place} has no function {name}(){hint}")
    arguments = _arguments(make, name, origin, device)
    made: Job | Sequence[Job] = make(**arguments)
    if not isinstance(made, (Job, list, tuple)):
        raise JobError(f"{place}:{name}() returned {type(made).__name__}: return autoaccum.Job(model, optimizer, loss, batch)")
    for job in in_turn(made):
        if device is not None and str(job.device) != device:
            job.moved(device)
    return made


def _arguments(make: Callable[..., Any], name: str, origin: Source, device: str | None) -> dict[str, Any]:
    parameters = inspect.signature(make).parameters
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    for setting in origin.settings:
        if setting not in parameters and not takes_any:
            known = ", ".join(each for each in parameters if each != "device") or "none"
            raise UsageError(f"--set {setting}=...: {name}() has no parameter {setting!r}; its parameters are: {known}")
    for each in parameters.values():
        if each.default is each.empty and each.name not in (*origin.settings, "device") and each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY):
            raise UsageError(f"{name}() needs a value for {each.name!r}: give --set {each.name}=VALUE")
    arguments = dict(origin.settings)
    if "device" in parameters and "device" not in arguments and device is not None:
        arguments["device"] = device
    return arguments


def _imported(place: str, origin: Source) -> ModuleType:
    before = sys.argv
    sys.argv = [place, *origin.argv]
    try:
        with _training_refused(place):
            if not place.endswith(".py"):
                sys.path.insert(0, "")
                return importlib.import_module(place)
            path = Path(place).resolve()
            sys.path.insert(0, str(path.parent))  # as `python file.py` does
            # Not under a name that is taken: a file called random.py must not replace the library.
            name = path.stem if path.stem not in sys.modules else f"autoaccum_job_{path.stem}"
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None and spec.loader is not None  # a .py path always has both
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            spec.loader.exec_module(module)
            return module
    except ModuleNotFoundError as error:
        if error.name and (place == error.name or place.startswith(error.name + ".")):
            raise UsageError(f"there is no module {error.name!r} here: JOB is file.py:make_job or package.module:make_job") from error
        raise
    except SystemExit as ended:
        raise JobError(
            f"{place} ended the process while it was imported (exit code {ended.code}), probably by reading the command line: "
            f'put that under `if __name__ == "__main__":`, give its arguments after `--`, '
            f"or let autoaccum run it as a command: autoaccum tune -b N -- python {place} ..."
        ) from ended
    finally:
        sys.argv = before


@contextmanager
def _training_refused(place: str) -> Any:
    """Turns an optimizer step at import into an error: such a file would train once per trial."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    def refuse(*_: Any) -> None:
        raise JobError(
            f'{place} trains when it is imported: put the training under `if __name__ == "__main__":`, '
            f"or let autoaccum run it as a command: autoaccum tune -b N -- python {place} --batch-size {{micro_batch}} ..."
        )

    hook = register_optimizer_step_pre_hook(refuse)
    try:
        yield
    finally:
        hook.remove()
