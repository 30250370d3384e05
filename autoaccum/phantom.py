"""A job on tensors that are not there: its windows run for their memory alone, and become tapes."""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from autoaccum import batches, window
from autoaccum.errors import JobError, noted
from autoaccum.job import Job
from autoaccum.simulate import fake
from autoaccum.simulate.attention import Asked, chosen_for
from autoaccum.simulate.kernels import Card
from autoaccum.simulate.tape import Tape, canonical
from autoaccum.simulate.trace import Tracer

_TEMPLATE = 2  # samples that are really made, to know their shapes


@contextmanager
def unfilled() -> Iterator[None]:
    """Models built inside have their shapes and no values: large weights are never written, so they take no memory.

    Left out are `torch.nn.init`, and what fills by chance, converts or clones a floating point tensor of more than a million
    elements that was made empty and that no operator has written to. Data keep their values, and so does what a constructor computes from small tensors.
    """
    names = [name for name in dir(torch.nn.init) if name.endswith("_") and not name.startswith("_")]
    kept = {name: getattr(torch.nn.init, name) for name in names}
    try:
        for name in names:
            setattr(torch.nn.init, name, lambda tensor, *_, **__: tensor)
        with _Unwritten():
            yield
    finally:
        for name, function in kept.items():
            setattr(torch.nn.init, name, function)


