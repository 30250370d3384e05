"""The accumulating loop: exactly one optimizer step per window, as the plan says."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist

from autoaccum import devices, oom
from autoaccum.data import Cut, Window, counted
from autoaccum.distributed import Engine, RankTeam, VoidWindow, WindowAnnouncement, WindowVote, engines, ranks
from autoaccum.errors import PlanError, UsageError, noted
from autoaccum.loop.rescue import Rescued, Rescuer
from autoaccum.plan import Plan, micro_batches
from autoaccum.window import Job, PhaseCallback, RunningStats, WindowResult, accumulation, as_jobs, batch_norms, fingerprint, optimizer_step

Loss = Callable[[Any, Any], Any]


class StepResult:
    """What one optimizer step did. `loss`, `count`, `grad_norm` and `skipped` wait for the device only when they are read.

    samples: of the window, over all ranks. micro_batches: how many ran, on this rank. rescued: what an out-of-memory changed
    here, or None. The rest is the same on every rank.
    """

    def __init__(self, ran: WindowResult, rescued: Rescued | None = None) -> None:
        self._ran = ran
        self.samples, self.micro_batches, self.rescued = ran.samples, ran.micro_batches, rescued

    @property
    def loss(self) -> float:
        """Mean over the window's samples (over its count, for a loss that returns a sum)."""
        return float(self._ran.loss)

    @property
    def count(self) -> float | None:
        """What the window counted: what a loss given as a sum was divided by; None for a mean over samples."""
        return None if self._ran.counted is None else float(self._ran.counted)

    @property
    def grad_norm(self) -> float | None:
        """Norm of the summed gradient before clipping; None without `max_grad_norm`."""
        return None if self._ran.grad_norm is None else float(self._ran.grad_norm)

    @property
    def skipped(self) -> bool:
        """True if the scaler found inf or nan in a gradient, and the optimizers did not step."""
        return self._ran.skipped

    def __repr__(self) -> str:
        rescued = "" if self.rescued is None else f", rescued='{self.rescued}'"
        return f"StepResult(loss={self.loss:.6g}, samples={self.samples}, micro_batches={self.micro_batches}, skipped={self.skipped}{rescued})"


