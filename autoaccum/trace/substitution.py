"""The substitution of a job's tensors by tensors without memory, wherever its model, optimizer and loss can reach them."""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from autoaccum.errors import JobError
from autoaccum.trace import quantised_layers
from autoaccum.window import Job

_QUANTISED = ("auto_gptq", "gptqmodel", "awq", "autoawq", "bitsandbytes", "hqq", "quanto", "optimum")


class Substitution:
    """Replaces the tensors of jobs permanently. kind: the device type that the new tensors have.

    resident: the new tensors of models and optimizers. made_from: by id of such a tensor, the bytes that are on the card beside it while it is made.
    late: the new tensors of the loss, which count only after an operator has used them.
    Raises `JobError` for a tensor that has no substitute.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self.resident: list[torch.Tensor] = []
        self.made_from: dict[int, int] = {}
        self.late: list[torch.Tensor] = []
        self._swapped: dict[int, torch.Tensor] = {}
        self._originals: list[torch.Tensor] = []

    def swap(self, job: Job) -> None:
        roots = [job.model, *(module for module in job.keep if isinstance(module, torch.nn.Module))]
        for root in roots:
            self._swap_module(root)
        object.__setattr__(job, "loss", self._on_device(job.loss, {}))
        for optimizer in job.optimizers:
            states = dict(optimizer.state)
            for group in optimizer.param_groups:
                group["params"] = [self._swap_tensor(parameter) for parameter in group["params"]]
            optimizer.state.clear()
            for parameter, state in states.items():
                moved = {name: self._swap_state(value) for name, value in state.items()}
                optimizer.state[self._swap_tensor(parameter)] = moved

    def _swap_module(self, root: torch.nn.Module) -> None:
        def visit(module: torch.nn.Module) -> None:  # the same order as Module.to()
            if type(module).__module__.split(".")[0] in _QUANTISED and not quantised_layers.is_packed(module._parameters.get("weight")):
                raise JobError(
                    f"{type(module).__name__} keeps its weights packed, and its kernels are not known here: estimate the job with plain weights, which is an upper "
                    "bound, or tune on a real card"
                )
            for child in module.children():
                visit(child)
            for slots in (module._parameters, module._buffers):
                for name, tensor in slots.items():
                    if tensor is not None:
                        slots[name] = self._swap_tensor(tensor)
            quantised_layers.state_without_values(module, self._resident)
            for name, value in list(vars(module).items()):
                if (type(value) is torch.Tensor and value.dim()) or _is_cpu(value):
                    vars(module)[name] = self._on_device(value, {})

        visit(root)

    def _swap_state(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        # A step count stays on its device. Its value is not known.
        return self._swap_tensor(value) if value.dim() else torch.tensor(1, dtype=value.dtype, device=value.device.type)

    def _on_device(self, value: Any, visited: dict[int, Any]) -> Any:
        """Returns `value` on the simulated device, with everything that the loss's code can reach from it.

        It replaces tensors, modules and the name of the device, inside containers, functions and objects too. Dicts, lists,
        functions and objects are changed in place.
        visited: for each id, the original and its replacement. The original is kept alive, so that its id is not reused.
        """
        if isinstance(value, torch.Tensor):
            return self._swap_tensor(value, late=True) if value.device.type == "cpu" and value.layout == torch.strided else value
        if _is_cpu(value):
            return torch.device(self._kind) if isinstance(value, torch.device) else self._kind
        if isinstance(value, (type, str, bytes, int, float, complex)) or value is None:
            return value
        if id(value) in visited:
            return visited[id(value)][1]
        if isinstance(value, (dict, list, tuple)) and len(value) > 1000:
            return value  # data stay on the host
        visited[id(value)] = (value, value)
        if isinstance(value, torch.nn.Module):
            self._swap_module(value)
        elif isinstance(value, functools.partial):
            inner, arguments = self._on_device(value.func, visited), [self._on_device(item, visited) for item in value.args]
            replacement: Any = functools.partial(inner, *arguments, **{name: self._on_device(item, visited) for name, item in value.keywords.items()})
            visited[id(value)] = (value, replacement)
            return replacement
        elif isinstance(value, dict):
            for name, item in list(value.items()):
                value[name] = self._on_device(item, visited)
        elif isinstance(value, list):
            value[:] = [self._on_device(item, visited) for item in value]
        elif isinstance(value, tuple):
            items = [self._on_device(item, visited) for item in value]
            replacement = type(value)(*items) if hasattr(value, "_fields") else tuple(items)
            visited[id(value)] = (value, replacement)
            return replacement
        elif inspect.ismethod(value) or inspect.isfunction(value):
            self._inside_function(value, visited)
        elif _is_user_code(type(value)) or isinstance(value, types.SimpleNamespace):
            for name, item in list(getattr(value, "__dict__", {}).items()):
                object.__setattr__(value, name, self._on_device(item, visited))
            for method in ("__call__", "forward", "loss"):
                if inspect.isfunction(vars(type(value)).get(method)):
                    self._inside_function(vars(type(value))[method], visited)
        return value

    def _inside_function(self, function: Any, visited: dict[int, Any]) -> None:
        if inspect.ismethod(function):
            self._on_device(function.__self__, visited)
            function = function.__func__
        if not inspect.isfunction(function) or not _is_user_code(function):
            return
        for cell in function.__closure__ or ():
            if _filled(cell):
                cell.cell_contents = self._on_device(cell.cell_contents, visited)
        for name in _names(function.__code__):
            if name in function.__globals__ and not inspect.ismodule(function.__globals__[name]):
                function.__globals__[name] = self._on_device(function.__globals__[name], visited)
        if function.__defaults__:
            function.__defaults__ = tuple(self._on_device(default, visited) for default in function.__defaults__)
        if function.__kwdefaults__:
            function.__kwdefaults__.update({name: self._on_device(default, visited) for name, default in function.__kwdefaults__.items()})

    def _swap_tensor(self, tensor: torch.Tensor, *, late: bool = False) -> Any:
        """late: True for a tensor of the loss. It counts only when an operator uses it, because it may never leave the host."""
        if isinstance(tensor, FakeTensor):
            return tensor
        if id(tensor) in self._swapped:
            return self._swapped[id(tensor)]
        if quantised_layers.is_packed(tensor):
            packed, held = quantised_layers.without_values(tensor, self._blank, self._kind)
            self.made_from[id(packed)] = quantised_layers.whole_bytes(packed)
            self._swapped[id(tensor)] = packed
            self._originals.append(tensor)
            self.resident += held
            return packed
        if tensor.layout != torch.strided:
            raise JobError(f"a tensor of layout {tensor.layout} cannot be simulated: use dense ones, or tune on a real card")
        if not _is_plain(type(tensor)):
            raise JobError(
                f"a {type(tensor).__name__} holds its values in a form of its own (quantised, distributed), which cannot be simulated yet: estimate the job with "
                "plain weights, which is an upper bound, or tune on a real card"
            )
        if tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
            raise JobError("a parameter has a hook on its gradient, which a simulation would leave out: take it off for the estimate, or tune on a real card")
        blank = self._blank(tensor)
        if isinstance(tensor, torch.nn.Parameter):
            blank = torch.nn.Parameter(blank, tensor.requires_grad)
            if type(tensor) is not torch.nn.Parameter:  # a label of the user's, with what it carries
                vars(blank).update(vars(tensor))
        elif tensor.is_leaf and tensor.requires_grad:
            blank.requires_grad_()
        self._swapped[id(tensor)] = blank
        self._originals.append(tensor)  # keep the original alive, so that its id is not reused
        (self.late if late else self.resident).append(blank)
        return blank

    def _resident(self, tensor: torch.Tensor) -> torch.Tensor:
        blank = self._blank(tensor)
        self.resident.append(blank)
        return blank

    def _blank(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=self._kind)


def _is_plain(kind: type) -> bool:
    """True for a tensor's class that changes nothing of what tensors do."""
    own = [each for each in kind.__mro__ if each not in torch.nn.Parameter.__mro__ and not each.__module__.startswith("torch.nn.parameter")]
    return not any(callable(value) or isinstance(value, (staticmethod, classmethod, property)) for each in own for value in vars(each).values())


def _names(code: types.CodeType) -> set[str]:
    """Names that a function's code uses, functions and comprehensions inside it included."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names(constant)
    return names


def _is_cpu(value: Any) -> bool:
    """True for the CPU as a `torch.device` or a name. A job that was built on the CPU may keep such a value."""
    return (isinstance(value, torch.device) and value.type == "cpu") or (isinstance(value, str) and value == "cpu")


def _is_user_code(value: Any) -> bool:
    return str(getattr(value, "__module__", "")).split(".")[0] not in (
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
