"""The engines that reduce gradients across ranks: torch's DistributedDataParallel and FSDP2.

autoaccum only controls when they communicate.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch.nn.parallel import DataParallel, DistributedDataParallel

from autoaccum.errors import UsageError


class Engine(Protocol):
    """Controls the communication of one model. A crossing is the reduction of a window's gradients over all ranks.

    group: the process group over which gradients are reduced.
    averages_over: the number that the sum over ranks is divided by; 1 if the engine only sums.
    in_step: True if forward communicates. Then all ranks must run the same number of micro-steps.
    pulses_apart: True if a `pulse` on one rank does not match a `crossing` on another. Then all ranks must pulse, or none.
    redone: who runs a window again after one rank ran out of memory in it: "alone" (that rank), "together" (all ranks), or
    "never" (nobody can, for example because forward communicates).
    """

    group: Any
    averages_over: int
    in_step: bool
    pulses_apart: bool
    redone: Literal["alone", "together", "never"]

    def gather(self) -> None:
        """Prepares a window: fetches from other ranks what forward and backward need to run without communication."""

    def quiet(self) -> AbstractContextManager[object]:
        """A context in which forward and backward keep the gradients on this rank."""

    def crossing(self) -> AbstractContextManager[object]:
        """A context in which backward reduces all gradients since the last crossing over the ranks."""

    def check(self) -> None:
        """Called after a rank's last quiet backward. Raises `UsageError` if a crossing in a backward cannot work for this model."""

    def pulse(self) -> None:
        """A crossing without a micro-batch: reduces the gradients of the `quiet` backwards. No gradients count as zeros."""

    def void(self) -> None:
        """Drops the gradients of the `quiet` backwards, also after a backward that failed half-way."""


def parallel(model: torch.nn.Module, *, lockstep: bool = False, by_hand: bool = False) -> Engine | None:
    """The engine for a model in DistributedDataParallel or FSDP2; None for any other model.

    lockstep: all ranks run the same number of micro-steps, so FSDP2 may fetch its parameters in each micro-step.
    by_hand: the user writes the training loop, so gradients are averaged over the ranks, as torch does.
    Raises `UsageError` for wrappers with which the gradient cannot be exact.
    """
    inner = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    if isinstance(inner, DataParallel):
        raise UsageError("DataParallel splits batches evenly in one process and knows no ranks: use DistributedDataParallel under torchrun")
    if isinstance(inner, DistributedDataParallel):
        return Ddp(inner)
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in inner.modules()):
        raise UsageError("FSDP1 (FullyShardedDataParallel) communicates in every micro-step: use FSDP2 (torch.distributed.fsdp.fully_shard) or DDP")
    if any(isinstance(module, DistributedDataParallel) for module in inner.modules()):
        raise UsageError("a part of the model is wrapped in DistributedDataParallel, not the whole: wrap the model that the loss is given")
    if _sharded(inner):
        return Fsdp2(inner, lockstep=lockstep, by_hand=by_hand)
    return None


def synced_norms(model: torch.nn.Module) -> list[str]:
    """Names of the model's SyncBatchNorm layers. These communicate in forward."""
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.SyncBatchNorm)]


def unwrapped(model: Any) -> Any:
    """The model inside of DistributedDataParallel, compiled or not. Trials run it, because they must not communicate."""
    inner = getattr(model, "_orig_mod", model)
    return inner.module if isinstance(inner, DistributedDataParallel) else model


def group_of(model: Any) -> Any:
    """The process group of a model in DistributedDataParallel; None for any other model."""
    inner = getattr(model, "_orig_mod", model)
    return inner.process_group if isinstance(inner, DistributedDataParallel) else None


