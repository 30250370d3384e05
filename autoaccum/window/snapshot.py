"""Keep the training state, hand it back untouched.

What is kept is what the objects hold, not what their `state_dict` shows: contents of every tensor
(non-persistent buffers and plain attributes of modules too), which object sits under which name,
gradients, modes, and the random number generators. Tensors are kept by storage, so tied weights and
views are copied once and come back in place.
"""

from __future__ import annotations

import random
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch

from autoaccum.devices import Cpu
from autoaccum.errors import DeviceError
from autoaccum.units import in_words
from autoaccum.window.interrupts import Interrupts, deferred_interrupts
from autoaccum.window.job import Job, as_jobs

Undo = Callable[[], object]
_OURS = {f"autoaccum.{name}" for name in ("loop", "rescue", "rewinding", "generators", "running_stats", "plan", "job")}


class Snapshot:
    """The state of a job, or of several that run in turn, at one moment.

    host_bytes: what the copies take in host memory. gradient_bytes: gradients that were there already; they
    stay where they are, beside those of the trials, and come back as the very same objects.
    keep: further objects, kept whole. parameters: False leaves out the contents of trainable parameters, for a process whose weights nobody
    needs afterwards. Raises `DeviceError` with the figures when host memory is too short for the copies.
    """

    def __init__(self, jobs: Sequence[Job], *, keep: Sequence[Any] = (), parameters: bool = True) -> None:
        self._parameters = parameters
        self._seen: dict[int, Any] = {}  # holds the objects too, so that no id is used twice
        self._undo: list[Undo] = []
        self._storages: dict[tuple[str, int], torch.UntypedStorage] = {}
        self._leaves: list[torch.Tensor] = []
        self._frozen: list[tuple[torch.Tensor, int]] = []
        self.host_bytes = 0
        for each in (*keep, *(kept for job in jobs for kept in job.keep)):  # first: what is given to keep is kept whole, also where a model holds it too
            self._visit(each, deep=True)
        for job in jobs:
            for each in (job.model, *job.optimizers, job.scaler, job.scheduler, job.loss):
                self._visit(each)
            for each in (*job.model.parameters(), *job.model.buffers()):  # of TorchScript modules, which have no __dict__
                self._visit(each)
        self.host_bytes += sum(storage.nbytes() for storage in self._storages.values())
        free = Cpu().memory(who=False).free_bytes
        if self.host_bytes > free:
            raise DeviceError(
                f"a copy of the training state needs {in_words(self.host_bytes)} of host memory and {in_words(free)} are free: "
                "free some, or tune in a process of its own, which needs no copy (the command line does)"
            )
        self._contents = [(storage, host_copy(storage)) for storage in self._storages.values()]
        self._grads = [(leaf, leaf.grad) for leaf in self._leaves]
        self.gradient_bytes = sum(_bytes_of(grad) for _, grad in self._grads if grad is not None)
        self._undo += [partial(write_content, storage, content) for storage, content in self._contents]
        self._undo += [*_modes(), *_rng()]

    def rewind(self) -> None:
        """Makes everything as it was, but for gradients: those are set aside, so that trials start without.

        May be called again and again. One thing that cannot be put back does not keep the others from it:
        the first error is raised when all has been tried.
        """
        errors = []
        for undo in self._undo:
            try:
                undo()
            except Exception as error:
                errors.append(error)
        for leaf in self._leaves:
            leaf.grad = None
        if errors:
            raise DeviceError(
                f"the state could not be put back whole ({type(errors[0]).__name__}: {errors[0]}): after an error that loses the device's context "
                "nothing can be read from it, so load your last checkpoint"
            ) from errors[0]

    def put_back(self) -> None:
        """Makes everything as it was, gradients included."""
        try:
            self.rewind()
        finally:
            for leaf, grad in self._grads:
                leaf.grad = grad
        if any(tensor._version != version for tensor, version in self._frozen):
            warnings.warn("a parameter that does not train was changed by the job's own code and not copied: put its owner into keep=[...]", stacklevel=2)

    def _visit(self, item: Any, *, deep: bool = False) -> None:
        if type(item).__module__ in _OURS:
            return  # a trainer that is kept may hold the loop; putting that back would undo what it just decided
        if id(item) in self._seen or isinstance(item, (str, bytes, int, float, type(None), type, ModuleType, FunctionType, MethodType)):
            return
        self._seen[id(item)] = item
        if isinstance(item, torch.Tensor):
            self._keep_tensor(item, deep)
        elif isinstance(item, random.Random):
            self._undo.append(partial(item.setstate, item.getstate()))
        elif isinstance(item, dict):
            self._undo.append(partial(_refill_mapping, item, dict(item)))
            self._visit_all(item.values(), deep)
        elif isinstance(item, (list, deque)):
            self._undo.append(partial(_refill_list, item, list(item)))
            self._visit_all(item, deep)
        elif isinstance(item, set):
            self._undo.append(partial(_refill_mapping, item, set(item)))
            self._visit_all(item, deep)
        elif isinstance(item, tuple):
            self._visit_all(item, deep)
        elif _is_array(item):
            if item.flags.writeable:
                self.host_bytes += item.nbytes
                self._undo.append(partial(item.__setitem__, ..., item.copy()))
        elif hasattr(item, "get_state") and hasattr(item, "set_state"):  # torch.Generator, numpy.random.RandomState
            self._undo.append(partial(item.set_state, item.get_state()))
        elif hasattr(item, "bit_generator"):  # numpy.random.Generator
            self._undo.append(partial(setattr, item.bit_generator, "state", item.bit_generator.state))
        elif hasattr(item, "__dict__") and (deep or _holds_training_state(item)):
            attributes = vars(item)
            self._undo.append(partial(_refill_mapping, attributes, dict(attributes)))
            self._visit_all(attributes.values(), deep)

    def _visit_all(self, items: Iterable[Any], deep: bool) -> None:
        for item in list(items):
            self._visit(item, deep=deep)

    def _keep_tensor(self, tensor: torch.Tensor, deep: bool) -> None:
        if tensor.is_leaf and tensor.requires_grad:
            self._leaves.append(tensor)
        if tensor.grad_fn is not None or tensor.is_meta or tensor.layout != torch.strided:
            return  # an intermediate result is nobody's state; its owner still gets the object back
        if hasattr(tensor, "__tensor_flatten__"):  # a wrapper around other tensors has no storage of its own
            self.host_bytes += tensor.nbytes
            self._undo.append(partial(_copy_into, tensor.detach(), tensor.detach().clone()))
            return
        alias = tensor.detach()  # keeps hold of the storage that the tensor has now
        self._undo.append(partial(_same_data, tensor, alias, tensor.requires_grad))
        parameter = isinstance(tensor, torch.nn.Parameter)
        if parameter and not tensor.requires_grad and not deep:
            self._frozen.append((tensor, tensor._version))
            return
        if parameter and tensor.requires_grad and not self._parameters:
            return
        storage = tensor.untyped_storage()
        key = str(storage.device), storage.data_ptr() or id(storage)
        if key not in self._storages or self._storages[key].nbytes() < storage.nbytes():
            self._storages[key] = storage


