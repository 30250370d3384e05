"""Keep the training state, hand it back untouched.

What is kept is what the objects hold, not what their `state_dict` shows: contents of every tensor
(non-persistent buffers and plain attributes of modules too), which object sits under which name,
gradients, modes, and the random number generators. Tensors are kept by storage, so tied weights and
views are copied once and come back in place.
"""

from __future__ import annotations

import random
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from functools import partial
from types import FrameType, FunctionType, MethodType, ModuleType
from typing import Any

import psutil
import torch

from autoaccum.errors import DeviceError
from autoaccum.job import Job
from autoaccum.units import in_words

Undo = Callable[[], object]


class Snapshot:
    """The state of a job at one moment. `host_bytes` is what the copies take in host memory.

    parameters: False leaves out the contents of trainable parameters, for a process whose weights nobody
    needs afterwards. Raises `DeviceError` with the figures when host memory is too short for the copies.
    """

    def __init__(self, job: Job, *, parameters: bool = True) -> None:
        self._parameters = parameters
        self._seen: dict[int, Any] = {}  # holds the objects too, so that no id is used twice
        self._undo: list[Undo] = []
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._grads: list[torch.Tensor] = []
        self._visit(job.model)
        for each in (*job.optimizers, job.scaler, job.scheduler, job.loss):
            self._visit(each)
        for each in job.keep:
            self._visit(each, deep=True)
        self.host_bytes = sum(storage.nbytes() for storage in self._storages.values())
        self.host_bytes += sum(leaf.grad.nbytes for leaf in self._grads if leaf.grad is not None)
        free = psutil.virtual_memory().available
        if self.host_bytes > free:
            raise DeviceError(
                f"a copy of the training state needs {in_words(self.host_bytes)} of host memory and {in_words(free)} are free: "
                "free some, or tune in a process of its own, which needs no copy (the command line does)"
            )
        self._contents = [(storage, _host_copy(storage)) for storage in self._storages.values()]
        self._kept_grads = [(leaf, leaf.grad, _host_grad(leaf.grad)) for leaf in self._grads if leaf.grad is not None]
        self._modes = _modes()
        self._rng = _rng()

    def rewind(self) -> None:
        """Makes everything as it was, but for gradients: those are set aside, so that trials start without.

        May be called again and again.
        """
        for undo in self._undo:
            undo()
        with torch.no_grad():
            for storage, content in self._contents:
                storage.copy_(content)
        for leaf in self._grads:
            leaf.grad = None
        for _, grad, _ in self._kept_grads:
            grad.data = grad.data.new_empty(0)
        for undo in (*self._modes, *self._rng):
            undo()

    def put_back(self) -> None:
        """Makes everything as it was, gradients included."""
        self.rewind()
        for leaf, grad, kept in self._kept_grads:
            grad.data = kept.to(leaf.device, copy=True)
            leaf.grad = grad

    def _visit(self, item: Any, *, deep: bool = False) -> None:
        if id(item) in self._seen or isinstance(item, (str, bytes, int, float, type(None), type, ModuleType, FunctionType, MethodType)):
            return
        self._seen[id(item)] = item
        if isinstance(item, torch.Tensor):
            self._keep_tensor(item)
        elif isinstance(item, random.Random):
            self._undo.append(partial(item.setstate, item.getstate()))
        elif isinstance(item, MutableMapping) or type(item).__name__ == "mappingproxy":
            self._keep_mapping(item, deep)
        elif isinstance(item, (list, deque)):
            self._undo.append(partial(_refill, item, list(item)))
            self._visit_all(item, deep)
        elif isinstance(item, set):
            self._undo.append(partial(_refill_mapping, item, set(item)))
            self._visit_all(item, deep)
        elif isinstance(item, tuple):
            self._visit_all(item, deep)
        elif _is_array(item):
            self._undo.append(partial(item.__setitem__, ..., item.copy()))
        elif hasattr(item, "get_state") and hasattr(item, "set_state"):  # torch.Generator, numpy.random.RandomState
            self._undo.append(partial(item.set_state, item.get_state()))
        elif hasattr(item, "bit_generator"):  # numpy.random.Generator
            self._undo.append(partial(setattr, item.bit_generator, "state", item.bit_generator.state))
        elif hasattr(item, "__dict__") and (deep or _holds_training_state(item)):
            self._keep_mapping(vars(item), deep)

    def _visit_all(self, items: Iterable[Any], deep: bool) -> None:
        for item in list(items):
            self._visit(item, deep=deep)

    def _keep_mapping(self, mapping: Any, deep: bool) -> None:
        if isinstance(mapping, MutableMapping):
            self._undo.append(partial(_refill_mapping, mapping, dict(mapping)))
        self._visit_all(mapping.values(), deep)

    def _keep_tensor(self, tensor: torch.Tensor) -> None:
        if tensor.grad_fn is not None or tensor.is_meta or tensor.layout != torch.strided:
            return  # an intermediate result is nobody's state; its owner still gets the object back
        alias = tensor.detach()  # keeps hold of the storage that the tensor has now
        self._undo.append(partial(_same_data, tensor, alias, tensor.requires_grad))
        if tensor.is_leaf:
            self._grads.append(tensor)
        trains = isinstance(tensor, torch.nn.Parameter) and tensor.requires_grad
        frozen = isinstance(tensor, torch.nn.Parameter) and not tensor.requires_grad
        if frozen or (trains and not self._parameters):
            return
        storage = tensor.untyped_storage()
        self._storages.setdefault(storage.data_ptr() or id(storage), storage)


