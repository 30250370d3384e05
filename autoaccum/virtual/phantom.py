"""A job on tensors that are not there: its windows run for their memory alone, and become tapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from autoaccum.data import batches
from autoaccum.errors import JobError, noted
from autoaccum.simulate import AttentionCall, Card, Tape, Tracer, quieten_transformers, trace
from autoaccum.virtual.substitution import Substitution
from autoaccum.window import Job, accumulation

_TEMPLATE = 2  # samples that are really made, to know their shapes


class Phantom:
    """Jobs that run in turn, turned into phantoms for good: their parameters have no memory any more.

    kind: "cuda", or "cpu" where CUDA tensors cannot be faked. Raises `JobError` for what cannot be traced.
    """

    def __init__(self, jobs: Sequence[Job], kind: str = "cuda") -> None:
        self._jobs, self._kind = jobs, kind
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._templates: dict[int, Any] = {}
        if jobs[0].split is None:
            self._templates[0] = jobs[0].batch_of(_TEMPLATE)
        quieten_transformers()
        self._substitution = Substitution(kind)
        self.attention: set[AttentionCall] = set()  # what attention was asked for in any tape
        with self._mode:
            for job in jobs:
                self._substitution.swap(job)
        self._states = [[dict(state) for state in optimizer.state.values()] for job in jobs for optimizer in job.optimizers]

    def tape(self, windows: Sequence[Sequence[int]], card: Card) -> Tape:
        """The tape of these windows, each given as its micro-batches, on such a card. The optimizer has no state when the first begins."""

        def run(tracer: Tracer) -> None:
            held = self._kept_for_rescue()
            history = self._history_to_come()
            tracer.named(history, "optimizer")
            scalers = [None if job.scaler is None else torch.amp.GradScaler(self._kind, init_scale=1.0, growth_interval=10**9) for job in self._jobs]
            for sizes in windows:
                self._window(tracer, sizes, scalers)
            del held, history

        return self.recorded(run, card)

    def recorded(self, run: Callable[[Tracer], None], card: Card) -> Tape:
        """The tape of whatever `run` does with the jobs' phantoms, and these as they were before."""
        with trace(card, self._kind, self._mode) as tracer:
            for tensor in self._substitution.resident:
                tracer.track(tensor, "parameter")
            tracer.late = {tensor.untyped_storage()._cdata for tensor in self._substitution.late}
            made_before = [each for kept in self._states for state in kept for each in state.values() if isinstance(each, FakeTensor)]
            tracer.named([each for each in made_before if each.device.type == self._kind], "optimizer")  # by its constructor, as Adagrad does
            try:
                run(tracer)
            except Exception as error:
                raise self._told(error, tracer) from error
            finally:
                tape = tracer.finished()
                self._rewind()
        self.attention |= tracer.attention
        return tape

    def shapes(self, micro_batch: int) -> dict[str, tuple[int, ...]]:
        """Shapes of a micro-batch, by path; empty where batches are cut by the job's own `split`."""
        if 0 not in self._templates:
            return {}
        found = batches.shapes(self._templates[0])
        return {path: (micro_batch, *shape[1:]) if shape and shape[0] == _TEMPLATE else shape for path, shape in found.items()}

    # -- one window --

    def _window(self, tracer: Tracer, sizes: Sequence[int], scalers: Sequence[Any]) -> None:
        for job, scaler in zip(self._jobs, scalers):
            tracer.phase = "forward"  # the second of several jobs begins after the first one's step
            steps = [optimizer.register_step_pre_hook(lambda *_, job=job: _name_gradients(tracer, job)) for optimizer in job.optimizers]
            try:
                accumulation.run(
                    job,
                    job.loss,
                    [(self.batch(size), size) for size in sizes],
                    samples=sum(sizes),
                    device=torch.device(self._kind),
                    scaler=scaler,
                    on_phase=tracer.on_phase,
                )
            finally:
                for step in steps:
                    step.remove()
        tracer.ended()

    def batch(self, samples: int) -> Any:
        """A batch on the host, without values."""
        if 0 not in self._templates:
            if samples not in self._templates:
                self._templates[samples] = self._jobs[0].batch_of(samples)
            return batches.changed(self._templates[samples], self._phantom)
        return batches.resize(batches.changed(self._templates[0], self._phantom), samples)

    def _phantom(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the batch: on the host still, and without its values."""
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu", requires_grad=tensor.requires_grad)

    def _kept_for_rescue(self) -> list[torch.Tensor]:
        small: dict[torch.dtype, int] = {}
        for job in self._jobs:
            for buffer in job.model.buffers():
                if buffer.nbytes <= 2**20:
                    small[buffer.dtype] = small.get(buffer.dtype, 0) + buffer.numel()
        return [torch.empty(count, dtype=dtype, device=self._kind) for dtype, count in small.items()]

    def _history_to_come(self) -> list[torch.Tensor]:
        """Of an optimizer with a history (LBFGS): two vectors of all parameters, as often as that is long. Its own conditions
        depend on values, and a few steps would fill a part of it."""
        lengths = [(job, optimizer.defaults.get("history_size", 0)) for job in self._jobs for optimizer in job.optimizers]
        return [torch.empty(2 * length * job.gradient_bytes(), dtype=torch.uint8, device=self._kind) for job, length in lengths if length]

    def _rewind(self) -> None:
        states = iter(self._states)
        for job in self._jobs:
            for optimizer in job.optimizers:
                kept = next(states)
                found = list(optimizer.state)
                optimizer.state.clear()
                for parameter, state in zip(found, kept):
                    optimizer.state[parameter] = dict(state)
            for parameter in job.trained():
                parameter.grad = None

    def _told(self, error: Exception, tracer: Tracer) -> Exception:
        from torch._subclasses.fake_tensor import UnsupportedFakeTensorException, UnsupportedOperatorException

        if isinstance(error, JobError):
            return error
        where = f"in {tracer.phase}, micro-batch {tracer.piece + 1}"
        if isinstance(error, UnsupportedOperatorException):
            return JobError(
                f"{error.args[0] if error.args else error} cannot be traced {where}: it has no rule for the shapes of its results; "
                "register one with torch.library.register_fake, or tune on a real card"
            )
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, UnsupportedFakeTensorException) or "two different devices" in text or "Expected all tensors to be on the same device" in text:
            return JobError(
                f"a tensor of the loss or the model is not where the parameters are ({text}), {where}: make it a buffer of the model, or move it with .to(x.device)"
            )
        if "is not supported for tensor subclasses" in text:
            return JobError(
                f"{text.rstrip('.')} ({where}): simulated tensors have no values to hand to NumPy or to lists; leave that out of the loss while simulating"
            )
        if tracer.assumed():
            noted(error, f"autoaccum: simulated without values, so this may be no fault of the job: {'; '.join(tracer.assumed()[:3])}")
        return error


def _name_gradients(tracer: Tracer, job: Job) -> None:
    tracer.named([parameter.grad for parameter in job.trained() if parameter.grad is not None], "gradients")
