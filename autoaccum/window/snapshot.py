"""`Snapshot`: a copy of the training state, from which the state is restored after trials.

It copies what the objects hold, not what their `state_dict` shows: the contents of every tensor (also non-persistent buffers
and plain attributes of modules), which object has which name, gradients, modes, and the random number generators. Tensors
are copied by storage, so tied weights and views are copied once and restored in place.
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

from autoaccum import oom
from autoaccum.devices import Cpu
from autoaccum.errors import AutoaccumWarning, DeviceError, noted
from autoaccum.units import in_words
from autoaccum.window.interrupts import Interrupts, deferred_interrupts
from autoaccum.window.job import Job, as_jobs

Undo = Callable[[], object]
_OURS = {
    f"autoaccum.{name}" for name in ("loop.accumulator", "loop.rescue", "window.start", "window.rng_state", "window.batch_norm", "plan.plan", "window.job")
}


class Snapshot:
    """The state of a job, or of several jobs that run in turn, at one moment.

    host_bytes: host memory that the copies take.
    gradient_bytes: bytes of the gradients that existed already. They stay in place, beside those of the trials, and are
        restored as the very same objects.
    keep: further objects, copied completely.
    parameters: False leaves out the contents of trainable parameters, for a process whose weights are not used afterwards.
    Raises `DeviceError` with the figures if host memory is too small for the copies.
    """

    def __init__(self, jobs: Sequence[Job], *, keep: Sequence[Any] = (), parameters: bool = True) -> None:
        self._parameters = parameters
        self._visited: dict[int, Any] = {}  # holds the objects too, so that no id is used again
        self._undo: list[Undo] = []
        self._storages: dict[tuple[str, int], torch.UntypedStorage] = {}
        self._leaves: list[torch.Tensor] = []
        self._frozen: list[tuple[torch.Tensor, int]] = []
        self.host_bytes = 0
        # First, because an object in `keep` is copied completely, even if a model holds it too.
        for item in (*keep, *(kept for job in jobs for kept in job.keep)):
            self._visit(item, deep=True)
        for job in jobs:
            for item in (job.model, *job.optimizers, job.scaler, job.scheduler, job.loss):
                self._visit(item)
            for item in (*job.model.parameters(), *job.model.buffers()):  # for TorchScript modules, which have no __dict__
                self._visit(item)
        self.host_bytes += sum(storage.nbytes() for storage in self._storages.values())
        free = Cpu().memory(who=False).free_bytes
        if self.host_bytes > free:
            raise DeviceError(
                f"a copy of the training state needs {in_words(self.host_bytes)} of host memory and {in_words(free)} are free: "
                "free some, or tune in a process of its own, which needs no copy (the command line does)"
            )
        trained = {
            _key(tensor)
            for job in jobs
            for tensor in (*job.trained(), *_state_tensors(job.optimizers))
            if tensor.layout == torch.strided and not hasattr(tensor, "__tensor_flatten__")
        }
        self._contents = [(storage, host_copy(storage)) for storage in self._storages.values()]
        self._grads = [(leaf, leaf.grad) for leaf in self._leaves]
        self.gradient_bytes = sum(_bytes_of(grad) for _, grad in self._grads if grad is not None)
        written = {key: partial(write_content, storage, content) for key, (storage, content) in zip(self._storages, self._contents)}
        self._undo += [undo for key, undo in written.items() if key not in trained]
        self._undo_trained = [undo for key, undo in written.items() if key in trained]
        self._undo += _modes()
        self._undo_draws = _rng()
        self._may_have_drawn = True

    def rewind(self, *, values: bool = True) -> None:
        """Restores everything except gradients. Gradients are set aside, so that trials start without any.

        values: False leaves the values of what trains, and of the optimizers' states, as trials left them: memory does not depend on them, and
        to write a billion of them takes seconds.

        May be called several times. If one thing cannot be restored, the others still are: `DeviceError` is raised at the end, from
        the first error.
        """
        self._run([*self._undo, *(self._undo_trained if values else ()), *self._undo_draws])
        self._may_have_drawn = False

    def used(self) -> None:
        """Says that the job's code runs now, which may draw random numbers."""
        self._may_have_drawn = True

    def _run(self, undoes: Sequence[Undo]) -> None:
        errors = []
        for undo in undoes:
            try:
                undo()
            except Exception as error:
                errors.append(error)
        for leaf in self._leaves:
            leaf.grad = None
        if errors:
            why = "after an error that loses the device's context nothing can be read from it, so" if oom.is_of_device(errors[0]) else "so"
            raise DeviceError(f"the state could not be put back whole ({type(errors[0]).__name__}: {errors[0]}): {why} load your last checkpoint") from errors[
                0
            ]

    def put_back(self) -> None:
        """Restores everything, gradients included. Warns if a parameter that does not train was changed.

        Random numbers are put back only if the job may have drawn some since `rewind`: else another thread did, and would get the same again.
        """
        try:
            self._run([*self._undo, *self._undo_trained, *(self._undo_draws if self._may_have_drawn else ())])
        finally:
            for leaf, grad in self._grads:
                leaf.grad = grad
        if any(tensor._version != version for tensor, version in self._frozen):
            warnings.warn(
                "a parameter that does not train was changed by the job's own code and not copied: put its owner into keep=[...]",
                AutoaccumWarning,
                stacklevel=2,
            )

    def _visit(self, item: Any, *, deep: bool = False) -> None:
        if type(item).__module__ in _OURS:
            return  # a trainer in `keep` may hold the training loop; restoring the loop would undo its last decisions
        if id(item) in self._visited or isinstance(item, (str, bytes, int, float, type(None), type, ModuleType, FunctionType, MethodType)):
            return
        self._visited[id(item)] = item
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
        if tensor.is_leaf and (tensor.requires_grad or tensor.grad is not None):
            self._leaves.append(tensor)
        if tensor.grad_fn is not None or tensor.is_meta or tensor.layout != torch.strided:
            return  # an intermediate result is not state; its owner still gets the same object back
        if hasattr(tensor, "__tensor_flatten__"):  # a wrapper around other tensors has no storage of its own
            self.host_bytes += tensor.nbytes
            self._undo.append(partial(_copy_into, tensor.detach(), tensor.detach().clone()))
            return
        alias = tensor.detach()  # keeps the tensor's current storage alive
        self._undo.append(partial(_same_data, tensor, alias, tensor.requires_grad))
        parameter = isinstance(tensor, torch.nn.Parameter)
        if parameter and not tensor.requires_grad and not deep:
            self._frozen.append((tensor, tensor._version))
            return
        if parameter and tensor.requires_grad and not self._parameters:
            return
        storage = tensor.untyped_storage()
        key = _key(tensor)
        if key not in self._storages or self._storages[key].nbytes() < storage.nbytes():
            self._storages[key] = storage


