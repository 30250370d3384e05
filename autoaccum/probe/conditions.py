"""What a job's readings depend on, in words and digests: if any of it changes, they say nothing any more."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import inspect
import os
import site
import sys
import types
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from autoaccum.data import batches
from autoaccum.window import Job, fingerprint

# Hyperparameters that change every run and never what a step takes.
_RATES = ("lr", "initial_lr", "weight_decay")
_LIBRARIES = tuple({str(Path(inspect.getfile(os)).parent), *site.getsitepackages(), os.path.join(sys.prefix, "lib")})
_ENVIRONMENT = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_NO_CUDA_MEMORY_CACHING", "CUBLAS_WORKSPACE_CONFIG", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")


def of(jobs: Sequence[Job]) -> dict[str, str]:
    """By what each is about: parameters, optimizers, layers, modes, code, batch, settings, libraries. Makes one batch of one sample."""
    modules = [module for job in jobs for module in job.model.modules()]
    written = list(_written(jobs, modules))
    return {
        "parameters": fingerprint(jobs),
        "optimizers": _digest(_settings(each) for job in jobs for each in job.optimizers),
        "layers": _digest(repr(job.model) for job in jobs),
        "modes": _digest(_mode(module) for module in modules),
        "kept": _digest(f"{type(each).__qualname__} {_tensors(vars(each).values()) if hasattr(each, '__dict__') else ''}" for job in jobs for each in job.keep),
        "code": _digest(_code(each) for each in written),
        "batch": _digest(f"{path} {tuple(each.shape[1:])} {each.dtype}" for path, each in batches.tensors(_sample(jobs[0]))),
        "settings": _digest(_torch_settings(jobs[0].device)),
        "libraries": _digest(_versions(written)),
    }


def sample_bytes(job: Job) -> int:
    """Host bytes of one sample of a batch."""
    return batches.nbytes(_sample(job))


def _plain_values(attributes: dict[str, Any]) -> str:
    return repr(sorted((name, value) for name, value in attributes.items() if _is_plain(value) and not isinstance(value, tuple)))


def _sample(job: Job) -> Any:
    return job.batch_of(1) if job.split is None or callable(job.batch) else job.batch


def _settings(optimizer: torch.optim.Optimizer) -> str:
    """What it steps and how, and the state that is there already: a job that goes on holds it from the beginning."""
    told = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
    for group in optimizer.param_groups:
        options = sorted((name, str(value)) for name, value in group.items() if name != "params" and name not in _RATES)
        told += f" {options} {_tensors(group['params'])}"
    return told + "".join(_tensors(state.values()) for state in optimizer.state.values())


def _tensors(values: Iterable[Any]) -> str:
    return str([(tuple(each.shape), str(each.dtype)) for each in values if isinstance(each, torch.Tensor)])


def _mode(module: torch.nn.Module) -> str:
    """Flags such as Transformers' `gradient_checkpointing`, which no repr shows, what its configuration holds, buffers, hooks, and what wraps it."""
    told = _plain_values(vars(module)) + _tensors(module.buffers(recurse=False))
    told += str([(name, len(hooks)) for name, hooks in sorted(vars(module).items()) if name.endswith("_hooks") and isinstance(hooks, dict)])
    told += str((getattr(module, "_compiled_call_impl", None) is not None, "forward" in vars(module)))
    config = getattr(module, "config", None)
    return told + (_plain_values(vars(config)) if hasattr(config, "__dict__") else "")


def _versions(written: Iterable[Any]) -> Iterable[str]:
    """Of the libraries that the job's classes and functions come from."""
    for package in sorted({str(getattr(each, "__module__", "")).partition(".")[0] for each in written} - {"", "builtins", "__main__"}):
        try:
            yield f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:  # the user's own
            continue


def _torch_settings(device: torch.device) -> Iterable[str]:
    yield str(torch.get_default_dtype())
    yield torch.get_float32_matmul_precision()
    yield str(torch.are_deterministic_algorithms_enabled())
    yield str((torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic))
    yield str((torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()))
    if device.type == "cpu":
        yield str(torch.get_num_threads())  # each takes a workspace of its own
        yield str(torch.backends.mkldnn.enabled)
    for name in _ENVIRONMENT:
        yield f"{name}={os.environ.get(name, '')}"


def _written(jobs: Sequence[Job], modules: Iterable[torch.nn.Module]) -> Iterable[Any]:
    """Classes and functions that the user wrote, each once."""
    found: dict[int, Any] = {}
    for each in (*(type(module) for module in modules), *(part for job in jobs for part in (job.loss, job.batch, job.count, job.split))):
        found.setdefault(id(each), each)
    return found.values()


def _code(of: Any) -> str:
    """What it is made of: its own code, the plain values that it closes over or holds, and the file that it stands in, on which it may depend; a
    library's only by its name, since libraries are told by their version."""
    if isinstance(of, functools.partial):
        return f"{[each for each in (*of.args, *sorted(of.keywords.items())) if _is_plain(each)]}" + _code(of.func)
    if isinstance(of, types.MethodType):
        return _code(of.__func__) + _plain_values(getattr(of.__self__, "__dict__", {}))
    if not isinstance(of, (types.FunctionType, type)):
        return _code(type(of)) + _plain_values(vars(of)) if callable(of) and hasattr(of, "__dict__") else ""  # else a batch that is data
    name = f"{of.__module__}.{of.__qualname__}"
    try:
        path = inspect.getsourcefile(of)
    except (TypeError, OSError):  # written in C, or in a notebook
        path = None
    if path is not None and path.startswith(_LIBRARIES):
        return name
    written = vars(of).values() if isinstance(of, type) else [of]
    told = name + "".join(_instructions(each) for each in written if isinstance(each, types.FunctionType))
    return told + (hashlib.sha256(Path(path).read_bytes()).hexdigest() if path is not None and os.path.isfile(path) else "")


def _instructions(function: types.FunctionType) -> str:
    """Of a function and those inside it. Not marshalled: what that writes depends on who else refers to the same constants."""
    held = [cell.cell_contents for cell in function.__closure__ or () if _filled(cell)]
    told, waiting = (
        repr([each for each in (*held, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).items()) if _is_plain(each)]),
        [function.__code__],
    )
    while waiting:
        code = waiting.pop()
        told += f"{code.co_code.hex()}{code.co_names}{[each for each in code.co_consts if _is_plain(each)]}"
        waiting += [each for each in code.co_consts if isinstance(each, types.CodeType)]
    return told


def _is_plain(value: Any) -> bool:
    """Whether its repr says what it is, in every process."""
    return isinstance(value, (bool, int, float, str, torch.dtype, type(None))) or (isinstance(value, tuple) and all(map(_is_plain, value)))


def _filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - an empty one raises
    except ValueError:
        return False
    return True


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