class _Unwritten(torch.utils._python_dispatch.TorchDispatchMode):
    _MAKES = frozenset(("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided"))
    _FILLS = frozenset(("normal_", "uniform_", "erfinv_", "mul_", "add_", "clamp_", "bernoulli_"))
    _COPIES = frozenset(("_to_copy", "clone"))
    _LARGE = 1_000_000

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._blank: dict[int, Any] = {}  # storages that nobody has written to; by address, which the dead give up

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._overloadpacket.__name__, kwargs or {}
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if first is not None and self._is_blank(first):
            if name in self._FILLS or (name == "copy_" and self._is_blank(args[1])):
                return first
            if name in self._COPIES:
                return self._noted(torch.empty_like(first, dtype=kwargs.get("dtype") or first.dtype, device=kwargs.get("device") or first.device))
        if self._blank and func._schema.is_mutable:  # whatever is written to has values now, also by a view of a part
            for each in (*args, *kwargs.values()):
                for tensor in each if isinstance(each, (list, tuple)) else (each,):
                    if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                        self._blank.pop(tensor.untyped_storage()._cdata, None)
        out = func(*args, **kwargs)
        return self._noted(out) if name in self._MAKES else out

    def _noted(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type == "cpu" and tensor.numel() > self._LARGE and tensor.is_floating_point():
            storage = tensor.untyped_storage()
            self._blank[storage._cdata] = weakref.ref(storage)
        return tensor

    def _is_blank(self, tensor: Any) -> bool:
        if not isinstance(tensor, torch.Tensor) or tensor.numel() <= self._LARGE or tensor.layout != torch.strided:
            return False
        storage = tensor.untyped_storage()
        found = self._blank.get(storage._cdata)
        return found is not None and found() is storage


class Phantom:
    """Jobs that run in turn, turned into phantoms for good: their parameters have no memory any more.

    kind: "cuda", or "cpu" where CUDA tensors cannot be faked. Raises `JobError` for what cannot be traced.
    """

    def __init__(self, jobs: Sequence[Job], kind: str = "cuda") -> None:
        self._jobs, self._kind = jobs, kind
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._templates: dict[int, Any] = {}
        if jobs[0].split is None:
            self._templates[0] = jobs[0].batch_of(_TEMPLATE)
        fake.quieten_transformers()
        self._swapped: dict[int, torch.Tensor] = {}
        self._resident: list[torch.Tensor] = []
        self.attention: set[Asked] = set()  # what attention was asked for in any tape
        self._late: list[torch.Tensor] = []
        self._originals: list[torch.Tensor] = []
        with self._mode:
            for job in jobs:
                self._swap(job)
        self._states = [[dict(state) for state in optimizer.state.values()] for job in jobs for optimizer in job.optimizers]

    def tape(self, windows: Sequence[Sequence[int]], card: Card) -> Tape:
        """The tape of these windows, each given as its micro-batches, on such a card. The optimizer has no state when the first begins."""

        def run(tracer: Tracer) -> None:
            held = self._kept_for_rescue()
            history = self._history_to_come()
            tracer.named(history, "optimizer")
            scalers = [None if job.scaler is None else torch.amp.GradScaler(self._kind, init_scale=1.0, growth_interval=10**9) for job in self._jobs]
            for sizes in windows:
                self._window(tracer, sizes, scalers)
            del held, history

        return self.recorded(run, card)

    def recorded(self, run: Callable[[Tracer], None], card: Card) -> Tape:
        """The tape of whatever `run` does with the jobs' phantoms, and these as they were before."""
        tracer = Tracer(card, self._kind)
        with ExitStack() as inside:
            inside.enter_context(torch.compiler.set_stance("force_eager"))
            asked = inside.enter_context(chosen_for(card.capability))
            inside.enter_context(self._mode)
            inside.enter_context(tracer)
            for tensor in self._resident:
                tracer.track(tensor, "parameter")
            tracer.late = {tensor.untyped_storage()._cdata for tensor in self._late}
            made_before = [each for kept in self._states for state in kept for each in state.values() if isinstance(each, FakeTensor)]
            tracer.named([each for each in made_before if each.device.type == self._kind], "optimizer")  # by its constructor, as Adagrad does
            try:
                run(tracer)
            except Exception as error:
                raise self._told(error, tracer) from error
            finally:
                tape = tracer.finished()
                self._rewind()
        self.attention |= asked
        return canonical(tape)

    def shapes(self, micro_batch: int) -> dict[str, tuple[int, ...]]:
        """Shapes of a micro-batch, by path; empty where batches are cut by the job's own `split`."""
        if 0 not in self._templates:
            return {}
        found = batches.shapes(self._templates[0])
        return {path: (micro_batch, *shape[1:]) if shape and shape[0] == _TEMPLATE else shape for path, shape in found.items()}

    # -- one window --

    def _window(self, tracer: Tracer, sizes: Sequence[int], scalers: Sequence[Any]) -> None:
        for job, scaler in zip(self._jobs, scalers):
            tracer.phase = "forward"  # the second of several jobs begins after the first one's step
            steps = [optimizer.register_step_pre_hook(lambda *_, job=job: _name_gradients(tracer, job)) for optimizer in job.optimizers]
            try:
                window.run(
                    job,
                    job.loss,
                    [(self.batch(size), size) for size in sizes],
                    samples=sum(sizes),
                    device=torch.device(self._kind),
                    scaler=scaler,
                    say=tracer.say,
                )
            finally:
                for step in steps:
                    step.remove()
        tracer.ended()

    def batch(self, samples: int) -> Any:
        """A batch on the host, without values."""
        if 0 not in self._templates:
            if samples not in self._templates:
                self._templates[samples] = self._jobs[0].batch_of(samples)
            return batches.changed(self._templates[samples], self._phantom)
        return batches.resize(batches.changed(self._templates[0], self._phantom), samples)

    def _phantom(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the batch: on the host still, and without its values."""
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu", requires_grad=tensor.requires_grad)

    def _kept_for_rescue(self) -> list[torch.Tensor]:
        small: dict[torch.dtype, int] = {}
        for job in self._jobs:
            for buffer in job.model.buffers():
                if buffer.nbytes <= 2**20:
                    small[buffer.dtype] = small.get(buffer.dtype, 0) + buffer.numel()
        return [torch.empty(count, dtype=dtype, device=self._kind) for dtype, count in small.items()]

    def _history_to_come(self) -> list[torch.Tensor]:
        """Of an optimizer with a history (LBFGS): two vectors of all parameters, as often as that is long. Its own conditions
        depend on values, and a few steps would fill a part of it."""
        lengths = [(job, optimizer.defaults.get("history_size", 0)) for job in self._jobs for optimizer in job.optimizers]
        return [torch.empty(2 * length * job.gradient_bytes(), dtype=torch.uint8, device=self._kind) for job, length in lengths if length]

    def _rewind(self) -> None:
        states = iter(self._states)
        for job in self._jobs:
            for optimizer in job.optimizers:
                kept = next(states)
                found = list(optimizer.state)
                optimizer.state.clear()
                for parameter, state in zip(found, kept):
                    optimizer.state[parameter] = dict(state)
            for parameter in job.trained():
                parameter.grad = None

    def _told(self, error: Exception, tracer: Tracer) -> Exception:
        from torch._subclasses.fake_tensor import UnsupportedFakeTensorException, UnsupportedOperatorException

        if isinstance(error, JobError):
            return error
        where = f"in {tracer.phase}, micro-batch {tracer.piece + 1}"
        if isinstance(error, UnsupportedOperatorException):
            return JobError(
                f"{error.args[0] if error.args else error} cannot be traced {where}: it has no rule for the shapes of its results; "
                "register one with torch.library.register_fake, or tune on a real card"
            )
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, UnsupportedFakeTensorException) or "two different devices" in text or "Expected all tensors to be on the same device" in text:
            return JobError(
                f"a tensor of the loss or the model is not where the parameters are ({text}), {where}: make it a buffer of the model, or move it with .to(x.device)"
            )
        if "is not supported for tensor subclasses" in text:
            return JobError(
                f"{text.rstrip('.')} ({where}): simulated tensors have no values to hand to NumPy or to lists; leave that out of the loss while simulating"
            )
        if tracer.assumed():
            noted(error, f"autoaccum: simulated without values, so this may be no fault of the job: {'; '.join(tracer.assumed()[:3])}")
        return error

    # -- from real to phantom --

    def _swap(self, job: Job) -> None:
        roots = [job.model, *(each for each in job.keep if isinstance(each, torch.nn.Module))]
        for root in roots:
            self._swap_module(root)
        object.__setattr__(job, "loss", self._elsewhere(job.loss, {}))
        for optimizer in job.optimizers:
            states = dict(optimizer.state)
            for group in optimizer.param_groups:
                group["params"] = [self._swap_tensor(parameter) for parameter in group["params"]]
            optimizer.state.clear()
            for parameter, state in states.items():
                moved = {name: self._swap_state(value) for name, value in state.items()}
                optimizer.state[self._swap_tensor(parameter)] = moved

    def _swap_module(self, root: torch.nn.Module) -> None:
        def visit(module: torch.nn.Module) -> None:  # in the order of Module.to()
            for child in module.children():
                visit(child)
            for slots in (module._parameters, module._buffers):
                for name, tensor in slots.items():
                    if tensor is not None:
                        slots[name] = self._swap_tensor(tensor)
            for name, value in list(vars(module).items()):
                if (type(value) is torch.Tensor and value.dim()) or _is_cpu(value):
                    vars(module)[name] = self._elsewhere(value, {})

        visit(root)

    def _swap_state(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        # A count of steps stays where it is, and what it counts is not known.
        return self._swap_tensor(value) if value.dim() else torch.tensor(1, dtype=value.dtype, device=value.device.type)

    def _elsewhere(self, value: Any, seen: dict[int, Any]) -> Any:
        """`value` on the simulated device, as far as a loss's code can reach it: tensors, modules, the name of the device, and
        containers, functions and objects around them. Dicts, lists, functions and objects are changed in place.

        seen: what became of what, by id, with the original, whose id must stay its own.
        """
        if isinstance(value, torch.Tensor):
            return self._swap_tensor(value, late=True) if value.device.type == "cpu" and value.layout == torch.strided else value
        if _is_cpu(value):
            return torch.device(self._kind) if isinstance(value, torch.device) else self._kind
        if isinstance(value, (type, str, bytes, int, float, complex)) or value is None:
            return value
        if id(value) in seen:
            return seen[id(value)][1]
        if isinstance(value, (dict, list, tuple)) and len(value) > 1000:
            return value  # data, which stay on the host
        seen[id(value)] = (value, value)
        if isinstance(value, torch.nn.Module):
            self._swap_module(value)
        elif isinstance(value, functools.partial):
            inner, arguments = self._elsewhere(value.func, seen), [self._elsewhere(each, seen) for each in value.args]
            made: Any = functools.partial(inner, *arguments, **{name: self._elsewhere(each, seen) for name, each in value.keywords.items()})
            seen[id(value)] = (value, made)
            return made
        elif isinstance(value, dict):
            for name, each in list(value.items()):
                value[name] = self._elsewhere(each, seen)
        elif isinstance(value, list):
            value[:] = [self._elsewhere(each, seen) for each in value]
        elif isinstance(value, tuple):
            items = [self._elsewhere(each, seen) for each in value]
            made = type(value)(*items) if hasattr(value, "_fields") else tuple(items)
            seen[id(value)] = (value, made)
            return made
        elif inspect.ismethod(value) or inspect.isfunction(value):
            self._inside_function(value, seen)
        elif _is_the_users(type(value)) or isinstance(value, types.SimpleNamespace):
            for name, each in list(getattr(value, "__dict__", {}).items()):
                object.__setattr__(value, name, self._elsewhere(each, seen))
            for method in ("__call__", "forward", "loss"):
                if inspect.isfunction(vars(type(value)).get(method)):
                    self._inside_function(vars(type(value))[method], seen)
        return value

    def _inside_function(self, function: Any, seen: dict[int, Any]) -> None:
        if inspect.ismethod(function):
            self._elsewhere(function.__self__, seen)
            function = function.__func__
        if not inspect.isfunction(function) or not _is_the_users(function):
            return
        for cell in function.__closure__ or ():
            if _filled(cell):
                cell.cell_contents = self._elsewhere(cell.cell_contents, seen)
        for name in _names(function.__code__):
            if name in function.__globals__ and not inspect.ismodule(function.__globals__[name]):
                function.__globals__[name] = self._elsewhere(function.__globals__[name], seen)
        if function.__defaults__:
            function.__defaults__ = tuple(self._elsewhere(each, seen) for each in function.__defaults__)
        if function.__kwdefaults__:
            function.__kwdefaults__.update({name: self._elsewhere(each, seen) for name, each in function.__kwdefaults__.items()})

    def _swap_tensor(self, tensor: torch.Tensor, *, late: bool = False) -> Any:
        """late: counted only when an operator uses it, because a loss may hold what never leaves the host."""
        if isinstance(tensor, FakeTensor):
            return tensor
        if id(tensor) in self._swapped:
            return self._swapped[id(tensor)]
        if tensor.layout != torch.strided or (type(tensor) not in (torch.Tensor, torch.nn.Parameter) and not isinstance(tensor, torch.nn.Parameter)):
            raise JobError(f"a {type(tensor).__name__} of layout {tensor.layout} cannot be simulated: tune on a real card")
        if tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
            raise JobError("a parameter has a hook on its gradient, which a simulation would leave out: take it off for the estimate, or tune on a real card")
        blank: torch.Tensor = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=self._kind)
        if isinstance(tensor, torch.nn.Parameter):
            blank = torch.nn.Parameter(blank, tensor.requires_grad)
        elif tensor.is_leaf and tensor.requires_grad:
            blank.requires_grad_()
        self._swapped[id(tensor)] = blank
        self._originals.append(tensor)  # ids are only unique among the living
        (self._late if late else self._resident).append(blank)
        return blank


def _name_gradients(tracer: Tracer, job: Job) -> None:
    tracer.named([parameter.grad for parameter in job.trained() if parameter.grad is not None], "gradients")


def _names(code: types.CodeType) -> set[str]:
    """What a function's code calls by name, in functions and comprehensions inside it, too."""
    found = set(code.co_names)
    for each in code.co_consts:
        if isinstance(each, types.CodeType):
            found |= _names(each)
    return found


def _is_cpu(value: Any) -> bool:
    """True for a device's name: what a job kept that was told to build itself on the CPU."""
    return (isinstance(value, torch.device) and value.type == "cpu") or (isinstance(value, str) and value == "cpu")


def _is_the_users(found: Any) -> bool:
    return str(getattr(found, "__module__", "")).split(".")[0] not in (
        "torch",
        "numpy",
        "autoaccum",
        "transformers",
        "builtins",
        "functools",
        "collections",
        "threading",
        "logging",
        "_thread",
    )


def _filled(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True
