"""The accumulating loop: exactly one optimizer step per window, as the plan says."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal

import torch

from autoaccum import devices, rescue, window
from autoaccum.errors import PlanError, UsageError, noted
from autoaccum.job import Job, fingerprint, in_turn
from autoaccum.plan import Plan
from autoaccum.reading import Say
from autoaccum.regrouping import Cut, Window, counted
from autoaccum.rescue import Rescued, Rescuer
from autoaccum.running_stats import RunningStats

Loss = Callable[[Any, Any], Any]


class StepResult:
    """What one optimizer step did. `loss`, `count`, `grad_norm` and `skipped` wait for the device only when they are read.

    samples: of the window. micro_batches: how many ran. rescued: what an out-of-memory changed, or None.
    """

    def __init__(self, ran: window.Ran, rescued: Rescued | None = None) -> None:
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
            self._jobs, self._plan = in_turn(model), optimizer
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
            from autoaccum.devices import cpu

            cpu.steady_malloc()
        self._stats = [RunningStats(job.model) if correct_running_stats else None for job in self._jobs]
        self._rescuer = Rescuer(self._jobs, device, self._plan, enabled=on_oom == "rescue", grow_after=grow_after)
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
        return self._step(whole, loss, lambda most: self._plan.sizes(whole.samples, most))

    def step_micro(self, micro_batches: Iterable[Any] | Window, loss: Loss | None = None, *, samples: Callable[[Any], int] | None = None) -> Any:
        """One optimizer step on micro-batches that make up a whole window together, run one by one as they came.

        One that is larger than the plan's is cut. samples: says how many samples a micro-batch holds, where
        that cannot be read off its first dimension. Returns and raises as `step` does.
        """
        whole = micro_batches if isinstance(micro_batches, Window) else Window.of(micro_batches, self._jobs[0].split, samples)
        return self._step(whole, loss, lambda most: [size for part in whole.sizes for size in self._plan.sizes(part, most)])

    def _step(self, whole: Window, loss: Loss | None, sizes: rescue.Sizes) -> Any:
        self._check(whole.samples)
        if self._jobs[0].split is not None:
            whole = whole.cut_by(self._jobs[0].split)
        self._rescuer.begin()
        if loss is not None and len(self._jobs) > 1:
            raise UsageError("several jobs run in turn, each with its own loss: call step(batch) without one")
        results = []
        for job, stats in zip(self._jobs, self._stats):
            attempt = partial(window.run, job, loss or job.loss, samples=whole.samples, device=job.device, scaler=job.scaler, stats=stats)
            try:
                result = StepResult(*self._rescuer.run(whole, sizes, attempt if self._begun else _watched(attempt)))
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
        return results[0] if len(results) == 1 else tuple(results)

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


def _watched(attempt: Callable[..., window.Ran]) -> Callable[..., window.Ran]:
    def watched(cut: Cut, *, say: Say) -> window.Ran:
        with window.only_we_step(say) as heard:
            return attempt(cut, say=heard)

    return watched


def _no_loss(model: Any, batch: Any) -> Any:
    raise UsageError("Accumulator(model, optimizer, plan) knows no loss: call step(batch, loss)")
