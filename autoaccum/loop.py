"""The accumulating loop: exactly one optimizer step per window, as the plan says."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from autoaccum import batches, window
from autoaccum.errors import PlanError, UsageError
from autoaccum.job import Job
from autoaccum.plan import Plan


class StepResult:
    """What one optimizer step did. `loss` and `grad_norm` wait for the device only when they are read.

    samples: of the window. micro_batches: how many ran. skipped: the scaler found inf or nan in a gradient,
    and the optimizers did not step.
    """

    def __init__(self, ran: window.Ran) -> None:
        self._ran = ran
        self.samples, self.micro_batches, self.skipped = ran.samples, ran.micro_batches, ran.skipped

    @property
    def loss(self) -> float:
        """Mean over the window's samples (over its count, for a loss that returns a sum)."""
        return float(self._ran.loss)

    @property
    def count(self) -> float | None:
        """What a loss given as a sum was divided by."""
        return None if self._ran.count is None else float(self._ran.count)

    @property
    def grad_norm(self) -> float | None:
        """Norm of the summed gradient before clipping; None without `max_grad_norm`."""
        return None if self._ran.grad_norm is None else float(self._ran.grad_norm)

    def __repr__(self) -> str:
        return f"StepResult(loss={self.loss:.6g}, samples={self.samples}, micro_batches={self.micro_batches}, skipped={self.skipped})"


class Accumulator:
    """Runs windows as a plan says: `Accumulator(model, optimizer, plan)` or `Accumulator(job, plan)`.

    scheduler: stepped once per window that was not skipped. scaler, autocast, max_grad_norm, count, split: as
    in `Job`, and as they were when the plan was made; what differs is warned of.
    On a CPU it makes the C allocator steady, as it was while measuring (`AUTOACCUM_MALLOC=default` turns
    that off).
    """

    def __init__(
        self,
        model: torch.nn.Module | Job,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | Plan,
        plan: Plan | None = None,
        *,
        scheduler: Any = None,
        scaler: Any = None,
        autocast: torch.dtype | None = None,
        max_grad_norm: float | None = None,
        count: Callable[[Any], Any] | None = None,
        split: Callable[[Any, Sequence[int]], Sequence[Any]] | None = None,
    ) -> None:
        if isinstance(model, Job):
            if not isinstance(optimizer, Plan):
                raise UsageError("Accumulator(job, plan) takes a Plan second")
            self._job, self._plan = model, optimizer
        else:
            if isinstance(optimizer, Plan) or not isinstance(plan, Plan):
                raise UsageError("Accumulator(model, optimizer, plan) takes an optimizer second and a Plan third")
            self._job = Job(
                model, optimizer, _no_loss, (), scheduler=scheduler, scaler=scaler, autocast=autocast, max_grad_norm=max_grad_norm, count=count, split=split
            )
            self._plan = plan
        self._device = self._job.device
        self._short = 0
        if self._plan.job_fingerprint and self._job.fingerprint() != self._plan.job_fingerprint:
            warnings.warn(
                "the model, optimizer, autocast, scaler or max_grad_norm differs from what the plan was measured with: tune again, or it may run out of memory",
                stacklevel=2,
            )
        if self._device.type == "cpu":
            from autoaccum.devices import cpu

            cpu.steady_malloc()

    def step(self, batch: Any, loss: Callable[[Any, Any], Any] | None = None) -> StepResult:
        """One optimizer step on one batch of the whole window, cut into micro-batches.

        batch: `plan.share` samples on the host; fewer at the end of an epoch, weighted by their own number.
        loss: `loss(model, batch)`; may be left out with a `Job`.
        Raises `PlanError` for a loader that gives fewer samples than the share twice in a row.
        """
        job, share = self._job, self._plan.share
        samples = batches.count(batch)
        self._short = self._short + 1 if samples < share else 0
        if self._short > 1:
            raise PlanError(f"the loader gives {samples} samples a step, this plan needs {share}: use DataLoader(batch_size={share})")
        sizes = self._plan.sizes(samples)
        pieces = job.split(batch, sizes) if job.split is not None else batches.split(batch, sizes)
        ran = window.run(
            job,
            loss or job.loss,
            zip(pieces, sizes),
            samples=samples,
            count=None if job.count is None else float(job.count(batch)),
            device=self._device,
            scaler=job.scaler,
        )
        if job.scheduler is not None and not ran.skipped:
            job.scheduler.step()
        return StepResult(ran)


def _no_loss(model: Any, batch: Any) -> Any:
    raise UsageError("Accumulator(model, optimizer, plan) knows no loss: call step(batch, loss)")
