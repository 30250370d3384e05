"""Makes torch train on CUDA tensors that are not there: no card, no memory, no arithmetic, but every operator's shapes.

All of it is process-wide and bound to torch's inside, so it belongs in a process of its own, and `self_test` says
whether it works with the torch that is installed. Linux on x86-64; seen with torch 2.11, 2.13 and 2.15, CPU builds and
CUDA builds without a card.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

_kept: list[Any] = []  # what C code points to must live as long as the process


class CannotFake(Exception):
    """This torch, or this system, does not let itself be traced on CUDA tensors that are not there."""


def fake_cuda() -> str:
    """`enable` and `self_test`: "" where both succeed, else the reason, in words."""
    try:
        enable()
        self_test()
    except CannotFake as reason:
        return str(reason)
    return ""


def enable() -> None:
    """Once per process. Raises `CannotFake` with the reason."""
    if _kept:
        return
    if not sys.platform.startswith("linux") or os.uname().machine != "x86_64":
        raise CannotFake(f"tracing CUDA tensors without a card is known to work on Linux x86-64 only, not on {sys.platform}")
    if not hasattr(torch._C, "_ensureCUDADeviceGuardSet"):
        raise CannotFake(f"torch {torch.__version__} has no stand-in for CUDA's device guard; 2.11 and later have")
    if torch.cuda.is_initialized():
        raise CannotFake("this process uses a card already, and its tensors cannot be told from those that are not there")
    _kept.append("enabled")
    # A card that is here stays untouched: torch would make a context on it for the first fake tensor.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    _set(torch.cuda, "is_available", lambda: False)
    _stand_in_for_the_driver()
    _kernels_that_a_cpu_build_lacks()
    _switches()


def self_test() -> None:
    """Trains a network of two layers in every way that is simulated. Raises `CannotFake` with what went wrong."""
    from torch._subclasses.fake_tensor import FakeTensorMode

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
    """Autograd asks for CUDA's device guard and whether CUDA was built in; without a card the answers end the process.

    A stub in c10's registry makes torch put its own fake guard there, and two entries of the table of CUDA's hooks
    answer for a build that has CUDA and no context: isBuilt (2) and hasPrimaryContext (4).
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
    # Also in the place of a real guard: where a card is here, that would count as one card and stay.
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
    # Python's functions are gone when torch's own destructors ask at the end of the process.
    atexit.register(hooks.__setitem__, 0, before)


def _address(function: Any) -> int | None:
    return ctypes.cast(function, ctypes.c_void_p).value


def _kernels_that_a_cpu_build_lacks() -> None:
    """Three operators are taken apart where no CUDA kernel is registered, five temporaries for one of them."""
    if torch._C._dispatch_has_kernel_for_dispatch_key("aten::silu_backward", "CUDA"):
        return

    def never(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("there is no CUDA kernel here")

    library = torch.library.Library("aten", "IMPL")
    _kept.append(library)
    for name in ("silu_backward", "mish_backward", "_fused_rms_norm"):
        with suppress(RuntimeError):  # an operator that this torch does not have
            library.impl(name, never, "CUDA")
    # rms_norm takes its fused form by a choice made when torch was compiled.
    with suppress(RuntimeError):
        library.impl("rms_norm", lambda x, shape, weight=None, eps=None: torch.ops.aten._fused_rms_norm(x, shape, weight, eps)[0], "AutogradCUDA")


def _switches() -> None:
    """Autocast and the optimizers look at what is there, and would take the path of a machine without a card."""
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
    """transformers takes a fake tensor for a sign of being traced and builds masks that training never makes."""
    found = sys.modules.get("transformers.utils.import_utils")
    if found is not None:
        _set(found, "is_fake_tensor", lambda _: False)


def _set(module: Any, name: str, value: Callable[..., Any]) -> None:
    setattr(module, name, value)


def quieten_torch() -> None:
    """Hides torch's warnings about the machine that simulates: they say nothing about the card or the job."""
    for message in ("torch.cuda.amp.GradScaler is enabled, but CUDA", "PyTorch was compiled without cuDNN", "Failed to initialize NumPy"):
        warnings.filterwarnings("ignore", message=message)