class Ddp:
    """The engine for DistributedDataParallel."""

    pulses_apart = False

    def __init__(self, model: DistributedDataParallel) -> None:
        if model.static_graph:
            # Its first backward fails under no_sync: https://github.com/pytorch/pytorch/issues/143580
            raise UsageError("DistributedDataParallel(static_graph=True) cannot accumulate gradients: leave static_graph out")
        self._model = model
        self.in_step = bool(synced_norms(model))
        self.redone: Literal["alone", "together", "never"] = "never" if self.in_step else "alone"
        self.group = model.process_group
        self.averages_over = dist.get_world_size(self.group)

    def gather(self) -> None:
        if self._model._join_config.enable:
            raise UsageError("Join makes up for ranks that run out of data, one backward at a time: leave it out, a plan's windows end together on all ranks")
        # DDP's ranks agree on new buckets once, in the first forward after the first crossing. That is done here because
        # every rank comes here, also a rank without a forward:
        # https://github.com/pytorch/pytorch/blob/v2.13.0/torch/nn/parallel/distributed.py
        self._model.reducer._rebuild_buckets()

    @contextmanager
    def quiet(self) -> Iterator[None]:
        # Buffers are broadcast once a window, with the gradients. DDP would do it in the first forward; then one rank
        # alone could not run again after an out-of-memory.
        self._model.require_forward_param_sync = False
        with self._model.no_sync():
            yield

    @contextmanager
    def crossing(self) -> Iterator[None]:
        self._model.require_forward_param_sync = True
        yield

    def check(self) -> None:
        if self._model.find_unused_parameters:
            return
        unused = [name for name, parameter in self._model.module.named_parameters() if parameter.requires_grad and parameter.grad is None]
        if unused:
            raise UsageError(
                f"{unused[0]!r}{f' and {len(unused) - 1} more parameters' if len(unused) > 1 else ''} got no gradient from this rank's samples: "
                "DistributedDataParallel(model, find_unused_parameters=True), or requires_grad=False for what does not train"
            )

    def pulse(self) -> None:
        inside = self._model.module
        with torch.enable_grad(), self.crossing():
            # DDP starts to reduce when its forward has run and every parameter has a gradient. This forward needs no data.
            self._model._modules["module"] = _Pulse(self._touched(inside), inside)
            try:
                self._model().backward()
            finally:
                self._model._modules["module"] = inside

    def _touched(self, inside: torch.nn.Module) -> list[torch.Tensor]:
        """The parameters that must have a gradient after the crossing."""
        trained: list[torch.Tensor] = [parameter for parameter in inside.parameters() if parameter.requires_grad]
        if not self._model.find_unused_parameters:
            return trained
        # A parameter that no rank used must keep `grad=None`, as with one process: optimizers treat None and zero differently.
        return [parameter for parameter in trained if parameter.grad is not None] or trained[:1]

    def void(self) -> None: ...


class _Pulse(torch.nn.Module):
    """A module whose output is zero, with a zero gradient for each parameter. It has the model's buffers, because DDP broadcasts
    them in forward."""

    def __init__(self, parameters: Sequence[torch.Tensor], model: torch.nn.Module) -> None:
        super().__init__()
        self._tensors, self._model = tuple(parameters), (model,)  # in tuples, so that torch does not register them in this module

    def named_buffers(self, *arguments: Any, **options: Any) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self._model[0].named_buffers(*arguments, **options)

    def forward(self) -> torch.Tensor:
        return _zero(self._tensors)