@contextmanager
def preserved(jobs: Job | Sequence[Job], *, parameters: bool = True) -> Iterator[tuple[Snapshot, Interrupts]]:
    """Context that restores the jobs' state on exit, whatever happens inside.

    Ctrl-C takes effect inside `allowed()` of the second value, that is while a trial runs. At any other time it waits until the
    state is restored, because a half-restored model is useless. Outside the main thread no signal arrives.
    """
    snapshot = Snapshot(as_jobs(jobs), parameters=parameters)
    with deferred_interrupts() as interrupts, put_back_after(snapshot.put_back):
        snapshot.rewind()
        snapshot.used()
        yield snapshot, interrupts


@contextmanager
def put_back_after(put_back: Callable[[], None]) -> Iterator[None]:
    """Context that calls `put_back` at the end. If both fail, what was raised inside stays the last exception, with a note of the other."""
    try:
        yield
    except BaseException as error:
        try:
            put_back()
        except DeviceError as lost:
            noted(error, f"autoaccum: {lost}")
        raise
    put_back()


def _holds_training_state(item: Any) -> bool:
    # Compares the names of base classes where an import would load more than is needed.
    return isinstance(item, (torch.nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)) or any(
        base.__name__ in ("GradScaler", "ReduceLROnPlateau") for base in type(item).__mro__
    )


def _key(tensor: torch.Tensor) -> tuple[str, int]:
    storage = tensor.untyped_storage()
    return str(storage.device), storage.data_ptr() or id(storage)


def _state_tensors(optimizers: Iterable[torch.optim.Optimizer]) -> Iterator[torch.Tensor]:
    for optimizer in optimizers:
        for state in list(optimizer.state.values()):
            if isinstance(state, dict):
                yield from (each for each in state.values() if isinstance(each, torch.Tensor))


def _is_array(item: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(item, numpy.ndarray)


def host_copy(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """A copy of a storage's bytes in host memory."""
    copied: torch.UntypedStorage = storage.clone() if storage.device.type == "cpu" else storage.cpu()
    return copied


def same_content(storage: torch.UntypedStorage, content: torch.UntypedStorage) -> bool:
    """True if the storage holds these bytes."""
    now = storage if storage.device.type == "cpu" else storage.cpu()
    return torch.equal(*(torch.empty(0, dtype=torch.uint8).set_(content_bytes) for content_bytes in (now, content)))  # type: ignore[call-overload]


_ROW, _ROWS = 4096, 1024  # elements of a row of the table that `digest` sums, and rows that are summed at once: 16 MiB


def digest(storage: torch.UntypedStorage) -> torch.Tensor:
    """Sums of a storage's bytes on its own device: of every row and of every column of a table. One tensor, a thousandth of the storage's size."""
    whole = storage.nbytes() // (4 * _ROW) * _ROW
    table = torch.empty(0, dtype=torch.int32, device=storage.device).set_(storage, 0, (whole // _ROW, _ROW))  # type: ignore[call-overload]
    rest = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, 4 * whole, (storage.nbytes() - 4 * whole,))  # type: ignore[call-overload]
    rows, columns = [], torch.zeros(_ROW, dtype=torch.int64, device=storage.device)
    for piece in table.split(_ROWS):  # a sum in 64 bits copies what it sums
        wide = piece.long()
        rows.append(wide.sum(dim=1))
        columns += wide.sum(dim=0)
    return torch.cat([*rows, columns, rest.long()])


def write_content(storage: torch.UntypedStorage, content: torch.UntypedStorage) -> None:
    """Writes the bytes into a storage, in its size of then. Host memory is written only if it changed: a read-only page (a mapped file) is not touched."""
    if storage.nbytes() != content.nbytes():
        storage.resize_(content.nbytes())  # `resize_` in forward, as observers of quantisation-aware training do
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
    """Undo functions for torch's global switches that a job may change: gradients, default dtype, autocast, cuDNN."""
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
    """Undo functions for the generators of Python, NumPy (if it is imported), torch, and every device in use."""
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
