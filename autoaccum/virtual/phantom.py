"""`Phantom`: a job on tensors without memory. Its windows run only to record their tapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from autoaccum.data import batches
from autoaccum.errors import JobError, noted
from autoaccum.probe import in_eval_mode
from autoaccum.simulate import AttentionCall, Card, Tape
from autoaccum.trace import Draws, OperatorWork, PhantomMode, Substitution, Tracer, last_line, quieten_transformers, recording
from autoaccum.virtual.one_rank import OneRank, local_of
from autoaccum.window import Job, accumulation

_TEMPLATE = 2  # samples of the real batch that shows the shapes


class Phantom:
    """Jobs that run in turn, on fake tensors. The change is permanent: their parameters have no memory any more.

    kind: "cuda", or "cpu" if CUDA tensors cannot be faked. engine, world: as in `Limits`, for one rank of several. Raises `JobError` for a job that cannot be traced.
    """

    def __init__(self, jobs: Sequence[Job], kind: str = "cuda", *, engine: str = "", world: int = 1) -> None:
        self._jobs, self._kind = jobs, kind
        self._mode = PhantomMode()
        self._templates: dict[int, Any] = {}
        if jobs[0].split is None:
            self._templates[0] = jobs[0].batch_of(_TEMPLATE)
        quieten_transformers()
        self._substitution = Substitution(kind)
        self.attention: set[AttentionCall] = set()  # the attention calls of all tapes
        self.draws = Draws()
        self.asked_for_card = False  # True once the jobs have asked what card they run on
        self.experts = 0  # among which tokens are split; 0 without a mixture of experts
        with self._mode:
            for job in jobs:
                self._substitution.swap(job)
            self.rank = OneRank(jobs, engine, world, kind) if engine else None
        self._resident, self._made_from = self._substitution.resident, self._substitution.made_from
        if self.rank is not None:
            self._resident = [local_of(self.rank.replaced.get(id(tensor), tensor)) for tensor in self._resident] + self.rank.resident
            self._made_from = {**self._made_from, **self.rank.made_from}
        self._layouts = [(tensor, tensor.dtype, tensor.size(), tensor.stride()) for tensor in self._resident]
        self._states = [[dict(state) for state in optimizer.state.values()] for job in jobs for optimizer in job.optimizers]

    def tape(self, windows: Sequence[Sequence[int]], card: Card, *, uneven: bool = False) -> Tape:
        """The tape of these windows on a card. The optimizer has no state when the first window begins.

        windows: for each window, the sizes of its micro-batches. uneven: the worst split of tokens over experts, instead of an even one.
        """

        def run(tracer: Tracer) -> None:
            rescue_copies = self._rescue_copies()
            history = self._optimizer_history()
            tracer.named(history, "optimizer")
            scalers = [None if job.scaler is None else torch.amp.GradScaler(self._kind, init_scale=1.0, growth_interval=10**9) for job in self._jobs]
            for sizes in windows:
                self._window(tracer, sizes, scalers)
            del rescue_copies, history

        return self.recorded(run, card, uneven=uneven)

    def work(self, samples: int, card: Card) -> list[OperatorWork]:
        """What every operator of a window of one micro-batch computes and moves."""
        found: list[OperatorWork] = []

        def run(tracer: Tracer) -> None:
            tracer.work = found
            self._window(tracer, (samples,), [None] * len(self._jobs))

        self.recorded(run, card)
        return found

    def evaluation_tape(self, samples: int, trained: int, card: Card) -> Tape:
        """The tape of an optimizer step of `trained` samples, and then of `samples` samples that run forward only, in eval mode."""

        def run(tracer: Tracer) -> None:
            history = self._optimizer_history()
            tracer.named(history, "optimizer")
            self._window(tracer, (trained,), [None] * len(self._jobs))
            tracer.tape.emptied()
            for job in self._jobs:
                tracer.on_phase("evaluate", 0)
                with in_eval_mode(job), torch.no_grad(), torch.autocast(self._kind, dtype=job.autocast, enabled=job.autocast is not None):
                    job.loss(job.model, batches.move(self.batch(samples), torch.device(self._kind)))
            del history

        return self.recorded(run, card)

    def recorded(self, run: Callable[[Tracer], None], card: Card, *, uneven: bool = False) -> Tape:
        """The tape of all that `run` does with the jobs. Afterwards the jobs are in the same state as before."""
        with recording(card, self._kind, self._mode, uneven=uneven) as tracer:
            if self.rank is not None:
                self.rank.tracer = tracer
            for tensor in self._resident:
                whole = self._made_from.get(id(tensor), 0)
                number = tracer.tape.born(whole, "parameters", "packing") if whole else None
                tracer.track(tensor, "parameter")
                if number is not None:
                    tracer.tape.died(number)
                if self.rank is not None and (named := self.rank.kinds.get(id(tensor))):
                    tracer.named([tensor], named)
            tracer.late = {tensor.untyped_storage()._cdata for tensor in self._substitution.late}
            made_before = [value for states in self._states for state in states for value in state.values() if isinstance(value, FakeTensor)]
            tracer.named([value for value in made_before if value.device.type == self._kind], "optimizer")  # made by its constructor, as Adagrad does
            try:
                with self.draws.seeded():
                    run(tracer)
            except Exception as error:
                raise self._explained(error, tracer) from error
            finally:
                tape = tracer.finished()
                self._rewind()
        self.attention |= tracer.attention
        self.asked_for_card |= tracer.asked_for_card
        if tracer.unknown.routing.met:
            self.experts = max(self.experts, tracer.unknown.routing.experts)
        return tape

    def shapes(self, micro_batch: int) -> dict[str, tuple[int, ...]]:
        """Shapes of a micro-batch, by path; empty if the job's own `split` cuts batches."""
        if 0 not in self._templates:
            return {}
        shapes = batches.shapes(self._templates[0])
        return {path: (micro_batch, *shape[1:]) if shape and shape[0] == _TEMPLATE else shape for path, shape in shapes.items()}

    # -- one window --

    def _window(self, tracer: Tracer, sizes: Sequence[int], scalers: Sequence[Any]) -> None:
        def on_phase(phase: str, index: int) -> None:
            tracer.on_phase(phase, index)
            if self.rank is not None:
                self.rank.on_phase(phase)

        for job, scaler in zip(self._jobs, scalers):
            tracer.phase = "forward"  # with several jobs, a job begins after the step of the job before
            handles = [optimizer.register_step_pre_hook(lambda *_, job=job: _name_gradients(tracer, job)) for optimizer in job.optimizers]
            try:
                accumulation.run(
                    job,
                    job.loss,
                    [(self.batch(size), size) for size in sizes],
                    samples=sum(sizes),
                    device=torch.device(self._kind),
                    scaler=scaler,
                    on_phase=on_phase,
                )
            finally:
                for handle in handles:
                    handle.remove()
        if self.rank is not None:
            self.rank.on_phase("end")
        tracer.ended()

    def batch(self, samples: int) -> Any:
        """A batch in host memory, without values."""
        if 0 not in self._templates:
            if samples not in self._templates:
                self._templates[samples] = self._jobs[0].batch_of(samples)
            return batches.changed(self._templates[samples], self._blank_tensor)
        return batches.resize(batches.changed(self._templates[0], self._blank_tensor), samples)

    def _blank_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the batch in host memory, without its values."""
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu", requires_grad=tensor.requires_grad)

    def _rescue_copies(self) -> list[torch.Tensor]:
        small: dict[torch.dtype, int] = {}
        for job in self._jobs:
            for buffer in job.model.buffers():
                if buffer.nbytes <= 2**20:
                    small[buffer.dtype] = small.get(buffer.dtype, 0) + buffer.numel()
        return [torch.empty(count, dtype=dtype, device=self._kind) for dtype, count in small.items()]

    def _optimizer_history(self) -> list[torch.Tensor]:
        """The full history of optimizers that have one (LBFGS): for each entry, two vectors of all parameters.

        It is allocated at once: the optimizer's own conditions depend on values, and a few steps would fill only a part of it.
        """
        lengths = [(job, optimizer.defaults.get("history_size", 0)) for job in self._jobs for optimizer in job.optimizers]
        return [torch.empty(2 * length * job.gradient_bytes(), dtype=torch.uint8, device=self._kind) for job, length in lengths if length]

    def _rewind(self) -> None:
        states = iter(self._states)
        for job in self._jobs:
            for optimizer in job.optimizers:
                initial_states = next(states)
                parameters = list(optimizer.state)
                optimizer.state.clear()
                for parameter, state in zip(parameters, initial_states):
                    optimizer.state[parameter] = dict(state)
            for parameter in job.trained():
                parameter.grad = None
        if self.rank is not None:
            self.rank.rewind()
        for tensor, dtype, size, stride in self._layouts:
            if (tensor.dtype, tensor.size()) != (dtype, size):  # a forward gave it other data, as Linear4bit casts its bias to the dtype of its input
                with self._mode:
                    tensor.data = torch.empty_strided(size, stride, dtype=dtype, device=tensor.device)

    def _explained(self, error: Exception, tracer: Tracer) -> Exception:
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
        if "shape_env must not be None" in text:
            return JobError(f"nested tensors cannot be simulated ({where}): give padded samples for this estimate, or tune on a real card")
        if "INTERNAL ASSERT" in text or "Could not run 'aten::" in text or "Torch not compiled with CUDA" in text:
            return JobError(
                f"the job does something that cannot be simulated ({text[:120]}; {where}, at {last_line(error)}): leave that out for the estimate, or tune on a real card"
            )
        if tracer.assumed():
            noted(error, f"autoaccum: simulated without values, so this may be no fault of the job: {'; '.join(tracer.assumed()[:3])}")
        return error


def _name_gradients(tracer: Tracer, job: Job) -> None:
    tracer.named([parameter.grad for parameter in job.trained() if parameter.grad is not None], "gradients")