@contextmanager
def preserved(job: Job, *, parameters: bool = True) -> Iterator[Snapshot]:
    """Whatever happens inside, the job's state is afterwards what it was before.

    A first Ctrl-C ends what is inside as usual. Any further one waits until the state is back: half a
    restored model is worse than a second's patience. Outside the main thread no signal arrives here.
    """
    kept = Snapshot(job, parameters=parameters)
    with _one_interrupt_at_a_time() as interrupts:
        # Two nested `finally`: a first Ctrl-C can arrive between entering the inner one and its first
        # statement, and would skip it; the outer one runs with all further ones deferred.
        restored = False
        try:
            try:
                kept.rewind()
                yield kept
            finally:
                interrupts.deferred = True
                kept.put_back()
                restored = True
        finally:
            interrupts.deferred = True
            if not restored:
                kept.put_back()


class _Interrupts:
    def __init__(self) -> None:
        self.deferred = False
        self.waiting = False


@contextmanager
def _one_interrupt_at_a_time() -> Iterator[_Interrupts]:
    interrupts = _Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    before = signal.getsignal(signal.SIGINT)

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        if interrupts.deferred:
            interrupts.waiting = True
            return
        interrupts.deferred = True
        _pass_on(before, number, frame)

    if before is None:  # installed from outside Python: cannot be put back, so it is left alone
        yield interrupts
        return
    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)
        if interrupts.waiting:
            _pass_on(before, signal.SIGINT, None)


def _pass_on(handler: Any, number: int, frame: FrameType | None) -> None:
    if callable(handler):
        handler(number, frame)
    elif handler == signal.SIG_DFL:
        raise KeyboardInterrupt


def _holds_training_state(item: Any) -> bool:
    # By the name of a base class where importing it would load more than is needed.
    return isinstance(item, (torch.nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)) or any(
        base.__name__ in ("GradScaler", "ReduceLROnPlateau") for base in type(item).__mro__
    )


def _is_array(item: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(item, numpy.ndarray)


def _host_copy(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    copied: torch.UntypedStorage = storage.clone() if storage.device.type == "cpu" else storage.cpu()
    return copied


def _host_grad(grad: torch.Tensor) -> torch.Tensor:
    return grad.detach().to("cpu", copy=True)


def _same_data(tensor: torch.Tensor, alias: torch.Tensor, requires_grad: bool) -> None:
    if tensor.data_ptr() != alias.data_ptr() or tensor.dtype != alias.dtype or tensor.shape != alias.shape:
        tensor.data = alias
    if tensor.requires_grad != requires_grad:
        tensor.requires_grad_(requires_grad)


def _refill(items: Any, content: list[Any]) -> None:
    items.clear()
    items.extend(content)


def _refill_mapping(mapping: Any, content: Any) -> None:
    mapping.clear()
    mapping.update(content)


def _modes() -> list[Undo]:
    """Switches of torch that a job may turn: gradients, default dtype, autocast, cuDNN."""
    cudnn = torch.backends.cudnn
    undo: list[Undo] = [
        partial(torch.set_grad_enabled, torch.is_grad_enabled()),
        partial(torch.set_default_dtype, torch.get_default_dtype()),
        partial(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled()),
        partial(setattr, cudnn, "benchmark", cudnn.benchmark),
        partial(setattr, cudnn, "deterministic", cudnn.deterministic),
    ]
    for kind in ("cpu", "cuda"):
        undo.append(partial(torch.set_autocast_enabled, kind, torch.is_autocast_enabled(kind)))
        undo.append(partial(torch.set_autocast_dtype, kind, torch.get_autocast_dtype(kind)))
    return undo


def _rng() -> list[Undo]:
    """Generators of Python, NumPy (if it is in use), torch, and every device in use."""
    undo: list[Undo] = [partial(random.setstate, random.getstate())]
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        undo.append(partial(numpy.random.set_state, numpy.random.get_state()))
    undo.append(partial(torch.set_rng_state, torch.get_rng_state()))
    if torch.cuda.is_initialized():
        undo.append(partial(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
    if torch.backends.mps.is_available():
        undo.append(partial(torch.mps.set_rng_state, torch.mps.get_rng_state()))
    if torch.xpu.is_initialized():
        undo.append(partial(torch.xpu.set_rng_state_all, torch.xpu.get_rng_state_all()))
    return undo
