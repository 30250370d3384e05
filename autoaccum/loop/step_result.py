"""`StepResult`: what one optimizer step did."""

from __future__ import annotations

from autoaccum.loop.rescue import Rescued
from autoaccum.window import WindowResult


class StepResult:
    """The result of one optimizer step. `loss`, `count`, `grad_norm` and `skipped` wait for the device only when they are read.

    samples: the samples of the window, over all ranks.
    micro_batches: the number of micro-batches that ran on this rank.
    rescued: the changes after an out-of-memory on this rank, or None.
    All other values are the same on every rank.
    """

    def __init__(self, ran: WindowResult, rescued: Rescued | None = None) -> None:
        self._result = ran
        self.samples, self.micro_batches, self.rescued = ran.samples, ran.micro_batches, rescued

    @property
    def loss(self) -> float:
        """The mean loss over the window's samples; for a loss that returns a sum, the sum divided by the window's count."""
        return float(self._result.loss)

    @property
    def terms(self) -> dict[str, float]:
        """The loss of each term, by name, each divided by its own denominator; empty for a loss of one term."""
        return {name: float(loss.sum()) for name, loss in self._result.by_term.items()}

    @property
    def count(self) -> float | None:
        """The number by which the window's loss sum was divided; None for a loss that is a mean over samples."""
        return None if self._result.counted is None else float(self._result.counted)

    @property
    def grad_norm(self) -> float | None:
        """The norm of the accumulated gradient before clipping; None without `max_grad_norm`."""
        return None if self._result.grad_norm is None else float(self._result.grad_norm)

    @property
    def skipped(self) -> bool:
        """True if the scaler found an inf or nan in a gradient, so that no optimizer stepped."""
        return self._result.skipped

    def __repr__(self) -> str:
        rescued = "" if self.rescued is None else f", rescued='{self.rescued}'"
        return f"StepResult(loss={self.loss:.6g}, samples={self.samples}, micro_batches={self.micro_batches}, skipped={self.skipped}{rescued})"
