"""Who carries gradients across ranks: torch's own DistributedDataParallel and FSDP2, each told when to and when not."""

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
    """One model's.

    group: the ranks that its gradients cross. averages_over: how many ranks' sum it divides by; 1 where it adds.
    in_step: True where forward communicates, so that all ranks must run the same number of micro-steps.
    pulses_apart: True where a rank's `pulse` does not meet the other ranks' `crossing`, so that all must pulse or none.
    redone: who runs a window again after one rank ran out of memory in it: that rank "alone", all "together", or nobody ("never"), because
    forward itself communicates.
    """

    group: Any
    averages_over: int
    in_step: bool
    pulses_apart: bool
    redone: Literal["alone", "together", "never"]

    def gather(self) -> None:
        """Whatever has to be fetched from other ranks for a window whose forward and backward are to be local."""

    def quiet(self) -> AbstractContextManager[object]:
        """Forward and backward in here keep their gradients to themselves."""

    def crossing(self) -> AbstractContextManager[object]:
        """Backward in here carries all gradients since the last crossing over."""

    def check(self) -> None:
        """After a rank's last quiet backward: raises `UsageError` where a crossing in a backward could not work."""

    def pulse(self) -> None:
        """A crossing without a micro-batch: carries over what `quiet` backwards have left; none at all counts as zero."""

    def void(self) -> None:
        """Forgets what `quiet` backwards left, also after one that failed half-way."""


def parallel(model: torch.nn.Module, *, lockstep: bool = False, by_hand: bool = False) -> Engine | None:
    """The engine that a model is wrapped in; None for a model that knows no ranks.

    lockstep: all ranks run the same number of micro-steps, so FSDP2 may fetch its parameters for each. by_hand: for a
    loop that is not ours: gradients are averaged over the ranks, as is usual.
    Raises `UsageError` for wrappers that cannot be exact.
    """
    own = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    if isinstance(own, DataParallel):
        raise UsageError("DataParallel splits batches evenly in one process and knows no ranks: use DistributedDataParallel under torchrun")
    if isinstance(own, DistributedDataParallel):
        return Ddp(own)
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in own.modules()):
        raise UsageError("FSDP1 (FullyShardedDataParallel) communicates in every micro-step: use FSDP2 (torch.distributed.fsdp.fully_shard) or DDP")
    if any(isinstance(module, DistributedDataParallel) for module in own.modules()):
        raise UsageError("a part of the model is wrapped in DistributedDataParallel, not the whole: wrap the model that the loss is given")
    if _sharded(own):
        return Fsdp2(own, lockstep=lockstep, by_hand=by_hand)
    return None


def synced_norms(model: torch.nn.Module) -> list[str]:
    """Names of SyncBatchNorm layers, which communicate in forward."""
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.SyncBatchNorm)]


def unwrapped(model: Any) -> Any:
    """The model inside of DistributedDataParallel, compiled or not, for a rehearsal that must not communicate."""
    own = getattr(model, "_orig_mod", model)
    return own.module if isinstance(own, DistributedDataParallel) else model


def group_of(model: Any) -> Any:
    """The ranks that a model in DistributedDataParallel crosses; None for another model."""
    own = getattr(model, "_orig_mod", model)
    return own.process_group if isinstance(own, DistributedDataParallel) else None


class Ddp:
    """DistributedDataParallel."""

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
        # DDP agrees on new buckets once, in the first forward after the first crossing. Here every rank is at the same
        # place, also one that has no forward: https://github.com/pytorch/pytorch/blob/v2.13.0/torch/nn/parallel/distributed.py
        self._model.reducer._rebuild_buckets()

    @contextmanager
    def quiet(self) -> Iterator[None]:
        # Buffers cross once a window, with the gradients. In the first forward, as DDP would have it, an
        # out-of-memory could not be redone by one rank alone.
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
            # DDP starts to reduce once its forward has run and every parameter got a gradient. This one takes no data.
            self._model._modules["module"] = _Pulse(self._touched(inside), inside)
            try:
                self._model().backward()
            finally:
                self._model._modules["module"] = inside

    def _touched(self, inside: torch.nn.Module) -> list[torch.Tensor]:
        """The parameters that are to have a gradient."""
        trained: list[torch.Tensor] = [parameter for parameter in inside.parameters() if parameter.requires_grad]
        if not self._model.find_unused_parameters:
            return trained
        # One that no rank used must stay without, as it would with one process: optimizers tell zero from none.
        return [parameter for parameter in trained if parameter.grad is not None] or trained[:1]

    def void(self) -> None: ...


