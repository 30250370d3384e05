"""Values that are not there: the rules for operators whose result depends on the values of simulated tensors.

A number is 1, a comparison is False, a check of all elements is True; `nonzero` and masks select every element, or an expert's tokens.
Every rule that was used is recorded as an assumption.
"""

from __future__ import annotations

import copy
import operator
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor

from autoaccum.errors import JobError
from autoaccum.trace.experts import Routing

_MASKS = (torch.bool, torch.uint8)
_IN_TORCH = "an optimizer or another part of torch"
_INDEXED = frozenset(("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"))
_VIEWS = frozenset(
    [
        "select",
        "slice",
        "view",
        "_unsafe_view",
        "reshape",
        "clone",
        "_to_copy",
        "detach",
        "alias",
        "unbind",
        "squeeze",
        "unsqueeze",
        "expand",
        "permute",
        "t",
        "transpose",
        "max",
        "min",
    ]
)
_COMPARISONS = {"gt": operator.gt, "lt": operator.lt, "ge": operator.ge, "le": operator.le, "eq": operator.eq, "ne": operator.ne}


class UnknownValues:
    """Answers what depends on values. kind: the type of the simulated device. phase: returns the phase of the window.

    assumed: the assumptions so far, in words. routing: which tokens go to which expert.
    """

    def __init__(self, kind: str, phase: Callable[[], str], *, uneven: bool = False) -> None:
        self._kind, self._phase = kind, phase
        self.assumed: Counter[str] = Counter()
        self.routing = Routing(uneven=uneven)

    def assume(self, what: str) -> None:
        """Records an assumption, with the user's line at which it was needed."""
        self.assumed[what.replace("{where}", where())] += 1

    def number(self, func: Any, args: Sequence[Any]) -> Any:
        """The number that a tensor of one element holds."""
        try:
            return func(*args)  # the value of a constant is known
        except DataDependentOutputException:
            known = getattr(args[0], "_autoaccum_truth", None)
            if known is not None:
                return known
            if self._phase() != "step" or where() != _IN_TORCH:  # an optimizer reads its own step count, which is no assumption
                self.assume(
                    f"a value that is read from the device was taken to be {'False' if args[0].dtype is torch.bool else 1}, at {{where}}; that matters only if the memory depends on it"
                )
            if args[0].dtype is torch.bool:
                return False
            return 1.0 if args[0].is_floating_point() else 1

    def numbers(self, tensor: torch.Tensor) -> Any:
        """The list of a tensor's numbers, as `tolist` gives it."""
        counts = self.routing.counts(tensor)
        if counts is not None:
            return counts
        if getattr(tensor, "_autoaccum_truth", None) is None:
            self.assume("values that are read from the device as a list were each taken to be 1, at {where}")
        known = getattr(tensor, "_autoaccum_truth", None)
        value = known if known is not None else False if tensor.dtype is torch.bool else 1.0 if tensor.is_floating_point() else 1
        for size in reversed(tensor.shape):
            value = [value] * size  # not changed by anyone before the list itself is
        return copy.deepcopy(value)

    @contextmanager
    def in_lists(self) -> Iterator[None]:
        """Inside, `tolist` of simulated tensors answers, and `numpy` of experts' numbers of tokens: torch would read memory that is not there."""
        original, original_numpy = FakeTensor.tolist, FakeTensor.numpy

        def tolist(tensor: torch.Tensor) -> Any:
            return self.numbers(tensor)

        def as_numpy(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            counts = self.routing.counts(tensor)
            if counts is None:
                return original_numpy(tensor, *args, **kwargs)
            import numpy

            return numpy.array(counts)

        tensors: Any = FakeTensor
        tensors.tolist, tensors.numpy = tolist, as_numpy
        try:
            yield
        finally:
            tensors.tolist, tensors.numpy = original, original_numpy

    def equal(self, args: Sequence[Any]) -> bool:
        """`torch.equal` and `torch.allclose`: two tensors are equal if they are one."""
        first, second = args[0], args[1]
        if first is second or (first.shape == second.shape and first.untyped_storage()._cdata == second.untyped_storage()._cdata):
            return True
        if not first.dim() and first.dtype is torch.bool:  # how torch's own checks of arguments ask
            return True
        self.assume("two tensors were taken to differ in their values, at {where}")
        return False

    def nonzero(self, mask: torch.Tensor) -> torch.Tensor:
        """The places of the elements of a mask that are true."""
        return mask.new_empty((mask.dim(), self._picked(mask, "nonzero()")), dtype=torch.int64).t()

    def selecting(self, name: str, args: Sequence[Any]) -> Sequence[Any]:
        """The arguments of an indexing, with every mask replaced by indices of the elements that it selects."""
        if name not in _INDEXED or not any(
            isinstance(each, torch.Tensor) and each.dtype in _MASKS and each.device.type == self._kind for each in args[1] or ()
        ):
            return args
        replaced: list[Any] = []
        for index in args[1]:
            if isinstance(index, torch.Tensor) and index.dtype in _MASKS:
                count = self._picked(index, "a mask")
                replaced += [index.new_empty(count, dtype=torch.int64) for _ in range(index.dim())]
            else:
                replaced.append(index)
        return args[0], replaced, *args[2:]

    def _picked(self, mask: torch.Tensor, what: str) -> int:
        count = self.routing.picked(mask)
        if count is not None:
            return count
        self.assume(f"{what} was taken to {'find' if what.endswith('()') else 'select'} every element, at {{where}}: an upper bound")
        return mask.numel()

    def all_of(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The results of an operator whose shapes depend on values. Raises `JobError` for one without a rule."""
        name = func._overloadpacket.__name__
        if name == "masked_select":
            shape = torch.broadcast_shapes(args[0].shape, args[1].shape)
            mask = args[1] if args[1].shape == shape else args[1].new_empty(shape)
            return args[0].new_empty(self._picked(mask, "masked_select()"))
        if name in ("_unique", "_unique2", "unique_dim", "unique_consecutive"):
            self.assume("unique() was taken to find no duplicates, at {where}: an upper bound")
            flat = args[0].new_empty(args[0].numel())
            counts = args[0].new_empty(args[0].numel(), dtype=torch.int64)
            return (flat, counts) if name == "_unique" else (flat, counts, counts.clone())
        if name == "nonzero":
            return self.nonzero(args[0])
        if name == "bincount" and (least := args[2] if len(args) > 2 else kwargs.get("minlength", 0)):
            self.assume(f"bincount() was taken to count {least} values, its minlength, at {{where}}; that matters only if the memory depends on it")
            weights = args[1] if len(args) > 1 and args[1] is not None else args[0]
            return weights.new_empty(least, dtype=torch.int64 if weights is args[0] else weights.dtype)
        if name == "repeat_interleave":
            raise JobError(
                f"repeat_interleave (at {where()}) makes a tensor whose size is the sum of its repeats: give it output_size=, which saves a card the wait, too"
            )
        raise JobError(
            f"{name} (at {where()}) makes a tensor whose shape depends on values, which a simulated card does not have: "
            "give it a fixed size for this estimate, or tune on a real card"
        )

    def follow(self, name: str, args: Sequence[Any], out: Any) -> None:
        """Attaches answers that need no values: no gradient overflowed, `any()` is False, and `all()` is True."""
        self.routing.follow(name, args, out)
        if name == "_amp_foreach_non_finite_check_and_unscale_":
            args[1]._autoaccum_truth = 0.0
        elif not isinstance(out, torch.Tensor):
            return
        elif name in ("isnan", "isinf"):
            out._autoaccum_truth = False  # type: ignore[attr-defined]
        elif name in ("any", "is_nonzero", "_is_any_true"):
            found = self.routing.any(args[0])
            out._autoaccum_truth = bool(found)  # type: ignore[attr-defined]
        elif name in ("all", "_is_all_true"):
            out._autoaccum_truth = True  # type: ignore[attr-defined]
        elif name in ("eq", "ne") and len(args) > 1 and args[0] is args[1]:  # how isnan is written
            out._autoaccum_truth = name == "eq"  # type: ignore[attr-defined]
        elif name == "sum" and getattr(args[0], "_autoaccum_truth", None) is False:
            out._autoaccum_truth = 0  # type: ignore[attr-defined]
        elif name in _COMPARISONS and (known := getattr(args[0], "_autoaccum_truth", None)) is not None and isinstance(args[1], (int, float)):
            out._autoaccum_truth = _COMPARISONS[name](known, args[1])  # type: ignore[attr-defined]
        elif name in _VIEWS and args and (known := getattr(args[0], "_autoaccum_truth", None)) is not None and args[0].dtype is out.dtype:
            out._autoaccum_truth = known  # type: ignore[attr-defined]
        elif name == "logical_not" and isinstance(known := getattr(args[0], "_autoaccum_truth", None), bool):
            out._autoaccum_truth = not known  # type: ignore[attr-defined]


def last_line(error: BaseException) -> str:
    """The user's line at which an error was raised."""
    found, here = "a line of torch", __file__.rsplit("/", 2)[0]
    step = error.__traceback__
    while step is not None:
        path = step.tb_frame.f_code.co_filename
        if "/torch/" not in path and not path.startswith(here) and "<" not in path:
            found = f"{path.rsplit('/', 1)[-1]}:{step.tb_lineno}"
        step = step.tb_next
    return found


def where() -> str:
    """The user's line that runs this operator: the innermost line outside torch and outside autoaccum."""
    frame: Any = sys._getframe(1)
    here = __file__.rsplit("/", 2)[0]
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(here) and "/trace/" not in path[len(here) :]:
            return _IN_TORCH  # autoaccum called torch directly, without a line of the user
        if "/torch/" not in path and not path.startswith(here) and "<" not in path:
            return f"{path.rsplit('/', 1)[-1]}:{frame.f_lineno}"
        frame = frame.f_back
    return _IN_TORCH
