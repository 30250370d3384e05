"""The `Accumulator`: runs a plan's windows, with exactly one optimizer step per window."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch

from autoaccum import devices, oom
from autoaccum.data import Cut, TokenGauge, Window, Windows, batches, counted
from autoaccum.devices import malloc_for_training
from autoaccum.distributed import ChangingShares, Fleet, VoidWindow, WindowAnnouncement, WindowVote
from autoaccum.errors import AutoaccumWarning, PlanError, UsageError, noted
from autoaccum.loop import loss_values, team
from autoaccum.loop.first_windows import FirstWindows
from autoaccum.loop.learner import Learner
from autoaccum.loop.progress import Progress
from autoaccum.loop.rescue import Rescuer
from autoaccum.loop.step_result import StepResult
from autoaccum.plan import Plan
from autoaccum.probe import Request
from autoaccum.window import (
    Job,
    PerToken,
    PhaseCallback,
    RunningStats,
    WindowResult,
    accumulation,
    as_jobs,
    batch_norms,
    captured,
    differing,
    fingerprint,
    optimizer_step,
    per_token,
    replays_graphs,
)

Loss = Callable[[Any, Any], Any]
log = logging.getLogger("autoaccum")


class Accumulator:
    """Runs the windows of a plan: `Accumulator(model, optimizer, plan)` or `Accumulator(job, plan)`.

    Without a plan, `Accumulator(model, optimizer, target_batch=512)` learns it in its first windows, which are exact from the first on.

    job: a `Job`, or a list of jobs, as given to `tune`. Several jobs run one after the other on every window, and `step` returns a
    tuple of results.
    target_batch, target_tokens, memory_limit, headroom, max_micro_batch, equal: as in `tune`, instead of a plan. Micro-batches of the first windows differ in size:
    each one's peak says how large the next may be. The memory limit is enforced while it learns. `plan` is what is known so far.
    cache: start from what an earlier run of the same job has learned on this device, and keep what this one learns. What no longer fits is rescued.
    scheduler: steps once per window, except after a skipped window.
    scaler, autocast, max_grad_norm, count, split, keep: as in `Job`. They must be the same as when the plan was made; a difference
    gives a warning.
    on_oom: "rescue" runs a window that ran out of memory in forward or backward again, from its start, in smaller micro-batches, and
    keeps the smaller size; "raise" raises the error. Before the second run, module attributes other than buffers that a forward
    changed are not restored, nor are effects of the loss outside torch.
    grow_after: the number of windows without trouble after which a size from before a rescue is tried again; None for never. A plan that was
    learned also grows beyond what it settled at, if memory has become free since.
    correct_running_stats: True moves BatchNorm's running statistics once per window instead of once per micro-batch.

    On several ranks, the model is in DistributedDataParallel or FSDP2 (`fully_shard`). All ranks call `step` together, each with its
    part of the window.
    careful_windows: the number of windows, at the start and after any trouble, that run without communication, and in which all
    ranks vote before gradients are reduced; None for all windows. A rank that runs out of memory then runs its part again, without
    effect on the others. In later windows, gradients are reduced during the backward of the last micro-batch.
    replan_after: make the ranks' shares anew after so many windows, from the times that they take; None where a plan was learned and the quickest
    rank waits more than a tenth of a window for the slowest. The windows of samples stay the same.
    rank_timeout_s: the seconds after which a missing rank is an error (`RanksDisagree`).

    On a CPU it sets the C allocator as in the measurement, so that memory peaks are repeatable (`AUTOACCUM_MALLOC=default` turns
    this off).
    """

    def __init__(
        self,
        model: torch.nn.Module | Job | Sequence[Job],
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | Plan | None = None,
        plan: Plan | None = None,
        *,
        target_batch: int | None = None,
        target_tokens: int | None = None,
        memory_limit: int | str | None = None,
        headroom: int | str = "3%",
        max_micro_batch: int | None = None,
        equal: bool = False,
        cache: bool = False,
        scheduler: Any = None,
        scaler: Any = None,
        autocast: torch.dtype | None = None,
        max_grad_norm: float | None = None,
        count: Callable[[Any], Any] | None = None,
        split: Callable[[Any, Sequence[int]], Sequence[Any]] | None = None,
        samples: Callable[[Any], int] | None = None,
        keep: Sequence[Any] = (),
        on_oom: Literal["rescue", "raise"] = "rescue",
        grow_after: int | None = None,
        correct_running_stats: bool = False,
        careful_windows: int | None = 3,
        replan_after: int | None = None,
        rank_timeout_s: float = 1800.0,
    ) -> None:
        settings = {
            "scheduler": scheduler, "scaler": scaler, "autocast": autocast, "max_grad_norm": max_grad_norm, "count": count, "split": split, "samples": samples, "keep": keep,
        }  # fmt: skip
        asked = {
            "target_batch": target_batch,
            "target_tokens": target_tokens,
            "memory_limit": memory_limit,
            "max_micro_batch": max_micro_batch,
            "equal": equal or None,
            "cache": cache or None,
        }
        if isinstance(model, torch.nn.Module):
            known = _plan_if_given(plan, asked, "Accumulator(model, optimizer, plan) takes an optimizer second and a Plan third")
            if optimizer is None or isinstance(optimizer, Plan):
                raise UsageError("Accumulator(model, optimizer, plan) takes an optimizer second and a Plan third")
            self._jobs: tuple[Job, ...] = (Job(model, optimizer, _no_loss, (), **settings),)
        else:
            known = _plan_if_given(plan if optimizer is None else optimizer, asked, "Accumulator(job, plan) takes a Plan second")
            given_names = [name for name, value in settings.items() if value not in (None, (), [])]
            if given_names:
                raise UsageError(f"Accumulator(job, plan) takes {' and '.join(given_names)} from the job: say it in Job(...)")
            self._jobs = as_jobs(model)
        if on_oom not in ("rescue", "raise"):
            raise UsageError(f'on_oom must be "rescue" or "raise", not {on_oom!r}')
        if grow_after is not None and (isinstance(grow_after, bool) or not isinstance(grow_after, int) or grow_after < 1):
            raise UsageError(f"grow_after must be a number of windows, at least 1, or None, not {grow_after!r}")
        device = devices.get(str(self._jobs[0].device))
        self._learner: Learner | None = None
        self._device = device
        self._grow_after, self._quiet = grow_after, 0  # windows since it settled
        if known is None:
            request = Request(target_batch, memory_limit, headroom, max_micro_batch, equal, target_tokens=target_tokens)
            self._learner = team.learner_of(self._jobs, device, request, rank_timeout_s, cache=cache)
            self._plan = self._learner.plan
        else:
            self._plan = known
            if known.learning:
                warnings.warn(
                    f"this plan was saved while it was still learned, after {known.learned_windows} windows, and its micro-batches of {known.micro_batch} stay: "
                    "leave it out to go on learning, or save loop.plan once loop.plan.learning is False",
                    AutoaccumWarning,
                    stacklevel=2,
                )
            self._warn_of_differences()
            if device.facts.kind == "cpu":
                malloc_for_training(known.peak_bytes, known.budget_bytes)
        self._settled = self._learner  # what has learned, also once it has settled
        self._stats = [RunningStats(job.model) if correct_running_stats else None for job in self._jobs]
        self._engines, self._team = team.of_plan(self._jobs, self._plan, on_oom, careful_windows, rank_timeout_s)
        self._rescuer = Rescuer(self._jobs, device, self._plan, enabled=on_oom == "rescue", grow_after=grow_after, together=self._team is not None)
        self._shares = ChangingShares.of(
            self._team,
            self._plan.fleet,
            device.facts.name,
            learns=self._learner is not None,
            every=replan_after,
            in_tokens=self._plan.target_tokens is not None,
        )
        self._tokens = None if self._plan.target_tokens is None else TokenGauge(self._plan.target_tokens, self._jobs[0].count)
        if self._tokens is not None:
            self._jobs = tuple(job if job.loss is _no_loss else per_token(job) for job in self._jobs)
        self._in_pairs = any(batch_norms(job.model) for job in self._jobs)
        self._short, self._begun = 0, False
        self._graphs: list[bool] = []
        self._captured: str | None = None  # what runs one size only
        self._one_size = 0
        self._turn = threading.Lock()
        self._first = FirstWindows.of(self._plan, self._jobs)
        self._progress = Progress(self._plan.target_tokens or self._plan.target_batch, alone=self._team is None)

    @property
    def micro_batch(self) -> int:
        """The largest number of samples in a micro-batch now: the plan's micro-batch, or less after a rescue."""
        return self._rescuer.micro_batch

    @property
    def plan(self) -> Plan:
        """The plan; while it is learned, what is known so far (`plan.learning`)."""
        return self._plan

    def windows(self, loader: Iterable[Any], **settings: Any) -> Windows:
        """The loader's batches, of any size, as windows of exactly the target. The settings, and what is raised, are those of `Plan.windows`.

        They begin where a loaded state ends, and end early after `stop_at_window_end`.
        """
        job = self._jobs[0]
        count = None if self._tokens is None else job.count
        mine = {name: value for name, value in (("samples", job.samples), ("split", job.split), ("count", count)) if value is not None}
        windows = self._progress.through(self._plan.windows(loader, **{**mine, **settings}))
        if self._shares is None or self._plan.fleet is None:
            return windows
        return self._shares.through(windows, lambda samples: self._plan.shares_of(samples), self._plan.fleet)

    @property
    def epoch(self) -> int:
        """The epoch of the last finished window, also of one before `load_state_dict`: `for epoch in range(loop.epoch, epochs)`."""
        return self._progress.epoch

    @property
    def is_stopping(self) -> bool:
        """True once the loop has ended early, after `stop_at_window_end`; on all ranks after the same window."""
        return self._progress.is_stopping

    def stop_at_window_end(self, *signals: int) -> None:
        """Ends `loop.windows` after the window that runs; with `signals`, such as `signal.SIGTERM`, when one of them comes.

        One rank that is asked is enough: all ranks end after the same window, and `is_stopping` says so. A second signal does what it did before.
        Raises `UsageError` for signals outside the main thread.
        """
        self._progress.stop_on(*signals)

    def state_dict(self) -> dict[str, Any]:
        """Where the loop stands after the last finished window: the place in the data, to be saved beside the model, the optimizer and random states.

        It is the same on every rank and knows no ranks, so that a run goes on with others. Only for windows of `loop.windows` or `plan.windows`.
        Raises `PlanError` if the loader shuffles by itself, so that the place cannot be found again.
        """
        return self._progress.state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on behind the window of the state: the next `loop.windows(loader)` begins there. Raises `PlanError` for another target or other data."""
        self._progress.load(state)

    def step(self, batch: Any, loss: Loss | None = None) -> Any:
        """Runs one optimizer step on a window, cut into micro-batches.

        batch: a batch of `plan.share` samples on the host, or a `Window` from `plan.windows`. The last window of an epoch may be
        smaller; its loss is the mean over its own samples.
        loss: `loss(model, batch)`; may be left out with a `Job`.
        Returns a `StepResult`, or a tuple of them for several jobs.
        Raises `PlanError` for a window with more samples than the share, and for a second smaller window in a row.
        """
        window = batch if isinstance(batch, Window) else self._window_of(batch)
        self._take_due_shares(window)
        if self._tokens is not None and loss is not None and self._jobs[0].count is None and not hasattr(loss, "of_window"):
            loss = PerToken(loss)
        try:
            return self._step(window, loss, partial(self._plan.sizes_of, pairs=self._in_pairs), given=False)
        except Exception as error:
            if _is_list_of_batches(batch):
                noted(
                    error, f"autoaccum: step got a list of {len(batch)}; if those are batches, give them to loop.step_micro(list), which runs them one by one"
                )
            raise

    def _window_of(self, batch: Any) -> Window:
        job = self._jobs[0]
        return Window((batch,), (counted(batch, job.samples, cut_by_user=job.split is not None),), job.split, told=job.samples is not None)

    def step_micro(self, micro_batches: Iterable[Any] | Window, loss: Loss | None = None, *, samples: Callable[[Any], int] | None = None) -> Any:
        """Runs one optimizer step on given micro-batches, which together are one window. They run one by one, as they are.

        A micro-batch that is larger than the plan's is cut.
        samples: `samples(batch)`, the number of samples in a micro-batch, if its first dimension does not give it.
        Returns and raises the same as `step`.
        """
        window = micro_batches if isinstance(micro_batches, Window) else Window.of(micro_batches, self._jobs[0].split, samples or self._jobs[0].samples)
        self._take_due_shares(window)
        return self._step(window, loss, lambda part, most: [size for part_size in part.sizes for size in self._plan.sizes(part_size, most)], given=True)

    def _step(self, window: Window, loss: Loss | None, sizes: Callable[[Window, int], Sequence[int]], *, given: bool) -> Any:
        if not self._turn.acquire(blocking=False):
            raise UsageError("two threads call step of one Accumulator at the same time, and its windows run one after the other: let one thread train")
        try:
            return self._trained(window, loss, sizes, given=given)
        finally:
            self._turn.release()

    def _trained(self, window: Window, loss: Loss | None, sizes: Callable[[Window, int], Sequence[int]], *, given: bool) -> Any:
        of_loader = window
        if self._jobs[0].split is not None:
            window = window.cut_by(self._jobs[0].split)
        if loss is not None and len(self._jobs) > 1:
            raise UsageError("several jobs run in turn, each with its own loss: call step(batch) without one")
        if self._team is None:
            self._check(window)
        announcement = None if self._team is None else self._team.announce(window, [job.count for job in self._jobs], stops=self._progress.is_asked)
        if not self._begun:
            self._graphs = [job.device.type == "cuda" and replays_graphs(job.model, loss or job.loss) for job in self._jobs]
            self._captured = next(filter(None, (captured(job.model, loss or job.loss) for job in self._jobs)), None)
        # What was captured cannot run the few samples that are compared, and where one sample is known to fit, two may not.
        if self._first is not None and self._captured is None and (self._settled is None or self.micro_batch > 1):
            self._first.look(window, loss, self.micro_batch)
            if self._first.is_over:
                self._first = None
        self._rescuer.begin()
        self._may_learn_again()
        if self._tokens is not None and self._learner is None and self._settled is not None and not given and self._settled.goes_on_with(window):
            self._learner = self._settled
        if self._learner is not None:
            sees_window = len(self._jobs) > 1 or any(self._graphs) or hasattr(loss or self._jobs[0].loss, "of_window")
            self._learner.begin(beforehand=sees_window, given=given)
        results = []
        if self._captured is not None:
            sizes = partial(self._of_one_size, sizes)
        for index, (job, stats, graphs) in enumerate(zip(self._jobs, self._stats, self._graphs)):
            run = partial(accumulation.run, job, loss or job.loss, device=job.device, scaler=job.scaler, stats=stats, graphs=graphs)
            attempt = run if self._begun else _watched(job, run)
            try:
                result = self._run_job(index, announcement, window, sizes, attempt)
            except ValueError as error:
                if "more than 1 value per channel" in str(error):
                    noted(
                        error,
                        "autoaccum: a micro-batch held one sample, which BatchNorm forbids: plan.windows(loader, drop_last=True) leaves the smaller last "
                        f"window out; this one has {window.samples} sample{'s' if window.samples > 1 else ''}, in micro-batches of {self.micro_batch} or less",
                    )
                raise
            if job.scheduler is not None and not result.skipped:
                try:
                    job.scheduler.step()
                except Exception as error:
                    noted(error, "autoaccum: raised by the scheduler, after the optimizer step of this window: the weights are updated, and the window is done")
                    raise
            results.append(result)
        if not self._begun and self._learner is None and self._settled is None and self._first is not None and results[0]._result.total.pairs:
            self._first.look(window, loss, self.micro_batch, at_any=True)  # only pairs can have a second part that is no count
        self._begun = True
        if self._learner is not None:
            if self._team is None and len(results) == 1:
                loss_values.warn_of_nothing(results[0]._result, self._learner.sizes, loss or self._jobs[0].loss)
                if self._tokens is None and loss_values.seem_no_mean(results[0]._result, self._learner.sizes):
                    FirstWindows(self._jobs).look(window, loss, 2, at_any=True)  # a sum, or chance: a few samples decide
            self._learned(self._learner, window, stepped=not any(result._result.infs and result.skipped for result in results))
        if self._team is not None:
            self._team.went_by(any(result.rescued is not None for result in results))
        if self._shares is not None and announcement is not None:
            self._agreed(self._shares, announcement)
        self._progress.finished(of_loader, stops=self._progress.is_asked if announcement is None else announcement.stops)
        return results[0] if len(results) == 1 else tuple(results)

    def _of_one_size(self, sizes: Callable[[Window, int], Sequence[int]], window: Window, most: int) -> Sequence[int]:
        cut = sizes(window, most)
        self._one_size = self._one_size or cut[0]
        if set(cut) - {self._one_size}:
            raise UsageError(
                f"{self._captured} was captured by torch.cuda.make_graphed_callables and runs one batch size only, here {self._one_size}, and a window of "
                f"{window.samples} samples would run in micro-batches of {cut[0]} to {cut[-1]}: tune with equal=True before it is captured, and leave a smaller "
                "last window out with plan.windows(loader, drop_last=True)"
            )
        return cut

    def _run_job(
        self,
        index: int,
        announcement: WindowAnnouncement | None,
        window: Window,
        sizes: Callable[[Window, int], Sequence[int]],
        attempt: Callable[..., WindowResult],
    ) -> StepResult:
        """Runs a window of one job, on this rank and together with the other ranks."""
        engine = self._engines[index]
        if self._team is None or engine is None or announcement is None:
            learner = self._learner
            if learner is not None:
                attempt = _read_by(learner, attempt)
            return StepResult(*self._rescuer.run(window, lambda most: sizes(window, most), partial(attempt, samples=window.samples), learner=learner))
        while True:
            part = self._team.handed_over(window, announcement)
            vote = WindowVote(engine, self._team.ranks, announcement, self._team.out, index)
            run: Callable[..., WindowResult] = partial(attempt, samples=part.samples, crossing=vote)
            steps = self._team.steps(announcement)
            cuts = partial(team.in_steps, part.samples, steps) if self._team.lockstep else partial(team.part_sizes, sizes, part)
            if engine.in_step:
                run = partial(team.filled_up, run, steps, window)
            if self._learner is not None:
                run = _read_by(self._learner, run)
            if self._shares is not None and announcement.careful:
                run = team.timed_by(self._shares.pace, self._device, part.samples, run)
            try:
                return StepResult(*self._rescuer.run(part, cuts, run, vote, learner=self._learner))
            except VoidWindow as void:
                self._team.ran_out(void.out)
            except Exception as error:
                vote.failed()  # otherwise the other ranks would wait for this rank's vote
                if vote.crossed and isinstance(error, RuntimeError) and oom.is_lost_rank(error):
                    raise self._team.ranks.lost(error, "carrying gradients across") from error
                raise

    def _agreed(self, shares: ChangingShares, announcement: WindowAnnouncement) -> None:
        """Agrees on new shares with the other ranks after a window."""
        assert self._team is not None
        learner = self._learner
        if shares.are_kept:
            if learner is not None and (self._team.out or not learner.plan.learning):
                self._learner = None
            if self._learner is None:
                self._team.votes_every = 0
            return
        fleet = shares.agreed(
            announcement,
            settled=learner is None or not learner.plan.learning,
            most=self._rescuer.micro_batch if learner is None else learner.most,
            is_whole=announcement.samples >= self._plan.target_batch,
        )
        if fleet is not None:
            self._share_by(shares, fleet)

    def _take_due_shares(self, window: Window) -> None:
        if self._shares is not None and (fleet := self._shares.due(window)) is not None:
            self._share_by(self._shares, fleet)

    def _share_by(self, shares: ChangingShares, fleet: Fleet) -> None:
        """Runs windows with these shares from now on. All ranks call it before the same window."""
        assert self._team is not None
        learner = self._learner
        self._team.follow(fleet)
        if learner is not None:  # all ranks have settled, with the shares so far
            are_new = fleet.shares != self._plan.shares
            learner.follow(fleet)
            self._plan = learner.plan
            self._rescuer.follow(learner.plan)
            if shares.go_on_learning(are_new=are_new):
                return
            self._learner = None
            shares.settle(fleet)
            self._plan = replace(learner.plan, learning=False)
        rank, target = self._plan.rank, self._plan.target_batch
        sizes = tuple(size for size in fleet.sizes(rank, target) if size)
        most = fleet.curves[rank].most
        self._plan = replace(
            self._plan,
            fleet=fleet,
            shares=fleet.shares,
            share=sum(sizes),
            micro_batches=sizes,
            micro_batch=max(sizes, default=0),
            accumulation_steps=len(sizes),
        )
        self._rescuer.follow(self._plan)
        self._rescuer.micro_batch = most
        if learner is not None and rank == 0:
            log.warning("learned in %d windows: %s", self._plan.learned_windows, self._plan)

    def _learned(self, learner: Learner, window: Window, *, stepped: bool) -> None:
        """Takes what a window has shown into the plan."""
        learner.end(window.samples, stepped=stepped)
        self._plan = learner.plan
        self._rescuer.follow(learner.plan)
        if not learner.plan.learning and self._team is None:
            self._learner = None
            self._quiet = 0
            if learner.plan.device.kind == "cpu":
                malloc_for_training(learner.plan.peak_bytes, learner.plan.budget_bytes)

    def _may_learn_again(self) -> None:
        """Goes on learning if there is memory for fewer steps now. Looked at every `grow_after` windows."""
        if self._grow_after is None or self._settled is None or self._learner is not None or self._team is not None:
            return
        self._quiet += 1
        if self._quiet % self._grow_after == 0 and self._settled.goes_on(self.micro_batch):
            self._learner = self._settled

    def _check(self, window: Window) -> None:
        samples, share = window.samples, self._plan.share
        if samples < 1:
            raise PlanError("a window of no samples: give a batch with at least one")
        if self._tokens is not None:
            self._check_tokens(self._tokens, window)
            return
        # A window of `plan.windows` is smaller at the end of an epoch only; several loaders in turn may all end.
        self._short = self._short + 1 if samples < share and not window.regrouped else 0
        if samples > share or self._short > 1:
            raise PlanError(
                f"the loader gives {samples} samples a step, this plan needs {share}: loop over plan.windows(loader), or DataLoader(batch_size={share})"
                + (f"; data of fewer than {share} samples needs a smaller target batch" if samples < share else "")
            )

    def _check_tokens(self, gauge: TokenGauge, window: Window) -> None:
        if window.regrouped:
            return
        ends = [gauge.take(part, size, whole=window.told and window.split is None) == (size, False) for part, size in zip(window.parts[:-1], window.sizes)]
        used, full = gauge.take(window.parts[-1], window.sizes[-1], whole=window.told and window.split is None)
        gauge.restart()
        self._short = 0 if full else self._short + 1
        if not all(ends) or used < window.sizes[-1] or self._short > 1:
            raise PlanError(f"a step of {'fewer' if self._short else 'more'} tokens than the target of {gauge.target}: loop over loop.windows(loader)")

    def _warn_of_differences(self) -> None:
        differences = differing(self._plan.job_fingerprint, fingerprint(self._jobs)) if self._plan.job_fingerprint else ()
        if differences:
            warnings.warn(
                f"the job differs from what the plan was measured with, in {' and in '.join(differences)}: tune again, or it may run out of memory",
                AutoaccumWarning,
                stacklevel=3,
            )


def _plan_if_given(given: Any, asked: dict[str, Any], where: str) -> Plan | None:
    """The plan; None if a target was given instead. Raises `UsageError` for neither and for both. where: the sentence for what is no plan."""
    names = [name for name, value in asked.items() if value is not None]
    if isinstance(given, Plan):
        if names:
            raise UsageError(f"the plan says already how a step is made up: leave {' and '.join(names)} out, or leave the plan out and it is learned")
        return given
    if given is not None or not {"target_batch", "target_tokens"} & set(names):
        raise UsageError(f"{where}; without a Plan, give target_batch=, the samples of an optimizer step, or target_tokens=, and it is learned while training")
    return None


def _is_list_of_batches(batch: Any) -> bool:
    """True for a list of several items that all have the same fields, as batches of one loader have."""
    if type(batch) is not list or len(batch) < 2 or not all(isinstance(item, (tuple, list, dict)) for item in batch):
        return False
    with suppress(Exception):  # whatever is in it, the error of the window itself is what is told
        return len({tuple(batches.shapes(item)) for item in batch}) == 1
    return False


def _watched(job: Job, attempt: Callable[..., WindowResult]) -> Callable[..., WindowResult]:
    def watched(cut: Cut, *, on_phase: PhaseCallback, **settings: Any) -> WindowResult:
        with optimizer_step.only_we_step([job], on_phase) as checked_phase:
            return attempt(cut, on_phase=checked_phase, **settings)

    return watched


def _read_by(learner: Learner, attempt: Callable[..., WindowResult]) -> Callable[..., WindowResult]:
    def read(cut: Cut, *, on_phase: PhaseCallback, **settings: Any) -> WindowResult:
        with learner.watching(on_phase) as reading:
            return attempt(cut, on_phase=reading, **settings)

    return read


def _no_loss(model: Any, batch: Any) -> Any:
    raise UsageError("Accumulator(model, optimizer, plan) knows no loss: call step(batch, loss)")
