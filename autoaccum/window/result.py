"""What a window tells: the phases that begin while it runs, and its result, that is its loss, the figures of its gradient, and the outcome of
its optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # the command line imports this file without the cost of importing torch
    import torch

# Called with the phase that begins ("batch", "forward", "backward", "sync", "clip", "step") and the index of the micro-batch.
PhaseCallback = Callable[[str, int], None]


def silent(phase: str, index: int) -> None:
    """A `PhaseCallback` that does nothing."""


class WindowLoss:
    """The loss of a window, kept on the device as one term per micro-batch.

    The terms are added up when the loss is read. counts: what each term's loss sum was counted with; empty for means over samples.
    """

    def __init__(self, terms: list[torch.Tensor], factor: torch.Tensor | None, counts: Sequence[torch.Tensor | float] = ()) -> None:
        self._terms, self._factor, self._counts = terms, factor, counts
        if len(terms) > 16:  # limits how many tensors a stored result keeps alive
            self._terms = [self.sum()]
            self._factor, self._counts = None, ()

    @property
    def terms(self) -> list[torch.Tensor]:
        """The terms of a short window, one for each micro-batch; of a long one, or one with a factor, nothing is said."""
        return [] if self._factor is not None or len(self._terms) < 2 else list(self._terms)

    @property
    def pairs(self) -> list[tuple[torch.Tensor, torch.Tensor | float]]:
        """The loss sum and the count of each micro-batch of a short window, each sum times the same number; empty for means over samples."""
        return list(zip(self._terms, self._counts)) if len(self._terms) == len(self._counts) else []

    def sum(self) -> torch.Tensor:
        """The sum of the terms, 0-d, in single precision at least."""
        import torch

        wide = [term.float() for term in self._terms] if self._terms[0].itemsize == 2 else self._terms
        total = torch.stack(wide).sum()
        return total if self._factor is None else total * self._factor


class WindowGradients(NamedTuple):
    """The figures of a window's gradient. The gradient itself is in `.grad`.

    loss: the loss. counted: the number that loss sums were divided by; None for means over samples, and for several denominators.
    by_term: the loss of each term, by name; empty for a loss of one term.
    """

    loss: WindowLoss
    counted: torch.Tensor | float | None
    micro_batches: int
    by_term: dict[str, WindowLoss]


class WindowResult(NamedTuple):
    """The result of one window. Its tensors stay on their device; reading a value waits for the device.

    total: the loss. counted: the number that loss sums were divided by; None for means over samples, and for several denominators.
    by_term: the loss of each term, by name; empty for a loss of one term.
    grad_norm: the gradient norm before clipping; None without clipping.
    infs: the scaler's found-inf flags, by optimizer and device. A flag above 0 means an inf or nan in a gradient, and then
        no optimizer stepped. Empty without a scaler.
    """

    total: WindowLoss
    samples: int
    micro_batches: int
    counted: torch.Tensor | float | None
    grad_norm: torch.Tensor | None
    infs: tuple[torch.Tensor, ...]
    by_term: dict[str, WindowLoss]

    @property
    def loss(self) -> torch.Tensor:
        """The mean loss of the window, 0-d, on its device."""
        return self.total.sum()

    @property
    def skipped(self) -> bool:
        """True if the optimizers did not step, because a gradient had an inf or nan. Waits for the device."""
        return any(bool(inf > 0) for inf in self.infs)