class Accumulator:
    """Runs windows as a plan says: `Accumulator(model, optimizer, plan)` or `Accumulator(job, plan)`.

    job: also a list of jobs, as given to `tune`: they run one after the other on every window, and `step`
    returns a tuple of results.
    scheduler: stepped once per window that was not skipped. scaler, autocast, max_grad_norm, count, split, keep:
    as in `Job`, and as they were when the plan was made; what differs is warned of.
    on_oom: "rescue" runs a window that ran out of memory in forward or backward again, whole, in smaller
    micro-batches, and stays at these; "raise" lets the error through. Module attributes other than buffers that a
    forward changes are not put back in between, nor is what the loss does outside of torch.
    grow_after: windows without trouble after which a rescued size is tried larger again; None for never.
    correct_running_stats: BatchNorm's running statistics move once per window instead of once per micro-batch.

    Over ranks the model is in DistributedDataParallel or FSDP2 (`fully_shard`), and every rank steps at the same moment, on its part
    of the window. careful_windows: how many windows, at first and after any trouble, run without communication and are voted on
    before gradients cross, so that a rank that runs out of memory runs its part again and no other notices; None for all. Later
    windows carry gradients over beside the last micro-batch's backward. rank_timeout_s: after which a missing rank is an error (`RanksDisagree`).
    On a CPU it makes the C allocator steady, as it was while measuring (`AUTOACCUM_MALLOC=default` turns
    that off).
    """

    def __init__(
        self,
        model: torch.nn.Module | Job | Sequence[Job],
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | Plan | None = None,
        plan: Plan | None = None,
        *,
        scheduler: Any = None,
        scaler: Any = None,
        autocast: torch.dtype | None = None,
        max_grad_norm: float | None = None,
        count: Callable[[Any], Any] | None = None,
        split: Callable[[Any, Sequence[int]], Sequence[Any]] | None = None,
        keep: Sequence[Any] = (),
        on_oom: Literal["rescue", "raise"] = "rescue",
        grow_after: int | None = None,
        correct_running_stats: bool = False,
        careful_windows: int | None = 3,
        rank_timeout_s: float = 1800.0,
    ) -> None:
        settings = {
            "scheduler": scheduler, "scaler": scaler, "autocast": autocast, "max_grad_norm": max_grad_norm, "count": count, "split": split, "keep": keep,
        }  # fmt: skip
        if not isinstance(model, torch.nn.Module):
            if not isinstance(optimizer, Plan):
                raise UsageError("Accumulator(job, plan) takes a Plan second")
            given = [name for name, value in settings.items() if value not in (None, (), [])]
            if given:
                raise UsageError(f"Accumulator(job, plan) takes {' and '.join(given)} from the job: say it in Job(...)")
            self._jobs, self._plan = as_jobs(model), optimizer
        else:
            if optimizer is None or isinstance(optimizer, Plan) or not isinstance(plan, Plan):
                raise UsageError("Accumulator(model, optimizer, plan) takes an optimizer second and a Plan third")
            self._jobs = (Job(model, optimizer, _no_loss, (), **settings),)
            self._plan = plan
        if on_oom not in ("rescue", "raise"):
            raise UsageError(f'on_oom must be "rescue" or "raise", not {on_oom!r}')
        if grow_after is not None and (isinstance(grow_after, bool) or not isinstance(grow_after, int) or grow_after < 1):
            raise UsageError(f"grow_after must be a number of windows, at least 1, or None, not {grow_after!r}")
        self._warn_of_differences()
        device = devices.get(str(self._jobs[0].device))
        if device.facts.kind == "cpu":
            from autoaccum.devices import steady_malloc

            steady_malloc()
        self._stats = [RunningStats(job.model) if correct_running_stats else None for job in self._jobs]
        self._engines, self._team = self._ranks(on_oom, careful_windows, rank_timeout_s)
        self._rescuer = Rescuer(self._jobs, device, self._plan, enabled=on_oom == "rescue", grow_after=grow_after, together=self._team is not None)
        self._short, self._begun = 0, False

    @property
    def micro_batch(self) -> int:
        """The most samples that a micro-batch holds now: the plan's, or fewer after a rescue."""
        return self._rescuer.micro_batch

    def step(self, batch: Any, loss: Loss | None = None) -> Any:
        """One optimizer step on a whole window: a batch, cut into micro-batches, or a `Window` from `plan.windows`.

        batch: `plan.share` samples on the host; fewer at the end of an epoch, weighted by their own number.
        loss: `loss(model, batch)`; may be left out with a `Job`. Returns a `StepResult`, or a tuple of them for several jobs.
        Raises `PlanError` for a window of more samples than the share, and for a loader that gives fewer twice in a row.
        """
        whole = batch if isinstance(batch, Window) else Window((batch,), (counted(batch),), self._jobs[0].split)
        return self._step(whole, loss, self._plan.sizes_of)

    def step_micro(self, micro_batches: Iterable[Any] | Window, loss: Loss | None = None, *, samples: Callable[[Any], int] | None = None) -> Any:
        """One optimizer step on micro-batches that make up a whole window together, run one by one as they came.

        One that is larger than the plan's is cut. samples: says how many samples a micro-batch holds, where
        that cannot be read off its first dimension. Returns and raises as `step` does.
        """
        whole = micro_batches if isinstance(micro_batches, Window) else Window.of(micro_batches, self._jobs[0].split, samples)
        return self._step(whole, loss, lambda part, most: [size for held in part.sizes for size in self._plan.sizes(held, most)])

    def _step(self, whole: Window, loss: Loss | None, sizes: Callable[[Window, int], Sequence[int]]) -> Any:
        if self._jobs[0].split is not None:
            whole = whole.cut_by(self._jobs[0].split)
        if loss is not None and len(self._jobs) > 1:
            raise UsageError("several jobs run in turn, each with its own loss: call step(batch) without one")
        if self._team is None:
            self._check(whole.samples)
        announced = None if self._team is None else self._team.announce(whole, [job.count for job in self._jobs])
        self._rescuer.begin()
        results = []
        for at, (job, stats) in enumerate(zip(self._jobs, self._stats)):
            run = partial(accumulation.run, job, loss or job.loss, device=job.device, scaler=job.scaler, stats=stats)
            attempt = run if self._begun else _watched(run)
            try:
                result = self._ran(at, announced, whole, sizes, attempt)
            except ValueError as error:
                if "more than 1 value per channel" in str(error):
                    noted(
                        error,
                        "autoaccum: a micro-batch held one sample, which BatchNorm forbids: plan.windows(loader, drop_last=True) leaves the smaller last "
                        f"window out; this one has {whole.samples} samples, in micro-batches of {self.micro_batch} or less",
                    )
                raise
            if job.scheduler is not None and not result.skipped:
                job.scheduler.step()
            results.append(result)
        self._begun = True
        if self._team is not None:
            self._team.went_by(any(each.rescued is not None for each in results))
        return results[0] if len(results) == 1 else tuple(results)

    def _ran(
        self,
        at: int,
        announced: WindowAnnouncement | None,
        whole: Window,
        sizes: Callable[[Window, int], Sequence[int]],
        attempt: Callable[..., WindowResult],
    ) -> StepResult:
        """One job's window, on this rank and all others."""
        engine = self._engines[at]
        if self._team is None or engine is None or announced is None:
            return StepResult(*self._rescuer.run(whole, lambda most: sizes(whole, most), partial(attempt, samples=whole.samples)))
        while True:
            part = self._team.handed_over(whole, announced)
            crossing = WindowVote(engine, self._team.ranks, announced, self._team.out, at)
            run = partial(attempt, samples=part.samples, crossing=crossing)
            steps = self._team.steps(announced)
            cuts = partial(_in_steps, part.samples, steps) if self._team.lockstep else partial(_no_more, sizes, part)
            if engine.in_step:
                run = partial(_filled_up, run, steps, whole)
            try:
                return StepResult(*self._rescuer.run(part, cuts, run, crossing))
            except VoidWindow as void:
                self._team.ran_out(void.out)
            except Exception as error:
                crossing.failed()  # or they would wait for this rank's vote
                if crossing.crossed and isinstance(error, RuntimeError) and oom.is_lost_rank(error):
                    raise self._team.ranks.lost(error, "carrying gradients across") from error
                raise

    def _ranks(self, on_oom: str, careful_windows: int | None, timeout_s: float) -> tuple[list[Engine | None], RankTeam | None]:
        """The engines that carry gradients across ranks, and the ranks. Raises `UsageError` and `PlanError` where they do not suit the plan."""
        fleet = self._plan.fleet
        if careful_windows is not None and (isinstance(careful_windows, bool) or not isinstance(careful_windows, int) or careful_windows < 0):
            raise UsageError(f"careful_windows must be a number of windows, at least 0, or None for all, not {careful_windows!r}")
        if fleet is None:
            # A plan of one rank, whose model may still be wrapped, in a world of one.
            for each in self._jobs:
                wrapped = engines.parallel(each.model) if dist.is_available() and dist.is_initialized() else None
                if wrapped is not None and dist.get_world_size(wrapped.group) > 1:
                    raise PlanError("the model's gradients cross several ranks, and the plan is for one: every rank calls autoaccum.tune under torchrun")
            return [None] * len(self._jobs), None
        found = [engines.parallel(each.model, lockstep=fleet.lockstep) for each in self._jobs]
        for job, engine in zip(self._jobs, found):
            if engine is None:
                raise UsageError(
                    f"the plan is for {self._plan.world_size} ranks, and the model does not cross them: wrap it, "
                    "torch.nn.parallel.DistributedDataParallel(model), or fully_shard it"
                )
            if (synced := engines.synced_norms(job.model)) and not fleet.lockstep:
                raise UsageError(f"SyncBatchNorm ({synced[0]}) communicates in forward, so every rank must run as many micro-steps: tune(..., equal=True)")
            if isinstance(engine, engines.Fsdp2) and job.scaler is not None:
                raise UsageError("a GradScaler sees but this rank's part of sharded gradients: use bfloat16 with FSDP2, which needs none")
        group = found[0].group if found[0] is not None else None
        world = ranks.here(group, timeout_s)
        here = "one process" if world is None else f"rank {world.rank} of {world.world_size}"
        if world is None or (world.rank, world.world_size) != (self._plan.rank, self._plan.world_size):
            raise PlanError(
                f"the plan is for rank {self._plan.rank} of {self._plan.world_size}, and this is {here}: tune again, or Plan.load(path) on each rank"
            )
        world.same("on_oom", on_oom)
        world.same("the plan's shares", (fleet.shares, fleet.lockstep, fleet.steps))
        world.same("the model, its optimizer and its settings", fingerprint(self._jobs))
        if not fleet.shares[0] and any(batch_norms(each.model) for each in self._jobs) and isinstance(found[0], engines.Ddp):
            raise UsageError(
                "rank 0 has no share, and DistributedDataParallel takes BatchNorm's statistics from rank 0, which would never move: "
                "start a card that has a share as rank 0"
            )
        in_step = any(engine is not None and engine.in_step for engine in found)
        return list(found), RankTeam(world, fleet, careful_windows, in_step=in_step)

    def _check(self, samples: int) -> None:
        share = self._plan.share
        if samples < 1:
            raise PlanError("a window of no samples: give a batch with at least one")
        self._short = self._short + 1 if samples < share else 0
        if samples > share or self._short > 1:
            raise PlanError(
                f"the loader gives {samples} samples a step, this plan needs {share}: loop over plan.windows(loader), or DataLoader(batch_size={share})"
                + (f"; data of fewer than {share} samples needs a smaller target batch" if samples < share else "")
            )

    def _warn_of_differences(self) -> None:
        if self._plan.job_fingerprint and fingerprint(self._jobs) != self._plan.job_fingerprint:
            warnings.warn(
                "the model, optimizer, autocast, scaler or max_grad_norm differs from what the plan was measured with: tune again, or it may run out of memory",
                stacklevel=3,
            )


