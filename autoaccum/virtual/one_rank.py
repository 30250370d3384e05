"""One rank of a job over several equal ranks: what its engine holds beside the job, as DistributedDataParallel, FSDP2 or DeepSpeed's ZeRO would.

FSDP2 is torch's own: it runs on phantom tensors over ranks that are not there. The others are stand-ins by formula: their buffers are allocated where
the engine allocates them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from autoaccum.errors import JobError, UsageError
from autoaccum.tuner import repeated_blocks
from autoaccum.units import MIB
from autoaccum.virtual.estimate import ENGINES
from autoaccum.window import Job

# DistributedDataParallel sends the parameters once, in pieces of this size (torch/nn/parallel/distributed.py, broadcast_bucket_size).
_BROADCAST_BYTES = 250 * MIB
# DeepSpeed's defaults, in elements (deepspeed/runtime/zero/config.py): reduce_bucket_size, stage3_max_live_parameters.
_REDUCE_BUCKET, _MOST_LIVE = 500_000_000, 1_000_000_000


class OneRank:
    """Rank 0 of `world`. engine: one of `estimate.ENGINES`. jobs: with phantom tensors already; they change for good. Inside the mode of these tensors.

    resident: tensors that it holds beside the job's. made_from: by id of a resident tensor, the bytes beside it while it is made.
    kinds: by id of a resident tensor, the kind of its memory (`tape.KINDS`), if it is no weight.
    replaced: by id of a parameter that it has divided, this rank's part.
    gradient_bytes: of the gradients that stay between micro-batches. remarks: how far the figures can be trusted, in words.
    Raises `UsageError` for an engine that there is not, and `JobError` for a job that it cannot run.
    """

    def __init__(self, jobs: Sequence[Job], engine: str, world: int, kind: str) -> None:
        self._jobs, self._world, self._kind = jobs, world, kind
        self.resident: list[torch.Tensor] = []
        self.made_from: dict[int, int] = {}
        self.kinds: dict[int, str] = {}
        self.replaced: dict[int, torch.Tensor] = {}
        self.gradient_bytes = max(job.gradient_bytes() for job in jobs)
        self.remarks: tuple[str, ...] = ()
        self.tracer: Any = None  # of the recording that runs
        self._buffers: list[torch.Tensor] = []
        self._bucket_types: list[torch.dtype] = []
        self._parts: dict[int, torch.Tensor] = {}  # by id of a parameter, the part of its gradient that this rank keeps
        if engine not in ENGINES:
            raise UsageError(f"shard must be one of {', '.join(ENGINES)}, not {engine!r}")
        if len(jobs) > 1:
            raise UsageError("several jobs that run in turn are estimated on one device: leave world and shard out")
        if engine == "ddp":
            self._with_buckets(jobs[0])
        elif engine == "fsdp2":
            self._fully_sharded(jobs[0])
        else:
            self._with_zero(jobs[0], int(engine[-1]))

    def on_phase(self, phase: str) -> None:
        """Called when a phase of the window begins. DeepSpeed has the bucket that gradients are reduced in during backward only."""
        self._buffers = [torch.empty(_REDUCE_BUCKET, dtype=dtype, device=self._kind) for dtype in self._bucket_types] if phase == "backward" else []
        self.tracer.named(self._buffers, "gradients")

    # -- DistributedDataParallel

    def _with_buckets(self, job: Job) -> None:
        trained = job.trained()
        buckets = self._held(sum(each.nbytes for each in trained))
        self.kinds[id(buckets)] = "gradients"
        self.made_from[id(buckets)] = min(sum(each.nbytes for each in job.model.parameters()), _BROADCAST_BYTES)
        self.remarks = ("ddp: its buckets, a second copy of the gradients, are counted by formula; NCCL's own memory is not",)

    def _held(self, nbytes: int) -> torch.Tensor:
        tensor = torch.empty(nbytes, dtype=torch.uint8, device=self._kind)
        self.resident.append(tensor)
        return tensor

    # -- FSDP2

    def _fully_sharded(self, job: Job) -> None:
        with _ranks_that_are_not_there(self._world, self._kind) as mesh:
            self._follow_storages()
            from torch.distributed.fsdp import fully_shard

            before = dict(job.model.named_parameters(remove_duplicate=False))
            blocks = repeated_blocks(job.model)
            try:
                for block in blocks:
                    fully_shard(block, mesh=mesh)
                fully_shard(job.model, mesh=mesh)
            except (RuntimeError, ValueError, AssertionError, NotImplementedError) as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise JobError(f"FSDP2 cannot shard this model: {reason[:160]}; shard=ddp and zero1 to zero3 are counted without it") from error
        after = dict(job.model.named_parameters(remove_duplicate=False))
        self.replaced = {id(parameter): after[name] for name, parameter in before.items()}
        for optimizer in job.optimizers:
            optimizer.state.clear()
            for group in optimizer.param_groups:
                group["params"] = [self.replaced.get(id(parameter), parameter) for parameter in group["params"]]
        self.gradient_bytes = sum(local_of(each).nbytes for each in {id(each): each for each in after.values()}.values() if each.requires_grad)
        whole = "" if blocks else " as a whole, because it has no repeated blocks,"
        self.remarks = (
            f"fsdp2: torch's own, traced as rank 0 of {self._world}: fully_shard of {f'each of {len(blocks)} blocks and of ' if blocks else ''}the model{whole} in the "
            "parameters' own type, without a mixed-precision policy; gathered and reduced in every micro-batch; NCCL's own memory is not counted",
        )

    def _follow_storages(self) -> None:
        """FSDP2 frees and allocates a gathered parameter by resizing its storage, which no operator shows."""
        from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group

        def following(own: Any) -> Any:
            def resized(tensor: torch.Tensor) -> None:
                own(tensor)
                if self.tracer is not None:
                    self.tracer.resized(tensor, "parameters")

            return resized

        for name in ("alloc_storage", "free_storage"):
            if not hasattr(_fsdp_param, name):
                raise UsageError(f"the FSDP2 of torch {torch.__version__} frees its parameters in a way that is not known here: take shard=ddp, or torch 2.13")
            made = following(getattr(_fsdp_param, name))
            for module in (_fsdp_param, _fsdp_param_group):
                if hasattr(module, name):
                    setattr(module, name, made)

    # -- DeepSpeed's ZeRO

    def _with_zero(self, job: Job, stage: int) -> None:
        if job.scaler is not None or job.wants_closure or job.takes_closure:
            raise JobError("DeepSpeed scales and steps by itself: estimate the job without a scaler, with an optimizer of torch's")
        trained = job.stepped()
        elements, share = sum(each.numel() for each in trained), 0
        whole_bytes = sum(each.nbytes for each in job.model.parameters())
        if stage == 3 and sum(each.numel() for each in job.model.parameters()) > _MOST_LIVE:
            raise JobError(
                "zero3 of more than 1e9 parameters releases and gathers by DeepSpeed's own schedule, which is not known here: fsdp2 divides the same state, and "
                "its peak is traced"
            )
        for optimizer in job.optimizers:
            optimizer.state.clear()
            for group in optimizer.param_groups:
                numbers = math.ceil(sum(each.numel() for each in group["params"] if each.requires_grad) / self._world)
                part = torch.nn.Parameter(torch.empty(numbers, dtype=torch.float32, device=self._kind))  # single_partition_of_fp32_groups
                self.resident.append(part)
                self.kinds[id(part)] = "optimizer"
                share += numbers
                group["params"] = [part]
            optimizer.register_step_pre_hook(lambda optimizer, *_: self._take_gradients(optimizer, trained))
            optimizer.register_step_post_hook(lambda optimizer, *_: self._give_gradients_back(optimizer))
        types = {each.dtype for each in trained}
        if stage == 1:
            self._bucket_types = sorted(types, key=str)
        else:
            self.gradient_bytes = math.ceil(sum(each.nbytes for each in trained) / self._world)
            for each in trained:
                each.register_post_accumulate_grad_hook(self._keep_part)
        if stage == 2:
            self._bucket_types = sorted(types, key=str)
        if stage == 3:  # its buckets are made once; parts of the parameters stay beside those that are gathered
            for dtype in sorted(types, key=str):
                self.resident.append(torch.empty(_REDUCE_BUCKET, dtype=dtype, device=self._kind))
                self.kinds[id(self.resident[-1])] = "gradients"
            self._held(math.ceil(whole_bytes / self._world))
        gathered = ", all parameters gathered" if stage == 3 else ""
        self.remarks = (
            f"zero{stage}: DeepSpeed's memory by formula, not compared with a real run: this rank holds 1/{self._world} of the optimizer's state and of the weights in single "
            f"precision ({elements / self._world:.3g} numbers each){gathered}, and buckets of 5e8 numbers (its default; a smaller reduce_bucket_size takes less)",
        )

    def _keep_part(self, parameter: torch.Tensor) -> None:
        """Stages 2 and 3 keep this rank's part of each gradient, and free the rest."""
        assert parameter.grad is not None
        if id(parameter) not in self._parts:
            self._parts[id(parameter)] = part = torch.empty(math.ceil(parameter.numel() / self._world), dtype=parameter.grad.dtype, device=self._kind)
            self.tracer.named([part], "gradients")
        parameter.grad = None

    def _take_gradients(self, optimizer: torch.optim.Optimizer, trained: Sequence[torch.Tensor]) -> None:
        for group in optimizer.param_groups:
            (part,) = group["params"]
            self.tracer.named([each.grad for each in trained if each.grad is not None], "gradients")
            part.grad = torch.empty_like(part)
        self._parts.clear()
        for each in trained:
            each.grad = None

    def _give_gradients_back(self, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            group["params"][0].grad = None

    def rewind(self) -> None:
        """Forgets what an earlier trace has left."""
        self._parts.clear()
        self._buffers = []


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a parameter."""
    local: torch.Tensor = getattr(tensor, "_local_tensor", tensor)
    return local


class _Stream:
    """A stream, or an event, of a card that is not there: everything happens in the order in which it is called."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: _Stream()


@contextmanager
def _ranks_that_are_not_there(world: int, kind: str) -> Iterator[Any]:
    """The mesh of a process group whose other ranks never answer; their collectives only have shapes. Stays for the process."""
    import torch.distributed as dist
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    if not dist.is_available():
        raise UsageError(f"this build of torch ({torch.__version__}) has no process groups: leave fsdp2 out, or take ddp")
    if dist.is_initialized():
        raise UsageError("this process has a process group already: estimate in a process of its own, from the job's file")
    with unset_fake_temporarily():
        from torch.distributed._tools import fake_collectives  # noqa: F401 - gives collectives their shapes
        from torch.distributed.device_mesh import init_device_mesh
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
        if kind == "cuda":
            for name in ("Stream", "Event"):
                setattr(torch.cuda, name, _Stream)
            torch.cuda.current_stream = lambda *_: _Stream()  # type: ignore[assignment]
            torch.cuda.stream = _nowhere_else  # type: ignore[assignment,misc]
            torch.cuda.device_count = lambda: world
            torch.cuda.current_device = lambda: 0
            torch.cuda.set_device = lambda *_: None
            torch.cuda.is_initialized = lambda: True
        mesh = init_device_mesh(kind, (world,))
        _shapes_apart()
    yield mesh


def _shapes_apart() -> None:
    """A DTensor's first call of an operator asks for its shapes with tensors of the whole size, which take no memory: they must not be traced."""
    from torch.distributed.tensor._sharding_prop import ShardingPropagator
    from torch.utils._python_dispatch import _disable_current_modes

    for name in ("_propagate_tensor_meta_non_cached", "_propagate_tensor_meta"):  # before torch 2.8 the latter alone
        if (own := vars(ShardingPropagator).get(name)) is not None:

            def apart(self: Any, schema: Any, own: Any = own) -> Any:
                with _disable_current_modes():  # type: ignore[no-untyped-call]
                    return own(self, schema)

            setattr(ShardingPropagator, name, apart)
            return


@contextmanager
def _nowhere_else(*_: Any) -> Iterator[None]:
    yield
