"""What of a job `torch.compile` compiles, and what CUDA graphs replay: modules of the model, and functions that the loss calls.

A graph owns the memory of what it returns and writes into it again at its next replay: of losses, and of gradients that backward gives to a
parameter that has none. So where graphs are replayed a window starts with gradients of its own, zeros, and copies what the loss returns.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the command line imports this file without the cost of importing torch
    import torch

_DEPTH = 3  # functions that call functions: a loss, its helper, and what that calls
_CAPTURED = "make_graphed_callables.<locals>"


def is_compiled(model: torch.nn.Module, loss: Callable[..., Any]) -> bool:
    """True if `torch.compile` wraps the model, a part of it, or a function that the loss calls, or if `model.compile()` was called."""
    return any(_is_compiled(part) for part in _parts(model, loss))


def replays_graphs(model: torch.nn.Module, loss: Callable[..., Any]) -> bool:
    """True if CUDA graphs are replayed: `mode="reduce-overhead"` or `"max-autotune"`, `backend="cudagraphs"`, `make_graphed_callables`."""
    return any(_in_graphs(part) or _is_captured(part) for part in _parts(model, loss))


def captured(model: torch.nn.Module, loss: Callable[..., Any]) -> str | None:
    """The name of what `torch.cuda.make_graphed_callables` captured, which runs one batch size only; None if there is nothing."""
    for name, module in model.named_modules():
        if _is_captured(module):
            return f"model.{name}" if name else "the model"
    return next((f"{getattr(part, '__name__', 'a function')}(), which the loss calls," for part in _functions(loss) if _is_captured(part)), None)


def _is_compiled(part: Any) -> bool:
    attributes = vars(part) if hasattr(part, "__dict__") else {}
    return "_orig_mod" in attributes.get("_modules", ()) or attributes.get("_compiled_call_impl") is not None or "_torchdynamo_orig_callable" in attributes


def _in_graphs(part: Any) -> bool:
    compiled = (vars(part).get("_compiled_call_impl") if hasattr(part, "__dict__") else None) or part
    told = vars(compiled).get("get_compiler_config") if hasattr(compiled, "__dict__") else None
    config = told() if told is not None else None
    if config is not None:
        return bool(config.get("triton.cudagraphs"))
    backend = getattr(vars(compiled).get("dynamo_ctx"), "callback", None) if hasattr(compiled, "__dict__") else None
    while backend is not None:
        if getattr(backend, "compiler_name", "") == "cudagraphs":
            return True
        backend = getattr(backend, "_torchdynamo_orig_backend", None)
    return False


def _is_module(part: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(part, torch.nn.Module)


def _is_captured(part: Any) -> bool:
    function = vars(part).get("forward") if _is_module(part) else part
    return _CAPTURED in getattr(function, "__qualname__", "")


def _parts(model: torch.nn.Module, loss: Callable[..., Any]) -> Iterator[Any]:
    for module in model.modules():
        yield module
        if not type(module).__module__.startswith("torch."):
            yield from _functions(type(module).forward)
        yield from (value for value in vars(module).values() if isinstance(value, (types.FunctionType, types.MethodType)))
    yield from _functions(loss)


def _functions(loss: Any) -> Iterator[Any]:
    """The loss, and the functions and modules that it refers to: by closure, by name, as an argument of a partial, or as the object that it is of."""
    seen: set[int] = set()
    waiting = [(loss, 0)]
    while waiting:
        part, depth = waiting.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        with suppress(Exception):  # a global may be an object that answers every question with an error
            if _is_module(part):
                yield from part.modules()
            elif isinstance(part, type) or not (callable(part) or depth == 0):
                continue
            else:
                yield part
                if depth < _DEPTH:
                    waiting += [(each, depth + 1) for each in _referred(part)]


def _referred(part: Any) -> Iterator[Any]:
    if isinstance(part, functools.partial):
        yield from (part.func, *part.args, *part.keywords.values())
    elif isinstance(part, types.MethodType):
        yield from (part.__func__, part.__self__)
        yield from vars(part.__self__).values() if hasattr(part.__self__, "__dict__") and not _is_module(part.__self__) else ()
    elif isinstance(part, types.FunctionType):
        for cell in part.__closure__ or ():
            with suppress(ValueError):  # a name that has no value yet
                yield cell.cell_contents
        module = part.__module__ or ""
        if not module.startswith("torch."):  # its functions refer to the whole library
            yield from (part.__globals__[name] for name in part.__code__.co_names if name in part.__globals__)
    elif not isinstance(part, (types.BuiltinFunctionType, types.ModuleType)):
        yield from vars(part).values() if hasattr(part, "__dict__") else ()  # an object with a __call__
        yield type(part).__call__
    if hasattr(part, "__wrapped__"):
        yield part.__wrapped__