class _Pulse(torch.nn.Module):
    """Zero, with a gradient of zero for each of the parameters. It has the model's buffers, which DDP broadcasts in forward."""

    def __init__(self, of: Sequence[torch.Tensor], model: torch.nn.Module) -> None:
        super().__init__()
        self._of, self._model = tuple(of), (model,)  # in tuples: nothing of it its own

    def named_buffers(self, *arguments: Any, **given: Any) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self._model[0].named_buffers(*arguments, **given)

    def forward(self) -> torch.Tensor:
        return _zero(self._of)


def _zero(of: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.stack([(parameter.sum() * 0).float() for parameter in of]).sum()


class Fsdp2:
    """`torch.distributed.fsdp.fully_shard`.

    Without lockstep a window's parameters are fetched once and kept to its end, so that ranks may run different
    numbers of micro-steps: that takes the memory of all parameters and gradients, unsharded.
    """

    pulses_apart = True  # it reduces the root's gradients first, a backward through the layers last

    def __init__(self, model: Any, *, lockstep: bool, by_hand: bool) -> None:
        self._model, self._lockstep, self.in_step = model, lockstep, lockstep
        self._modules = _sharded(model)
        if self._modules[0] is not model:
            raise UsageError("parts of the model are sharded and the model itself is not: call fully_shard(model) last, too")
        missing = [name for name in ("set_force_sum_reduction_for_comms", "set_gradient_divide_factor", "set_is_last_backward") if not hasattr(model, name)]
        if missing:
            raise UsageError(f"FSDP2 of torch {torch.__version__} has no {missing[0]}: torch 2.11 or later is needed")
        # Each call of fully_shard without a mesh makes one of its own, over the same ranks.
        meshes = [parameter.device_mesh for parameter in model.parameters() if hasattr(parameter, "device_mesh")]
        mesh = meshes[0]
        if any(each.ndim > 1 for each in meshes):
            raise UsageError("FSDP2 over a mesh of several dimensions (hybrid sharding, tensor parallelism) is not supported: give one dimension")
        if len({tuple(dist.get_process_group_ranks(each.get_group())) for each in meshes}) > 1:
            raise UsageError("parts of the model are sharded over different ranks: shard all of it over the same")
        self.group = mesh.get_group()
        world = dist.get_world_size(self.group)
        self.averages_over = world if by_hand else 1
        can_reset = hasattr(model, "reset_iter_state")  # torch 2.13
        self.redone: Literal["alone", "together", "never"] = "together" if can_reset and not lockstep else "never"
        self._open = False  # whether a window began and its gradients have not crossed yet

    def gather(self) -> None:
        if self._open:
            self._clear()
        self._open = True
        if not self._lockstep:
            # Before the first forward the root does not know itself, and could not be reset.
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
            # Neither reaches submodules. The factor on the root alone would scale the gradients of all others, silently;
            # and backends such as gloo can add but not average. Every time, since a model may be trained by several loops.
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
            # The root's hooks reduce whatever its groups hold once a backward through it has ended.
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
            # https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/fsdp/_fully_shard/_fsdp_param.py: no public
            # way to drop what was accumulated unsharded.
            for group in module._get_fsdp_state()._fsdp_param_groups:
                for held in group.fsdp_params:
                    held.unsharded_accumulated_grad = None
                    if hasattr(held, "_unsharded_param"):
                        held.unsharded_param.grad = None


def _sharded(model: Any) -> list[Any]:
    if "torch.distributed.fsdp" not in sys.modules:  # whose import takes its time; without it nothing was sharded
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@functools.lru_cache(maxsize=8)
def _of_hand(model: torch.nn.Module) -> Engine | None:
    return parallel(model, by_hand=True)


def for_hand(model: torch.nn.Module, *, last: bool) -> AbstractContextManager[object]:
    """Around one forward and backward of a loop that is not ours: gradients cross in the window's last one."""
    engine = _of_hand(model)
    if engine is None:
        return nullcontext()
    return engine.crossing() if last else engine.quiet()
