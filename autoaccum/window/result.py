"""What a window leaves behind: its loss, what is known of its gradient, and its result."""

from __future__ import annotations

from typing import NamedTuple

import torch

_HALVES = (torch.float16, torch.bfloat16)


class WindowLoss:
    """The loss of a window, left on the device as what each micro-batch contributed: adding up waits until somebody asks."""

    def __init__(self, terms: list[torch.Tensor], factor: torch.Tensor | None) -> None:
        self._terms, self._factor = terms, factor
        if len(terms) > 16:  # not to hold on to as many tensors for every result that somebody keeps
            self._terms = [self.sum()]
            self._factor = None

    def sum(self) -> torch.Tensor:
        """Their sum, 0-d. In single precision at least."""
        wide = [term.float() for term in self._terms] if self._terms[0].dtype in _HALVES else self._terms
        total = torch.stack(wide).sum()
        return total if self._factor is None else total * self._factor


class WindowGradients(NamedTuple):
    """The window's gradient is in `.grad`; this is what is known of it."""

    terms: WindowLoss
    counted: torch.Tensor | float | None
    micro_batches: int


class WindowResult(NamedTuple):
    """One window that ran. Tensors stay on their device; reading them is the caller's choice to wait.

    terms: the loss. counted: what sums were divided by, None for means over samples.
    infs: of several optimizers and devices, more than 0 where the scaler found inf or nan in a gradient, and no
    optimizer stepped then; empty without a scaler.
    """

    terms: WindowLoss
    samples: int
    micro_batches: int
    counted: torch.Tensor | float | None
    grad_norm: torch.Tensor | None
    infs: tuple[torch.Tensor, ...]

    @property
    def loss(self) -> torch.Tensor:
        """The window's mean, 0-d, on its device."""
        return self.terms.sum()

    @property
    def skipped(self) -> bool:
        """True if the optimizers did not step, because of inf or nan in a gradient. Waits for the device."""
        return any(bool(inf > 0) for inf in self.infs)