@contextmanager
def preserved(jobs: Job | Sequence[Job], *, parameters: bool = True) -> Iterator[tuple[Snapshot, Interrupts]]:
    """Whatever happens inside, the jobs' state is afterwards what it was before.

    Ctrl-C takes effect where the second value is `allowed()`, which is while a trial runs; anywhere else it
    waits until the state is back: half a restored model is worse than a second's patience. Outside the main
    thread no signal arrives here.
    """
    kept = Snapshot(as_jobs(jobs), parameters=parameters)
    with deferred_interrupts() as interrupts:
        try:
            kept.rewind()
            yield kept, interrupts
        finally:
            kept.put_back()


def _holds_training_state(item: Any) -> bool:
    # By the name of a base class where importing it would load more than is needed.
    return isinstance(item, (torch.nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)) or any(
        base.__name__ in ("GradScaler", "ReduceLROnPlateau") for base in type(item).__mro__
    )


def _is_array(item: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(item, numpy.ndarray)


def host_copy(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """The bytes of a storage, in host memory."""
    copied: torch.UntypedStorage = storage.clone() if storage.device.type == "cpu" else storage.cpu()
    return copied


def same_content(storage: torch.UntypedStorage, content: torch.UntypedStorage) -> bool:
    """Whether a storage holds these bytes."""
    now = storage if storage.device.type == "cpu" else storage.cpu()
    return torch.equal(*(torch.empty(0, dtype=torch.uint8).set_(each) for each in (now, content)))  # type: ignore[call-overload]


def write_content(storage: torch.UntypedStorage, content: torch.UntypedStorage) -> None:
    """Writes only where something changed: a page that nobody may write (a mapped file) is not touched."""
    if storage.device.type != "cpu" or not same_content(storage, content):
        storage.copy_(content)


def _copy_into(tensor: torch.Tensor, content: torch.Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(content)


def _bytes_of(grad: torch.Tensor) -> int:
    return int(grad.nbytes) if grad.layout == torch.strided else 0


def _same_data(tensor: torch.Tensor, alias: torch.Tensor, requires_grad: bool) -> None:
    if _layout(tensor) != _layout(alias):
        tensor.data = alias
    if tensor.requires_grad != requires_grad:
        tensor.requires_grad_(requires_grad)


def _layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _refill_list(items: Any, content: list[Any]) -> None:
    if len(items) != len(content) or any(now is not then for now, then in zip(items, content)):
        items.clear()
        items.extend(content)


def _refill_mapping(mapping: Any, content: Any) -> None:
    if isinstance(mapping, dict) and list(mapping) == list(content) and all(mapping[key] is content[key] for key in content):
        return
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
