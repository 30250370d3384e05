"""The ranks that run a loop together: their engines, the learner of each, and a rank's part of a window."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from autoaccum.data import Cut, Window
from autoaccum.devices import Device
from autoaccum.distributed import AffineCurve, Engine, Fleet, Pace, RankTeam, engines, ranks
from autoaccum.errors import AutoaccumWarning, PlanError, UsageError
from autoaccum.loop.learner import Learner
from autoaccum.plan import Plan, even_shares, micro_batches
from autoaccum.probe import Request
from autoaccum.tuner import shared_limits
from autoaccum.window import Job, PhaseCallback, WindowResult, batch_norms, captured, fingerprint


def of_plan(jobs: Sequence[Job], plan: Plan, on_oom: str, careful_windows: int | None, timeout_s: float) -> tuple[list[Engine | None], RankTeam | None]:
    """The engine of each job, which reduces gradients over the ranks, and the `RankTeam`. For a plan of one rank all are None.

    Raises `UsageError` and `PlanError` if they do not suit the plan.
    """
    fleet = plan.fleet
    if careful_windows is not None and (isinstance(careful_windows, bool) or not isinstance(careful_windows, int) or careful_windows < 0):
        raise UsageError(f"careful_windows must be a number of windows, at least 0, or None for all, not {careful_windows!r}")
    if fleet is None:
        # The model may be wrapped although the plan is for one rank; then the world size must be 1.
        for job in jobs:
            wrapped = engines.parallel(job.model) if dist.is_available() and dist.is_initialized() else None
            if wrapped is not None and dist.get_world_size(wrapped.group) > 1:
                raise PlanError("the model's gradients cross several ranks, and the plan is for one: every rank calls autoaccum.tune under torchrun")
        return [None] * len(jobs), None
    job_engines = [engines.parallel(job.model, lockstep=fleet.lockstep) for job in jobs]
    for job, engine in zip(jobs, job_engines):
        if engine is None:
            raise UsageError(
                f"the plan is for {plan.world_size} ranks, and the model does not cross them: wrap it, "
                "torch.nn.parallel.DistributedDataParallel(model), or fully_shard it"
            )
        if (synced := engines.synced_norms(job.model)) and not fleet.lockstep:
            raise UsageError(f"SyncBatchNorm ({synced[0]}) communicates in forward, so every rank must run as many micro-steps: tune(..., equal=True)")
        if isinstance(engine, engines.Fsdp2) and job.scaler is not None:
            raise UsageError("a GradScaler sees but this rank's part of sharded gradients: use bfloat16 with FSDP2, which needs none")
    group = job_engines[0].group if job_engines[0] is not None else None
    world = ranks.here(group, timeout_s)
    position = "one process" if world is None else f"rank {world.rank} of {world.world_size}"
    if world is None or (world.rank, world.world_size) != (plan.rank, plan.world_size):
        raise PlanError(f"the plan is for rank {plan.rank} of {plan.world_size}, and this is {position}: tune again, or Plan.load(path) on each rank")
    world.same("on_oom", on_oom)
    world.same("the plan's shares", (fleet.shares, fleet.lockstep, fleet.steps))
    world.same("the model, its optimizer and its settings", fingerprint(jobs))
    if not fleet.shares[0] and any(batch_norms(job.model) for job in jobs) and isinstance(job_engines[0], engines.Ddp):
        raise UsageError(
            "rank 0 has no share, and DistributedDataParallel takes BatchNorm's statistics from rank 0, which would never move: "
            "start a card that has a share as rank 0"
        )
    in_step = any(engine is not None and engine.in_step for engine in job_engines)
    if in_step and plan.target_tokens is not None:
        raise UsageError(
            "with windows of tokens the ranks run unlike numbers of micro-batches, and this model's ranks meet in forward: use "
            "DistributedDataParallel, or tune with target_batch"
        )
    return list(job_engines), RankTeam(world, fleet, careful_windows, in_step=in_step, any_sizes=plan.target_tokens is not None)


def learner_of(jobs: Sequence[Job], device: Device, request: Request, timeout_s: float, *, cache: bool = False) -> Learner:
    """What learns this rank's plan. Every rank calls this. Raises `UsageError` where a plan cannot be learned in training."""
    if (name := next(filter(None, (captured(job.model, job.loss) for job in jobs)), None)) is not None:
        raise UsageError(f"{name} was captured by torch.cuda.make_graphed_callables and runs one batch size only: tune before it is captured, with equal=True")
    if request.target_tokens is not None and (request.equal or cache):
        told = "equal=True makes micro-batches of equal samples" if request.equal else "cache=True keeps micro-batches of samples"
        raise UsageError(f"{told}, and with target_tokens they are filled by tokens: leave {'equal' if request.equal else 'cache'} out, or give target_batch")
    model = jobs[0].model
    world = ranks.here(engines.group_of(model), timeout_s)
    if world is None:
        return Learner(jobs, device, request, cache=cache)
    if request.target_tokens is not None:
        raise UsageError(
            "over ranks a plan in tokens is not learned while training: every rank calls autoaccum.tune(..., target_tokens=...), and then Accumulator(model, optimizer, plan)"
        )
    if cache:
        raise UsageError("cache=True is for one rank: over ranks all learn in the same windows, so leave it out")
    engine = engines.parallel(model)
    in_step = engine is not None and (engine.in_step or isinstance(engine, engines.Fsdp2) or bool(engines.synced_norms(model)))
    if in_step or request.equal:
        raise UsageError(
            "ranks that run their micro-batches in step (sharded models, SyncBatchNorm, equal=True) need a plan: every rank calls autoaccum.tune, and "
            "then Accumulator(model, optimizer, plan)"
        )
    limits, remarks = shared_limits(request, world, (device.facts.kind, device.facts.uuid, device.facts.index), buckets=False)
    for remark in remarks if world.rank == 0 else ():
        warnings.warn(remark, AutoaccumWarning, stacklevel=3)
    shares = even_shares(request.samples, world.world_size)
    # Until they are timed, all are taken to be equally fast.
    curves = tuple(AffineCurve(max(share, 1), 0.0, 1.0, gpu=device.facts.name) for share in shares)
    pairs = any(batch_norms(job.model) for job in jobs)
    return Learner(jobs, device, request, limits=limits, fleet=Fleet(curves, shares, pairs=pairs), rank=world.rank)


