"""The tracer: it records every allocation and free of a storage while a job runs on phantom tensors.

Phantom tensors are torch's fake tensors: they have shapes but no memory and no values. The result is a `Tape`.
"""

from __future__ import annotations

import math
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode, UnsupportedOperatorException
from torch.utils._python_dispatch import TorchDispatchMode

from autoaccum.errors import JobError
from autoaccum.simulate import AttentionCall, Card, Tape, canonical, chosen_for, kernels
from autoaccum.trace import card_facts, higher_order, operator_work, packed_sequences, quantised_layers, shape_rules
from autoaccum.trace.known_shapes import KnownShapes
from autoaccum.trace.unknown_values import UnknownValues

aten = torch.ops.aten


@contextmanager
def recording(card: Card, kind: str, mode: FakeTensorMode, *, uneven: bool = False) -> Iterator[Tracer]:
    """Inside, the tracer records the memory of a job on phantom tensors, with the kernels of this card. `finished()` returns the tape.

    kind: the type of the device: "cuda", or "cpu" for an approximation. mode: the mode that made the phantom tensors. uneven: as in `experts.Routing`.
    """
    tracer = Tracer(card, kind, uneven=uneven)
    replaced: tuple[AbstractContextManager[Any], ...] = (
        torch.compiler.set_stance("force_eager"),
        card_facts.told(card, kind, tracer.card_asked),
        higher_order.first_branches(tracer.unknown.assume),
        packed_sequences.of_full_length(kind, tracer.unknown.assume),
        shape_rules.ctc_lengths_on_device(kind),
        quantised_layers.pages_in_host_memory(),
        tracer.unknown.in_lists(),
    )
    with ExitStack() as stack, chosen_for(card.capability) as tracer.attention:
        for each in replaced:
            stack.enter_context(each)
        with mode, tracer:
            yield tracer