def _zero(parameters: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.stack([(parameter.sum() * 0).float() for parameter in parameters]).sum()


class Fsdp2:
    """The engine for FSDP2, `torch.distributed.fsdp.fully_shard`.

    Without lockstep, parameters are fetched once a window and kept until its end. So ranks may run different numbers of
    micro-steps. This needs the memory of all parameters and gradients, unsharded.
    """

    pulses_apart = True  # a pulse reduces the root's gradients first; a backward through the layers reduces them last

    def __init__(self, model: Any, *, lockstep: bool, by_hand: bool) -> None:
        self._model, self._lockstep, self.in_step = model, lockstep, lockstep
        self._modules = _sharded(model)
        if self._modules[0] is not model:
            raise UsageError("parts of the model are sharded and the model itself is not: call fully_shard(model) last, too")
        missing = [name for name in ("set_force_sum_reduction_for_comms", "set_gradient_divide_factor", "set_is_last_backward") if not hasattr(model, name)]
        if missing:
            raise UsageError(f"FSDP2 of torch {torch.__version__} has no {missing[0]}: torch 2.11 or later is needed")
        # Each call of fully_shard without a mesh creates a new mesh, over the same ranks.
        meshes = [parameter.device_mesh for parameter in model.parameters() if hasattr(parameter, "device_mesh")]
        mesh = meshes[0]
        if any(shard_mesh.ndim > 1 for shard_mesh in meshes):
            raise UsageError("FSDP2 over a mesh of several dimensions (hybrid sharding, tensor parallelism) is not supported: give one dimension")
        if len({tuple(dist.get_process_group_ranks(shard_mesh.get_group())) for shard_mesh in meshes}) > 1:
            raise UsageError("parts of the model are sharded over different ranks: shard all of it over the same")
        self.group = mesh.get_group()
        world = dist.get_world_size(self.group)
        self.averages_over = world if by_hand else 1
        can_reset = hasattr(model, "reset_iter_state")  # torch 2.13
        self.redone: Literal["alone", "together", "never"] = "together" if can_reset and not lockstep else "never"
        self._open = False  # True if a window began and its gradients have not crossed yet

    def gather(self) -> None:
        if self._open:
            self._clear()
        self._open = True
        if not self._lockstep:
            # Before the first forward FSDP2 has not found its root yet, and could not be reset.
            self._model._get_fsdp_state()._lazy_init()
            for module in self._modules:
                module.set_reshard_after_forward(False, recurse=False)
                module.unshard()

    @contextmanager
    def quiet(self) -> Iterator[None]:
        self._last(False)
        yield

    @contextmanager
    def crossing(self) -> Iterator[None]:
        self._last(True)
        yield
        self._open = False

    def _last(self, last: bool) -> None:
        for module in self._modules:
            # Neither call reaches submodules. A factor on the root alone would silently scale the gradients of all other
            # modules. Backends such as gloo can sum but not average. It is set every time because several loops may train
            # the same model.
            module.set_gradient_divide_factor(float(self.averages_over))
            module.set_force_sum_reduction_for_comms(True)
        self._model.set_requires_gradient_sync(last)
        self._model.set_is_last_backward(last)
        if not self._lockstep:
            self._model.set_reshard_after_forward(False)
            self._model.set_reshard_after_backward(last)

    def check(self) -> None: ...

    def pulse(self) -> None:
        model = self._model
        with torch.enable_grad(), self.crossing():
            # The root's hooks reduce all gradients of its groups when a backward through the root has ended.
            model.forward = lambda: _zero(parameter for parameter in model.parameters() if parameter.requires_grad)
            try:
                model().backward()
            finally:
                del model.forward

    def void(self) -> None:
        if self.redone == "together":
            self._clear()
            self._open = False

    def _clear(self) -> None:
        if not hasattr(self._model, "reset_iter_state"):
            raise UsageError(
                f"the last window failed half-way, and FSDP2 of torch {torch.__version__} cannot forget what it left (2.13 can): start again from your last checkpoint"
            )
        self._model.reset_iter_state()
        for module in self._modules:
            # https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/fsdp/_fully_shard/_fsdp_param.py: there is
            # no public way to drop the accumulated unsharded gradients.
            for group in module._get_fsdp_state()._fsdp_param_groups:
                for shard in group.fsdp_params:
                    shard.unsharded_accumulated_grad = None
                    if hasattr(shard, "_unsharded_param"):
                        shard.unsharded_param.grad = None


def _sharded(model: Any) -> list[Any]:
    if "torch.distributed.fsdp" not in sys.modules:  # its import is slow, and without it nothing is sharded
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@functools.lru_cache(maxsize=8)
def _engine_by_hand(model: torch.nn.Module) -> Engine | None:
    return parallel(model, by_hand=True)


def for_hand(model: torch.nn.Module, *, last: bool) -> AbstractContextManager[object]:
    """A context for one forward and backward in the user's own loop. last: True for the window's last micro-batch, in which
    gradients cross."""
    engine = _engine_by_hand(model)
    if engine is None:
        return nullcontext()
    return engine.crossing() if last else engine.quiet()
