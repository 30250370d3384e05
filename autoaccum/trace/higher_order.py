"""Operators that take functions: `flex_attention` and `torch.cond`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from autoaccum.errors import JobError


@contextmanager
def first_branches(assume: Callable[[str], None]) -> Iterator[None]:
    """Inside, `torch.cond` with an unknown condition runs its first branch. assume: records an assumption."""
    original = torch.cond
    places: tuple[Any, ...] = (torch, sys.modules["torch._higher_order_ops"])

    def cond(pred: Any, true_fn: Callable[..., Any], false_fn: Callable[..., Any], operands: Sequence[Any] = ()) -> Any:
        if isinstance(pred, torch.Tensor):
            assume("torch.cond was taken to run its first branch, at {where}")
            pred = True
        return true_fn(*operands) if pred else false_fn(*operands)

    for place in places:
        setattr(place, "cond", cond)  # noqa: B010 - a module's function
    try:
        yield
    finally:
        for place in places:
            setattr(place, "cond", original)  # noqa: B010


class FlexAttention:
    """Runs `flex_attention`: fused if it was compiled, by itself or with the model, else as the scores' whole matrix, as torch runs it then."""

    def __init__(self) -> None:
        self._fused = True

    def run(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], inside: AbstractContextManager[Any]) -> tuple[Any, bool]:
        """The results, and True if one kernel makes them. inside: the context that records what the unfused form allocates.

        Raises `JobError` for another operator.
        """
        name = func.name()
        if name not in ("flex_attention", "flex_attention_backward"):
            raise JobError(f"{name} takes a function and cannot be simulated: write it without, for this estimate, or tune on a real card")
        if name == "flex_attention":
            self._fused = _is_compiled()
        if self._fused:
            return func(*args, **kwargs), True
        module: Any = sys.modules["torch._higher_order_ops.flex_attention"]  # its name in the package is the operator's
        dense = module.sdpa_dense if name == "flex_attention" else module.sdpa_dense_backward
        with inside:
            return dense(*args, **kwargs), False


def _is_compiled() -> bool:
    """True if the call came through `torch.compile` of the user's. One more compiled wrapper is `flex_attention`'s own."""
    frame: Any = sys._getframe(2)
    wrappers = 0
    while frame is not None:
        code = frame.f_code
        wrappers += code.co_filename.endswith("torch/_dynamo/eval_frame.py") and code.co_name == "compile_wrapper"
        frame = frame.f_back
    return wrappers > 1
