"""Fake CUDA: torch trains on CUDA tensors without a card, without memory and without arithmetic, but with every operator's shapes.

It changes the whole process and depends on torch's internals. Use it in a separate process. `self_test` checks that it works with
the installed torch. It needs Linux on x86-64. It was tested with torch 2.11, 2.13 and 2.15, CPU builds and CUDA builds without a card.
"""

from __future__ import annotations

import atexit
import ctypes
import logging
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

_kept: list[Any] = []  # C code points to these objects, so they must live as long as the process


class PhantomMode(FakeTensorMode):
    """Makes fake tensors. It never asks for a card, also while the job is told that there is one, and runs nothing on one to learn shapes."""

    avoid_device_init = property(lambda self: True)  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__(allow_fallback_kernels=False, allow_non_fake_inputs=True)


class CannotFake(Exception):
    """This torch or this system does not support tracing on fake CUDA tensors."""


def fake_cuda() -> str:
    """Runs `enable` and `self_test`. Returns "" if both succeed, otherwise the reason in words."""
    try:
        enable()
        self_test()
    except CannotFake as reason:
        return str(reason)
    return ""


def enable() -> None:
    """Turns on fake CUDA for this process; a second call does nothing. Raises `CannotFake` with the reason."""
    if _kept:
        return
    if not sys.platform.startswith("linux") or os.uname().machine != "x86_64":
        raise CannotFake(f"tracing CUDA tensors without a card is known to work on Linux x86-64 only, not on {sys.platform}")
    if not hasattr(torch._C, "_ensureCUDADeviceGuardSet"):
        raise CannotFake(f"torch {torch.__version__} has no stand-in for CUDA's device guard; 2.11 and later have")
    if torch.cuda.is_initialized():
        raise CannotFake("this process uses a card already, and its tensors cannot be told from those that are not there")
    _kept.append("enabled")
    # Hide a real card: torch would make a context on it for the first fake tensor.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    _set(torch.cuda, "is_available", lambda: False)
    _stand_in_for_the_driver()
    _kernels_that_a_cpu_build_lacks()
    _switches()


def self_test() -> None:
    """Trains a small network with autocast, and with a fused and an unfused optimizer. Raises `CannotFake` with the failure."""
    try:
        with FakeTensorMode():
            model = torch.nn.Linear(4, 4, device="cuda")
            for fused in (False, True):
                optimizer = torch.optim.Adam(model.parameters(), fused=fused)
                with torch.autocast("cuda", torch.bfloat16):
                    out = model(torch.empty(2, 4, device="cuda"))
                if out.dtype is not torch.bfloat16:
                    raise CannotFake("autocast turned itself off")
                out.float().sum().backward()
                if model.weight.grad is None or model.weight.grad.device.type != "cuda":
                    raise CannotFake("backward left no gradient")
                optimizer.step()
                optimizer.zero_grad()
    except CannotFake:
        raise
    except Exception as error:
        raise CannotFake(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error


def _stand_in_for_the_driver() -> None:
    """Replaces CUDA's device guard and hooks. Autograd calls them, and without a card their answers end the process.

    A stub in c10's registry makes torch install its own fake guard. Two entries in the table of CUDA's hooks, isBuilt (2) and
    hasPrimaryContext (4), answer that this build has CUDA but no context.
    """
    library = os.path.join(os.path.dirname(torch.__file__), "lib")
    core = ctypes.CDLL(f"{library}/libc10.so")
    try:
        registry = (ctypes.c_void_p * 24).in_dll(core, "_ZN3c104impl26device_guard_impl_registryE")
        get_hooks = ctypes.CDLL(f"{library}/libtorch_cpu.so")["_ZN2at6detail12getCUDAHooksEv"]
    except (OSError, ValueError, AttributeError) as error:
        raise CannotFake(f"torch {torch.__version__} is built otherwise than expected: {error}") from error
    none = ctypes.CFUNCTYPE(ctypes.c_int8, ctypes.c_void_p)(lambda _: 0)
    table = (ctypes.c_void_p * 128)(*[_address(none)] * 128)
    stub = (ctypes.c_void_p * 2)(ctypes.addressof(table), 0)
    _kept.extend([none, table, stub])
    # Replace a real guard too: it would report a real card, and torch would keep it.
    registry[1] = ctypes.addressof(stub)
    torch._C._ensureCUDADeviceGuardSet()
    if registry[1] == ctypes.addressof(stub):
        raise CannotFake(f"torch {torch.__version__} kept the stub of CUDA's device guard")
    get_hooks.restype = ctypes.c_void_p
    hooks = ctypes.cast(get_hooks(), ctypes.POINTER(ctypes.c_void_p))
    answers = (ctypes.c_void_p * 160)()
    ctypes.memmove(answers, hooks[0], ctypes.sizeof(answers))
    yes = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)(lambda _: True)
    no = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_int8)(lambda _, device: False)
    answers[2], answers[4] = _address(yes), _address(no)
    _kept.extend([yes, no, answers])
    before = hooks[0]
    hooks[0] = ctypes.addressof(answers)
    # torch's destructors call the hooks at the end of the process, when Python's functions no longer exist.
    atexit.register(hooks.__setitem__, 0, before)


def _address(function: Any) -> int | None:
    return ctypes.cast(function, ctypes.c_void_p).value


def _kernels_that_a_cpu_build_lacks() -> None:
    """Registers CUDA kernels for three operators.

    Without one, torch decomposes the operator; one of them then makes five temporaries.
    """
    if torch._C._dispatch_has_kernel_for_dispatch_key("aten::silu_backward", "CUDA"):
        return

    def never(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("there is no CUDA kernel here")

    library = torch.library.Library("aten", "IMPL")
    _kept.append(library)
    for name in ("silu_backward", "mish_backward", "_fused_rms_norm"):
        with suppress(RuntimeError):  # an operator that this torch does not have
            library.impl(name, never, "CUDA")
    # The choice of the fused rms_norm is compiled into torch.
    with suppress(RuntimeError):
        library.impl("rms_norm", lambda x, shape, weight=None, eps=None: torch.ops.aten._fused_rms_norm(x, shape, weight, eps)[0], "AutogradCUDA")


def _switches() -> None:
    """Makes autocast and the optimizers use the code path for CUDA. They check for a card and would use the CPU path."""
    import torch.optim.optimizer as optimizers
    import torch.utils._foreach_utils as foreach
    from torch._subclasses.fake_tensor import FakeTensor

    _set(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    _set(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    _set(torch.cuda, "is_current_stream_capturing", lambda: False)
    for kinds in (optimizers._foreach_supported_types, foreach._foreach_supported_types):
        if FakeTensor not in kinds:
            kinds.append(FakeTensor)


def quieten_transformers() -> None:
    """Makes transformers treat fake tensors as real ones.

    It would assume that it is traced, and build masks that training never builds.
    """
    module = sys.modules.get("transformers.utils.import_utils")
    if module is not None:
        _set(module, "is_fake_tensor", lambda _: False)


def _set(module: Any, name: str, value: Callable[..., Any]) -> None:
    setattr(module, name, value)


def quieten_torch() -> None:
    """Hides torch's warnings about the simulating machine. They are not about the simulated card or the job."""
    for message in ("torch.cuda.amp.GradScaler is enabled, but CUDA", "PyTorch was compiled without cuDNN", "Failed to initialize NumPy"):
        warnings.filterwarnings("ignore", message=message)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.|peft\.")  # names that these libraries call each other by
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells which kernels of the CPU could not be loaded
