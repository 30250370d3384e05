"""What a job's readings depend on, in words and digests: if any of it changes, they say nothing any more."""

from __future__ import annotations

import hashlib
import inspect
import marshal
import os
import site
import sys
import types
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from autoaccum import batches
from autoaccum.job import Job, fingerprint

# Hyperparameters that change every run and never what a step takes.
_RATES = ("lr", "initial_lr", "weight_decay")
_ENVIRONMENT = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_NO_CUDA_MEMORY_CACHING", "CUBLAS_WORKSPACE_CONFIG", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")


def of(jobs: Sequence[Job]) -> dict[str, str]:
    """By what each is about: parameters, optimizers, layers, modes, code, batch, settings. Makes one batch of one sample."""
    modules = [module for job in jobs for module in job.model.modules()]
    return {
        "parameters": fingerprint(jobs),
        "optimizers": _digest(_settings(each) for job in jobs for each in job.optimizers),
        "layers": _digest(repr(job.model) for job in jobs),
        # `gradient_checkpointing` is Transformers' flag, which no repr shows.
        "modes": _digest(f"{module.training}{getattr(module, 'gradient_checkpointing', '')}{hasattr(module, '_orig_mod')}" for module in modules),
        "code": _digest(_code(module_or_function) for module_or_function in _written(jobs, modules)),
        "batch": _digest(f"{path} {tuple(each.shape[1:])} {each.dtype}" for path, each in batches.tensors(_sample(jobs[0]))),
        "settings": _digest(_torch_settings(jobs[0].device)),
    }


def sample_bytes(job: Job) -> int:
    """Host bytes of one sample of a batch."""
    return batches.nbytes(_sample(job))


def _sample(job: Job) -> Any:
    return job.batch_of(1) if job.split is None or callable(job.batch) else job.batch


def _settings(optimizer: torch.optim.Optimizer) -> str:
    kept = {name: str(value) for name, value in optimizer.defaults.items() if name not in _RATES}
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__} {sorted(kept.items())}"


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
    """The file it stands in, as a digest; a library's by its name, since libraries are told by their version. A function's own code
    where there is no file (a notebook's cell), and the plain values that it closes over."""
    told = ""
    function = getattr(of, "func", of)  # functools.partial
    if isinstance(function, types.MethodType):
        function = function.__func__
    if isinstance(function, types.FunctionType):
        held = [cell.cell_contents for cell in function.__closure__ or () if _filled(cell)]
        plain = [each for each in (*held, *(function.__defaults__ or ())) if isinstance(each, (bool, int, float, str, type(None)))]
        told = repr(plain) + hashlib.sha256(marshal.dumps(function.__code__)).hexdigest()
    elif not isinstance(function, type):
        return ""  # a batch that is data
    try:
        path = inspect.getsourcefile(function)
    except TypeError:  # written in C, or in a session that is over
        path = None
    if path is None or not os.path.isfile(path):
        return told or f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', '')}"
    if path.startswith(_LIBRARIES):
        return f"{function.__module__}.{function.__qualname__}"
    return told + hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - an empty one raises
    except ValueError:
        return False
    return True


_LIBRARIES = tuple({str(Path(inspect.getfile(os)).parent), *site.getsitepackages(), os.path.join(sys.prefix, "lib")})


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