class Tracer(TorchDispatchMode):
    """Records storages on devices of type `kind` ("cuda", or "cpu" for an approximation) in `tape`. Use `recording` to make one.

    attention: the attention calls so far. unknown: the rules for operators whose result depends on values, and what was assumed.
    """

    def __init__(self, card: Card, kind: str = "cuda", *, uneven: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tape = Tape()
        self.attention: set[AttentionCall] = set()
        self.phase, self.window, self.piece = "setup", 0, 0
        self.late: set[int] = set()  # storages that are counted from their first use on
        self._card, self._kind = card, kind
        self._live: dict[int, int] = {}
        self._handles: set[tuple[int, str]] = set()
        self._main = threading.get_ident()
        self._threads = {self._main}
        self.unknown = UnknownValues(kind, lambda: self.phase, uneven=uneven)
        self._done = False
        self.asked_for_card = False  # True once the job has asked what card it runs on
        self._flex = higher_order.FlexAttention()
        self._benchmarked: set[Any] = set()
        self._known = KnownShapes()
        self.work: list[operator_work.OperatorWork] | None = None  # the work of every operator, if it is asked for

    # -- calls from the caller --

    def on_phase(self, phase: str, index: int) -> None:
        """A `PhaseCallback`: records the phase of the window."""
        self.phase, self.piece = phase, index
        self.tape.mark(phase, self.window, index)

    def ended(self) -> None:
        """Records the end of a window."""
        self.tape.mark("end", self.window, 0)
        self.window += 1
        self.phase = "forward"

    def named(self, tensors: Sequence[torch.Tensor], kind: str) -> None:
        """Sets the kind of these tensors' blocks; blocks that were allocated earlier are included."""
        for tensor in tensors:
            number = self._live.get(getattr(tensor, "_local_tensor", tensor).untyped_storage()._cdata)
            if number is not None:
                self.tape.kinds[number] = kind

    def card_asked(self) -> None:
        """Called when the job asks what card it runs on."""
        self.asked_for_card = True

    def finished(self) -> Tape:
        """Ends the recording and returns the tape. Later frees are not recorded."""
        self._done = True
        self.tape.assumed = self.assumed()
        return canonical(self.tape)

    def assumed(self) -> tuple[str, ...]:
        """The assumptions so far, in words."""
        return tuple(self.unknown.assumed)

    # -- calls from torch --

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled inside, and to keep the compiler out costs a tenth of a trace's time

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # several times in each operator
            return args[0].device
        for kind in types:
            if kind.__name__ == "DTensor":  # a part of a sharded parameter, whose own operators come again
                return NotImplemented
        kwargs = kwargs or {}
        if threading.get_ident() not in self._threads:  # each thread asks for itself whether torch.tensor(..., device="cuda") may be made on the host first
            self._threads.add(threading.get_ident())
            torch._C._set_only_lift_cpu_tensors(True)
        if isinstance(func, torch._ops.HigherOrderOperator):
            out, is_one = self._flex.run(func, args, kwargs, self)
            if is_one:
                self._made(func.name(), args, _flat(out), True)
            return out
        name = func._overloadpacket.__name__
        if name == "to":  # comes undivided where torch runs a function of its own below autograd
            with self:
                return func.decompose(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return self.unknown.number(func, args)
        if name in ("equal", "allclose"):
            return self.unknown.equal(args)
        if func is aten.nonzero.default and args[0].device.type != "cpu":
            out = self.unknown.nonzero(args[0])
            self.track(out, "nonzero")
            return out
        if self.late:
            self._use_late(args)
        out = self._result(func, name, self.unknown.selecting(name, args), kwargs)
        if func is aten.add.Tensor and self._summed_in_place(args, out):
            return out
        self.unknown.follow(name, args, out)
        here = any(self._here(value) for value in args) or bool(args and isinstance(args[0], (list, tuple)) and any(self._here(value) for value in args[0]))
        results = _flat(out)
        self._made(name, args, results, here)
        if here:
            self._handle(name)
        if self.work is not None and (here or any(self._here(value) for value in results)):
            done = operator_work.of(func, args, kwargs, out, self.phase)
            if done is not None:
                self.work.append(done)
        if self._card.benchmark and kernels.is_benchmarked(name) and any(self._here(value) for value in args):
            self._benchmark(name, args, out)
        return out

    def _result(self, func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """What the operator returns, by torch's rule for its shapes, or by one of ours."""
        rule = shape_rules.of(name) if any(self._here(value) for value in args) else None
        if rule is not None:
            return rule(*args, **kwargs)
        try:
            return self._known.result(func, args, kwargs)
        except DynamicOutputShapeException:
            return self.unknown.all_of(func, args, kwargs)
        except (UnsupportedOperatorException, AssertionError) as error:
            if isinstance(error, AssertionError) and "not compiled with CUDA" not in str(error):
                raise
            return shape_rules.on_host(func, args, kwargs)

    def _made(self, name: str, args: Sequence[Any], results: list[torch.Tensor], here: bool) -> None:
        """Records a call: its results in the order in which a card makes them, and its kernels' temporary memory at the right times."""
        order = kernels.order(name, args) if here else None
        taken = sorted(kernels.taken(name, args, results, self._card), key=lambda piece: piece.begin) if here else []
        made = [results[number] for number in order if number < len(results)] if order is not None else results
        alive: list[tuple[float, list[int]]] = []
        for done in range(len(made) + 1):
            for piece in [piece for piece in taken if done <= piece.begin < done + 1 or (done == len(made) and piece.begin >= done)]:
                alive = self._given_back(alive, piece.begin)
                alive.append((piece.end if piece.end is not None else math.inf, self._workspace(name, piece)))
            if done < len(made):
                alive = self._given_back(alive, done + 0.99)
                self.track(made[done], name)
        self._given_back(alive, math.inf)

    def _given_back(self, alive: list[tuple[float, list[int]]], by: float) -> list[tuple[float, list[int]]]:
        for end, numbers in alive:
            if end <= by:
                for number in numbers:
                    self.tape.died(number)
        return [entry for entry in alive if entry[0] > by]

    def _workspace(self, name: str, taken: kernels.Taken) -> list[int]:
        if taken.staging is None:
            return [self.tape.born(taken.nbytes, "workspace", name)]
        numbers = [self.tape.born(1, "workspace", name) for _ in range(2)]
        self.tape.staged |= {number: (taken.staging, part) for part, number in enumerate(numbers)}
        return numbers

    def _use_late(self, args: Any) -> None:
        for value in args:
            if isinstance(value, (tuple, list)):
                self._use_late(value)
            elif self._here(value) and value.untyped_storage()._cdata in self.late:
                self.late.discard(value.untyped_storage()._cdata)
                self.track(value, "tensor of the loss")
                self.named([value], "parameters")

    def _here(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.device.type == self._kind

    def track(self, tensor: torch.Tensor, operator: str) -> None:
        """Counts a tensor's storage from now on, if it is not counted yet. Raises `JobError` for a layout other than strided."""
        if tensor.device.type != self._kind or self._done:
            return
        if tensor.layout != torch.strided:
            raise JobError(
                f"{operator} makes a tensor of layout {tensor.layout}, which cannot be simulated: use dense ones (sparse=False), or tune on a real card"
            )
        storage = tensor.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes()
        if not nbytes or (key in self._live and self.tape.sizes[self._live[key]] >= nbytes):
            return
        if key in self._live:  # the storage was resized
            self.tape.died(self._live.pop(key))
        kind = "parameters" if self.phase == "setup" else "optimizer" if self.phase == "step" else "activations"
        self._live[key] = number = self.tape.born(nbytes, kind, operator)
        weakref.finalize(storage, self._dropped, key, number).atexit = False

    def resized(self, tensor: torch.Tensor, kind: str) -> None:
        """Counts a storage whose size was changed without an operator; of 0 bytes, as freed. kind: of its memory."""
        storage = tensor.untyped_storage()
        if tensor.device.type != self._kind or self._done:
            return
        number = self._live.get(storage._cdata)
        if number is not None and self.tape.sizes[number] != storage.nbytes():
            self.tape.died(self._live.pop(storage._cdata))
        self.track(tensor, "resize_")
        if storage._cdata in self._live:
            self.tape.kinds[self._live[storage._cdata]] = kind

    def _dropped(self, key: int, number: int) -> None:
        if self._live.get(key) == number:
            del self._live[key]
            if not self._done:
                self.tape.died(number)

    def _handle(self, operator: str) -> None:
        """Records the workspace of a new library handle, which is never freed.

        The main thread and autograd's thread have one handle each.
        """
        for library in kernels.handles(operator):
            handle = threading.get_ident(), library
            if handle not in self._handles and self._card.cublas:
                self._handles.add(handle)
                self.tape.born(kernels.LT_BYTES, "workspace", library)  # the size of cuBLAS's workspace depends on the card, and is set later

    def _benchmark(self, name: str, args: Sequence[Any], out: Any) -> None:
        """Records the benchmark of a new convolution. cuDNN tries every algorithm with its workspace, then empties the cache."""
        signature = (name, *(tuple(value.shape) if isinstance(value, torch.Tensor) else str(value) for value in args))
        if signature in self._benchmarked:
            return
        self._benchmarked.add(signature)
        self.tape.died(self.tape.born(kernels.benchmark_bytes(name, args, out), "workspace", "cudnn benchmark"))
        self.tape.emptied()

    def _summed_in_place(self, args: Sequence[Any], out: torch.Tensor) -> bool:
        """Gives the sum of two gradients the block of the first one, as autograd's in-place sum does. Returns True if it did so.

        Autograd sums gradients in place, but not for tensor subclasses such as fake tensors. The block must have no other user.
        Source: torch/csrc/autograd/input_buffer.cpp.
        """
        if threading.get_ident() == self._main or torch.is_grad_enabled() or not _asked_by_the_engine():
            return False
        first, second = args[0], args[1]
        if not isinstance(second, torch.Tensor) or first.shape != second.shape or not self._here(first):
            return False
        storage = first.untyped_storage()
        key = storage._cdata
        if 0 in first.stride() or first.numel() * first.element_size() != storage.nbytes():
            return False  # autograd does not write to an expanded gradient or to a part of a storage
        if key not in self._live or torch._C._storage_Use_Count(key) > 2:
            return False
        summed = out.untyped_storage()
        self._live[summed._cdata] = number = self._live.pop(key)
        weakref.finalize(summed, self._dropped, summed._cdata, number).atexit = False
        return True


def _flat(out: Any) -> list[torch.Tensor]:
    if isinstance(out, torch.Tensor):
        return [out]
    return [tensor for value in out for tensor in _flat(value)] if isinstance(out, (tuple, list)) else []


def _asked_by_the_engine() -> bool:
    """True if autograd's engine called this operator with no Python code in between, except torch's wrappers."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if not frame.f_code.co_filename.endswith(("torch/_compile.py", "torch/_dynamo/eval_frame.py", "trace/tracer.py")):
            return False
        frame = frame.f_back
    return True