def _watched(attempt: Callable[..., WindowResult]) -> Callable[..., WindowResult]:
    def watched(cut: Cut, *, on_phase: PhaseCallback, **given: Any) -> WindowResult:
        with optimizer_step.only_we_step(on_phase) as heard:
            return attempt(cut, on_phase=heard, **given)

    return watched


def _no_more(sizes: Callable[[Window, int], Sequence[int]], part: Window, most: int) -> Sequence[int]:
    return sizes(part, most) if part.samples else ()


def _in_steps(samples: int, steps: int, most: int) -> Sequence[int]:
    """As many micro-batches as all ranks run, or as samples are there; more only where a rescue made them smaller."""
    return micro_batches(samples, max(min(steps, samples), -(-samples // most))) if samples else ()


def _filled_up(attempt: Callable[..., WindowResult], steps: int, whole: Window, cut: Cut, **given: Any) -> WindowResult:
    """Where forward communicates, a rank with fewer micro-batches than others runs one sample again, of no weight."""
    held = list(cut)
    if len(held) < steps:
        stand_in = Window(whole.parts[:1], [max(whole.sizes[0], 1)], whole.split, told=whole.told).between(0, 1).parts[0]
        held += [(stand_in, 0)] * (steps - len(held))
    return attempt(held, **given)


def _no_loss(model: Any, batch: Any) -> Any:
    raise UsageError("Accumulator(model, optimizer, plan) knows no loss: call step(batch, loss)")