def timed_by(pace: Pace, device: Device, samples: int, attempt: Callable[..., WindowResult]) -> Callable[..., WindowResult]:
    """Tells `pace` how long this rank computes until its gradients meet the other ranks'."""

    def timed(cut: Cut, *, on_phase: PhaseCallback, **settings: Any) -> WindowResult:
        last = -1

        def noted(phase: str, index: int) -> None:
            nonlocal last
            if phase == "forward":
                last = index
            if phase == "sync":
                device.synchronize()
                pace.note(last + 1, samples, time.perf_counter() - started)
            on_phase(phase, index)

        device.synchronize()
        started = time.perf_counter()
        return attempt(cut, on_phase=noted, **settings)

    return timed


def part_sizes(sizes: Callable[[Window, int], Sequence[int]], part: Window, most: int) -> Sequence[int]:
    """The sizes of this rank's part, of which there are none if it has no samples."""
    return sizes(part, most) if part.samples else ()


def in_steps(samples: int, steps: int, most: int) -> Sequence[int]:
    """The sizes of `steps` micro-batches, or of `samples` micro-batches if that is fewer. A rescue that lowered `most` gives more."""
    return micro_batches(samples, max(min(steps, samples), -(-samples // most))) if samples else ()


def filled_up(attempt: Callable[..., WindowResult], steps: int, window: Window, cut: Cut, **settings: Any) -> WindowResult:
    """Adds micro-batches of one sample with weight 0 up to `steps`: if forward communicates, all ranks must run the same number."""
    pieces = list(cut)
    if len(pieces) < steps:
        stand_in = Window(window.parts[:1], [max(window.sizes[0], 1)], window.split, told=window.told).between(0, 1).parts[0]
        pieces += [(stand_in, 0)] * (steps - len(pieces))
    return attempt(pieces, **settings)
