"""What runs at the start of every Python process of a command, as its `sitecustomize`: it writes down what training did.

A trial puts a folder with a copy of this file on PYTHONPATH. Lines are appended to the file that AUTOACCUM_EVIDENCE names, at most one of
each kind in a process: "python" (this file runs), "torch" (an optimizer can be seen to step), "step SECONDS" (the first step, on the monotonic clock), "steps N" (at
the end), "world N" (a process group of N ranks), "shrunk NAME" (a finder of batch sizes met an out-of-memory and goes on with less),
"refused N" (allocations that torch's CUDA allocator refused, at the end), "used INDEX UUID PEAK" (a CUDA device on which it reserved memory,
with its most, at the end), "uncapped INDEX" (one whose cap is not in force). It imports nothing from autoaccum, is read by whatever Python the
command has, and never fails: what it cannot see is not written.

It also caps what torch may reserve on a CUDA device at AUTOACCUM_CAP_BYTES, where that is set. The environment's PYTORCH_CUDA_ALLOC_CONF says
the same, and a script may overwrite it.
"""

from __future__ import annotations

import atexit
import os
import sys
import time

TYPE_CHECKING = False  # as typing has it, whose import takes longer than all of this
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_OWN_FOLDER = os.path.dirname(os.path.abspath(__file__))
_steps = 0
_written: set[str] = set()


def _write(line: str) -> None:
    try:
        descriptor = os.open(os.environ["AUTOACCUM_EVIDENCE"], os.O_WRONLY | os.O_APPEND)
        try:
            os.write(descriptor, (line + "\n").encode())
        finally:
            os.close(descriptor)
    except (OSError, KeyError):
        pass  # the trial is over, or its folder is not visible here


def _once(kind: str, line: str) -> None:
    if kind not in _written:
        _written.add(kind)
        _write(line)


def _watch_steps(module: Any) -> None:
    def stepped(*_: object) -> None:
        global _steps
        if not _steps:
            _once("step", f"step {time.monotonic()!r}")
        _steps += 1
        if _steps in (2, 8):  # a process that is ended does not come to its end
            _tell_devices()

    module.register_optimizer_step_post_hook(stepped)
    _once("torch", "torch")


def _watch_ranks(module: Any) -> None:
    original = module.init_process_group

    def init_process_group(*given: Any, **named: Any) -> Any:
        result = original(*given, **named)
        _once("world", f"world {module.get_world_size()}")
        return result

    init_process_group.__doc__ = original.__doc__
    module.init_process_group = init_process_group


def _cap_cuda(module: Any) -> None:
    cap_bytes = int(os.environ.get("AUTOACCUM_CAP_BYTES", 0))
    if not cap_bytes:
        return
    set_fraction, set_device = module.set_per_process_memory_fraction, module.set_device

    def set_per_process_memory_fraction(fraction: float, device: Any = None) -> None:
        index = module._utils._get_device_index(device, optional=True)
        set_fraction(min(fraction, cap_bytes / module.get_device_properties(index).total_memory), device)

    capped: set[int] = set()

    def cap() -> None:
        # The current device alone, because a cap makes a context, which takes memory; and once, because the script may lower it afterwards.
        try:
            index = module.current_device()
            if index not in capped:
                capped.add(index)
                module.set_per_process_memory_fraction(1.0, index)
        except Exception:
            pass  # what is not capped is told at the end

    def set_device_and_cap(device: Any) -> None:
        set_device(device)
        if module.is_initialized():
            cap()

    module.set_per_process_memory_fraction, module.set_device = set_per_process_memory_fraction, set_device_and_cap
    module._lazy_call(cap)  # when CUDA is first used


def _watch_finder(name: str, finder: str) -> Callable[[Any], None]:
    """A function `name(error)` that says whether to go on with a smaller batch."""

    def watch(module: Any) -> None:
        original = getattr(module, name)

        def wrapped(*given: Any, **named: Any) -> Any:
            result = original(*given, **named)
            if result:
                _once("shrunk", "shrunk " + finder)
            return result

        setattr(module, name, wrapped)

    return watch


_WATCHED: dict[str, Callable[[Any], None]] = {
    "torch.optim.optimizer": _watch_steps,
    "torch.distributed.distributed_c10d": _watch_ranks,
    "torch.cuda": _cap_cuda,
    "accelerate.utils.memory": _watch_finder("should_reduce_batch_size", "accelerate's find_executable_batch_size (auto_find_batch_size of Transformers)"),
    "lightning.pytorch.utilities.memory": _watch_finder("is_oom_error", "Lightning's BatchSizeFinder"),
    "pytorch_lightning.utilities.memory": _watch_finder("is_oom_error", "Lightning's BatchSizeFinder"),
}


class _Finder:
    """Lets the other finders find a module, and looks at it once it has run."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
        if name not in _WATCHED:
            return None
        for finder in sys.meta_path:
            spec = None if finder is _Finder else finder.find_spec(name, path, target)
            if spec is not None:
                break
        else:
            return None
        execute = getattr(spec.loader, "exec_module", None)
        if execute is None:
            return spec

        def exec_module(module: Any) -> None:
            execute(module)
            try:
                _WATCHED[name](module)
            except Exception:
                pass  # a version that has no such function

        try:
            spec.loader.exec_module = exec_module  # type: ignore[method-assign,union-attr]
        except AttributeError:
            pass
        return spec


def _tell_devices() -> None:
    try:
        cuda = sys.modules["torch"].cuda
        if cuda.is_initialized():
            for index in range(cuda.device_count()):
                if peak := cuda.max_memory_reserved(index):
                    _tell_device(cuda, index, peak)
    except Exception:
        pass


def _tell_device(cuda: Any, index: int, peak: int) -> None:
    properties = cuda.get_device_properties(index)
    _write(f"used {index} {getattr(properties, 'uuid', '-')} {peak}")
    cap_bytes = int(os.environ.get("AUTOACCUM_CAP_BYTES", 0))
    get_fraction = getattr(cuda, "get_per_process_memory_fraction", None)  # torch 2.8 and later
    if cap_bytes and get_fraction is not None and get_fraction(index) * properties.total_memory > cap_bytes + 2**21:
        _write(f"uncapped {index}")


def _at_the_end() -> None:
    if _steps:
        _write(f"steps {_steps}")
    try:
        cuda = sys.modules["torch"].cuda
        if cuda.is_initialized():
            refused = sum(cuda.memory_stats(index).get("num_ooms", 0) for index in range(cuda.device_count()))
            if refused:
                _write(f"refused {refused}")
            _tell_devices()
    except Exception:
        pass  # no torch, or a device that is lost


def _run_the_users_own() -> None:
    """Runs the `sitecustomize` that this file stands in front of, if there is one."""
    import importlib.machinery
    import importlib.util

    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", [entry for entry in sys.path if os.path.abspath(entry or ".") != _OWN_FOLDER])
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


if __name__ == "sitecustomize":
    sys.meta_path.insert(0, _Finder)  # type: ignore[arg-type] # the class itself, whose method is static
    atexit.register(_at_the_end)
    _write("python")
    _run_the_users_own()
