"""Puts tensors without memory in the place of a job's tensors, wherever its model, optimizer and loss can reach them."""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from autoaccum.errors import JobError
from autoaccum.window import Job


class Substitution:
    """Swaps the tensors of jobs, for good. kind: the type of device that the new tensors pretend to be on.

    resident: the new tensors of models and optimizers. late: those of the loss, which count only once an operator uses them.
    Raises `JobError` for a tensor that has no substitute.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self.resident: list[torch.Tensor] = []
        self.late: list[torch.Tensor] = []
        self._swapped: dict[int, torch.Tensor] = {}
        self._originals: list[torch.Tensor] = []

    def swap(self, job: Job) -> None:
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
        (self.late if late else self.resident).append(blank)
        return blank


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
