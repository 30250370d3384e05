"""The key of a job's readings: digests of everything that the readings depend on.

If one of the digests changes, the readings are no longer valid.
"""

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

# Hyperparameters that differ between runs and do not change the memory of a step.
_RATES = ("lr", "initial_lr", "weight_decay")
_LIBRARIES = tuple({str(Path(inspect.getfile(os)).parent), *site.getsitepackages(), os.path.join(sys.prefix, "lib")})
_ENVIRONMENT = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_NO_CUDA_MEMORY_CACHING", "CUBLAS_WORKSPACE_CONFIG", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")


def of(jobs: Sequence[Job]) -> dict[str, str]:
    """The digests by topic: parameters, optimizers, layers, modes, kept state, code, batch, settings, libraries.

    It makes one batch of one sample.
    """
    modules = [module for job in jobs for module in job.model.modules()]
    definitions = list(_definitions(jobs, modules))
    return {
        "parameters": fingerprint(jobs),
        "optimizers": _digest(_settings(item) for job in jobs for item in job.optimizers),
        "layers": _digest(repr(job.model) for job in jobs),
        "modes": _digest(_mode(module) for module in modules),
        "kept": _digest(f"{type(item).__qualname__} {_tensors(vars(item).values()) if hasattr(item, '__dict__') else ''}" for job in jobs for item in job.keep),
        "code": _digest(_code(item) for item in definitions),
        "batch": _digest(f"{path} {tuple(item.shape[1:])} {item.dtype}" for path, item in batches.tensors(_sample(jobs[0]))),
        "settings": _digest(_torch_settings(jobs[0].device)),
        "libraries": _digest(_versions(definitions)),
    }


def sample_bytes(job: Job) -> int:
    """The bytes that one sample of a batch takes on the host."""
    return batches.nbytes(_sample(job))


def _plain_values(attributes: dict[str, Any]) -> str:
    return repr(sorted((name, value) for name, value in attributes.items() if _is_plain(value) and not isinstance(value, tuple)))


def _sample(job: Job) -> Any:
    return job.batch_of(1) if job.split is None or callable(job.batch) else job.batch


def _settings(optimizer: torch.optim.Optimizer) -> str:
    """The optimizer's class, its options, and the shapes of its parameters and state. A resumed job holds its state from the start."""
    text = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
    for group in optimizer.param_groups:
        options = sorted((name, str(value)) for name, value in group.items() if name != "params" and name not in _RATES)
        text += f" {options} {_tensors(group['params'])}"
    return text + "".join(_tensors(state.values()) for state in optimizer.state.values())


def _tensors(values: Iterable[Any]) -> str:
    return str([(tuple(value.shape), str(value.dtype)) for value in values if isinstance(value, torch.Tensor)])


def _mode(module: torch.nn.Module) -> str:
    """The module's plain attributes, buffers, number of hooks, wrappers and configuration.

    The attributes hold flags that no repr shows, such as `gradient_checkpointing` of Transformers.
    """
    text = _plain_values(vars(module)) + _tensors(module.buffers(recurse=False))
    text += str([(name, len(hooks)) for name, hooks in sorted(vars(module).items()) if name.endswith("_hooks") and isinstance(hooks, dict)])
    text += str((getattr(module, "_compiled_call_impl", None) is not None, "forward" in vars(module)))
    config = getattr(module, "config", None)
    return text + (_plain_values(vars(config)) if hasattr(config, "__dict__") else "")


def _versions(definitions: Iterable[Any]) -> Iterable[str]:
    """The versions of the libraries that define the job's classes and functions."""
    for package in sorted({str(getattr(definition, "__module__", "")).partition(".")[0] for definition in definitions} - {"", "builtins", "__main__"}):
        try:
            yield f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:  # a module of the user
            continue


def _torch_settings(device: torch.device) -> Iterable[str]:
    yield str(torch.get_default_dtype())
    yield torch.get_float32_matmul_precision()
    yield str(torch.are_deterministic_algorithms_enabled())
    yield str((torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic))
    yield str((torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()))
    if device.type == "cpu":
        yield str(torch.get_num_threads())  # each thread has its own workspace
        yield str(torch.backends.mkldnn.enabled)
    for name in _ENVIRONMENT:
        yield f"{name}={os.environ.get(name, '')}"


def _definitions(jobs: Sequence[Job], modules: Iterable[torch.nn.Module]) -> Iterable[Any]:
    """The module classes, and the job's loss, batch, count and split, without duplicates."""
    definitions: dict[int, Any] = {}
    for definition in (*(type(module) for module in modules), *(part for job in jobs for part in (job.loss, job.batch, job.count, job.split))):
        definitions.setdefault(id(definition), definition)
    return definitions.values()


def _code(value: Any) -> str:
    """A text that changes if the code of `value` changes.

    It holds the bytecode, the plain values that the code closes over or holds, and the digest of the source file, because the code
    may depend on the rest of the file. For code of a library it holds only the name; `_versions` covers the library.
    """
    if isinstance(value, functools.partial):
        return f"{[part for part in (*value.args, *sorted(value.keywords.items())) if _is_plain(part)]}" + _code(value.func)
    if isinstance(value, types.MethodType):
        return _code(value.__func__) + _plain_values(getattr(value.__self__, "__dict__", {}))
    if not isinstance(value, (types.FunctionType, type)):
        return _code(type(value)) + _plain_values(vars(value)) if callable(value) and hasattr(value, "__dict__") else ""  # not callable: a batch that is data
    name = f"{value.__module__}.{value.__qualname__}"
    try:
        path = inspect.getsourcefile(value)
    except (TypeError, OSError):  # written in C, or in a notebook
        path = None
    if path is not None and path.startswith(_LIBRARIES):
        return name
    members = vars(value).values() if isinstance(value, type) else [value]
    text = name + "".join(_instructions(part) for part in members if isinstance(part, types.FunctionType))
    return text + (hashlib.sha256(Path(path).read_bytes()).hexdigest() if path is not None and os.path.isfile(path) else "")


def _instructions(function: types.FunctionType) -> str:
    """The bytecode, names and constants of a function and of the functions inside it.

    `marshal` is not used: its output depends on how many other references to the same constants exist.
    """
    closed_over = [cell.cell_contents for cell in function.__closure__ or () if _filled(cell)]
    text, waiting = (
        repr([value for value in (*closed_over, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).items()) if _is_plain(value)]),
        [function.__code__],
    )
    while waiting:
        code = waiting.pop()
        text += f"{code.co_code.hex()}{code.co_names}{[value for value in code.co_consts if _is_plain(value)]}"
        waiting += [value for value in code.co_consts if isinstance(value, types.CodeType)]
    return text


def _is_plain(value: Any) -> bool:
    """True if the value's repr identifies it and is the same in every process."""
    return isinstance(value, (bool, int, float, str, torch.dtype, type(None))) or (isinstance(value, tuple) and all(map(_is_plain, value)))


def _filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - an empty cell raises
    except ValueError:
        return False
    return True


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
