"""The equivalence check: it compares the gradient of a split batch with that of the whole batch, and finds the cause of a difference.

The split batch runs as in training. If the two gradients differ, the check looks at the gradient of each piece alone.
If a weighted sum of the two pieces' gradients gives the whole gradient, the loss is a sum, or a mean over something else than samples.
If no weights do so, a layer or the loss looks at several samples at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from autoaccum.data import batches
from autoaccum.errors import PlanError, UsageError
from autoaccum.probe.readings import COMPARED_SAMPLES, Equivalence
from autoaccum.window import IGNORED, Job, accumulation, as_jobs, batch_norms, preserved, token_mean

ORDER = [False, None, True]  # of `exact`: with several jobs, the result that comes first here is reported
_PER_PARAMETER = 4096  # compared elements of each parameter's gradient


def equivalence(model: Any, optimizer: Any = None, loss: Any = None, batch: Any = None, *, samples: int = COMPARED_SAMPLES, **job: Any) -> Equivalence:
    """Compares the gradient of a split batch with the gradient of the whole batch, on a few of the job's own samples.

    model, optimizer, loss, batch: as in `tune`. Or `model` is a `Job` or a list of jobs, and the others are left out.
    samples: the number of samples, at least 2.
    As after `tune`, the whole state of the job is restored. Raises what the job's own code raises, and `UsageError` for wrong arguments.
    """
    if isinstance(model, (Job, list, tuple)):
        if optimizer is not None or loss is not None or batch is not None or job:
            raise UsageError("equivalence(job) takes everything from the job: give either a Job or model, optimizer, loss and batch")
        jobs = as_jobs(model)
    else:
        jobs = (Job(model, optimizer, loss, batch, **job),)
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 2:
        raise UsageError(f"samples must be a whole number, at least 2, not {samples!r}: one sample cannot be split")
    with preserved(jobs) as (_, interrupts), interrupts.allowed():
        return compare(jobs, samples)


def compare(jobs: Sequence[Job], samples: int) -> Equivalence:
    """Like `equivalence`, but it does not restore the jobs' state.

    With several jobs, the result is that of the first job that is not exact. If there is none, it is that of the first job that
    could not be compared, else that of the first job.
    """
    with torch.compiler.set_stance("force_eager"):  # compiling does not pay for three sizes that training does not use
        results = [_compared(job, _samples_of(jobs[0], samples)) for job in jobs]
    index = min(range(len(results)), key=lambda number: ORDER.index(results[number].exact))
    result = results[index]
    return result if len(jobs) == 1 or result.exact else replace(result, message=f"job {index + 1} of {len(jobs)}: {result.message}")


def _compared(job: Job, batch: Any) -> Equivalence:
    samples = _count(job, batch)
    if samples < 2:
        return Equivalence(None, samples, (samples,), None, "", (), "one sample cannot be split: give a batch of several to compare")
    first = max(samples * 5 // 8, 1)
    sizes = (first, samples - first)
    pieces = job.split(batch, sizes) if job.split is not None else batches.split(batch, sizes)
    whole: list[tuple[Any, int]] = [(batch, samples)]
    split = list(zip(pieces, sizes))
    norms = batch_norms(job.model)

    def told(exact: bool | None, error: float | None, cause: str, layers: Sequence[str], message: str, norm_error: float | None = None) -> Equivalence:
        return Equivalence(exact, samples, sizes, error, cause, tuple(layers), message, norm_error)

    with _in_eval(_dropouts(job.model)):
        norm_error = _difference(_gradient(job, whole), _gradient(job, split)) if norms and min(sizes) > 1 else None
        with _in_eval(norms.values()):
            whole_gradient = _gradient(job, whole)
            tolerance = _tolerance(job)
            eval_modules = list(job.model.modules()) if _difference(whole_gradient, _gradient(job, whole)) > tolerance else []
            with _in_eval(eval_modules):
                whole_gradient = _gradient(job, whole) if eval_modules else whole_gradient
                if not bool(torch.isfinite(whole_gradient).all()) or float(whole_gradient.norm()) <= 1e-7 * _size(job):
                    return told(None, None, "", (), "the gradient of these samples is (nearly) zero or not finite, so it says nothing about splitting")
                if eval_modules and _difference(whole_gradient, _gradient(job, whole)) > tolerance:
                    return told(
                        None,
                        None,
                        "random",
                        (),
                        "the loss draws random numbers, also in eval mode: its gradients differ from run to run and cannot be compared",
                    )
                error = _difference(whole_gradient, _gradient(job, split))
                if error > tolerance:
                    piece_gradients = [_gradient(job, [piece]) for piece in split]
                    cause, layers, message = _why(job, whole_gradient, piece_gradients, whole, split, tolerance)
                    return told(False, error, cause, layers, f"{message} (the gradient of {_words(sizes)} samples is {error:.1%} off)", norm_error)
    if norms:
        shown = ", ".join(list(norms)[:3]) + (" and more" if len(norms) > 3 else "")
        figure = f": on {_words(sizes)} samples the gradient is {norm_error:.1%} off" if norm_error is not None else ""
        return told(
            False,
            error,
            "batch-norm",
            list(norms),
            f"BatchNorm ({shown}) normalises each micro-batch by itself{figure}; the rest is exact. "
            "Accumulator(correct_running_stats=True) mends its running statistics, GroupNorm does not mix samples",
            norm_error,
        )
    how = ", in eval mode, because the loss draws random numbers in training" if eval_modules else ""
    return told(True, error, "", (), f"exact: the gradient of {_words(sizes)} samples is that of {samples} at once{how} (relative difference {error:.0e})")


def _why(
    job: Job,
    whole_gradient: torch.Tensor,
    piece_gradients: Sequence[torch.Tensor],
    whole: Sequence[tuple[Any, int]],
    split: Sequence[tuple[Any, int]],
    tolerance: float,
) -> tuple[str, Sequence[str], str]:
    """The cause of the difference, the layers that cause it, and a sentence for the user. piece_gradients: the gradient of each piece alone."""
    weights = torch.linalg.lstsq(torch.stack(list(piece_gradients), dim=1), whole_gradient.unsqueeze(1)).solution.squeeze(1)
    rest = _difference(whole_gradient, sum(weight * gradient for weight, gradient in zip(weights, piece_gradients)))  # type: ignore[arg-type]
    if rest > max(tolerance, 0.01):
        mixing = _first_that_mixes(job, whole[0], split[0], tolerance)
        if mixing:
            return (
                "mixed",
                [mixing],
                f"layer {mixing!r} looks at several samples at once, so splitting changes what it computes: its result depends on the micro-batch",
            )
        return "mixed", [], "the loss looks at several samples at once (in-batch negatives, a contrastive or ranking loss): micro-batches have fewer to look at"
    if float((weights - 1).abs().max()) < 0.02:
        return "sum", [], "the loss is a sum over the samples, not their mean: use reduction='mean', or return (loss_sum, number of samples)"
    shares = weights / weights.sum()
    actual = " and ".join(f"{float(share):.3f}" for share in shares)
    expected = " and ".join(f"{size / whole[0][1]:.3f}" for _, size in split)
    field = _field_that_weighs(split, shares)
    if abs(float(weights.sum()) - 1) < 0.02 and getattr(job.loss, "func", job.loss) is token_mean:
        return (
            "token-mean",
            [],
            f"token_mean counts other labels than the model does: pieces weigh {actual}; say whether it leaves out each sequence's first label, "
            "with loss=functools.partial(autoaccum.token_mean, shifted=True), or shifted=False",
        )
    if abs(float(weights.sum()) - 1) < 0.02 and field:
        return (
            "token-mean",
            [],
            f"the loss is a mean over what counts in {field!r} (labels, tokens, weights), not over samples: pieces weigh {actual} instead of {expected}; "
            "use loss=autoaccum.token_mean, or return (loss_sum, count)",
        )
    return (
        "weights",
        [],
        f"the loss does not weigh samples alike: pieces weigh {actual} instead of {expected}; return (loss_sum, count) for a mean over something else than samples",
    )


# What a loss may count in a field: labels that are not ignored, with or without the first label of a sequence;
# the ones of a mask, or tokens that are not padding; lengths.
_COUNTS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    lambda field: (field != IGNORED).sum(),
    lambda field: (field[..., 1:] != IGNORED).sum(),
    lambda field: (field != 0).sum(),
    lambda field: (field[..., 1:] != 0).sum(),
    lambda field: field.sum(),
)


def _field_that_weighs(split: Sequence[tuple[Any, int]], shares: torch.Tensor) -> str:
    """The name of the batch's field whose counts explain the weights best; "" if no field explains them."""
    first, second = (batches.tensors(piece) for piece, _ in split)
    deviation: dict[str, float] = {}
    for (path, first_field), (_, second_field) in zip(first, second):
        for count in _COUNTS:
            first_count, second_count = float(count(first_field)), float(count(second_field))
            if first_count + second_count > 0:
                # If two fields explain the weights equally well, the labels win.
                marked = bool((first_field == IGNORED).any() or (second_field == IGNORED).any())
                deviation[path] = min(deviation.get(path, 1.0), abs(first_count / (first_count + second_count) - float(shares[0])) + (0 if marked else 1e-3))
    best = min(deviation, key=deviation.__getitem__, default="")
    return best if deviation.get(best, 1.0) < 0.005 else ""


def _first_that_mixes(job: Job, whole: tuple[Any, int], piece: tuple[Any, int], tolerance: float) -> str:
    """The name of the first module whose output for the first sample depends on the other samples; "" if there is none."""
    for (name, piece_output), (_, whole_output) in zip(_outputs(job, *piece), _outputs(job, *whole)):
        if (
            piece_output is not None
            and whole_output is not None
            and piece_output.shape == whole_output.shape
            and _difference(whole_output, piece_output) > tolerance
        ):
            return name
    return ""


def _outputs(job: Job, batch: Any, samples: int) -> list[tuple[str, torch.Tensor | None]]:
    """The name and the output for the first sample of each module without children, in the order in which they ran.

    The output is None if it is not a floating-point tensor with a batch dimension.
    """
    names = {module: name for name, module in job.model.named_modules() if name and not list(module.children())}
    outputs: list[tuple[str, torch.Tensor | None]] = []

    def hook(module: torch.nn.Module, _: Any, output: Any) -> None:
        if module in names:
            tensor = next((leaf for _, leaf in batches.tensors(output)), None) if not isinstance(output, torch.Tensor) else output
            if tensor is None or not tensor.is_floating_point() or tensor.dim() == 0 or tensor.shape[0] % samples:
                outputs.append((names[module], None))
            else:
                outputs.append((names[module], tensor[: tensor.shape[0] // samples].detach().flatten()[:_PER_PARAMETER].double().cpu()))

    handle = torch.nn.modules.module.register_module_forward_hook(hook)
    try:
        with torch.no_grad():
            _loss(job, batch)
    finally:
        handle.remove()
    return outputs


def _loss(job: Job, batch: Any) -> Any:
    with torch.autocast(job.device.type, dtype=job.autocast, enabled=job.autocast is not None):
        return job.loss(job.model, batches.move(batch, job.device))


def _gradient(job: Job, pieces: Sequence[tuple[Any, int]]) -> torch.Tensor:
    """The gradient of a window of these pieces, accumulated as in training.

    A vector of float64 on the host: up to about twice `_PER_PARAMETER` evenly spaced elements of each parameter.
    """
    for parameter in job.trained():
        parameter.grad = None
    accumulation.gradients(job, job.loss, pieces, samples=sum(size for _, size in pieces), device=job.device)
    sampled = []
    for parameter in job.trained():
        grad = parameter.grad
        parameter.grad = None
        stride = max(parameter.numel() // _PER_PARAMETER, 1)
        if grad is None:
            sampled.append(torch.zeros(len(range(0, parameter.numel(), stride)), dtype=torch.float64))
        else:
            sampled.append((grad.to_dense() if grad.layout != torch.strided else grad).detach().flatten()[::stride].double().cpu())
    return torch.cat(sampled)


def _difference(reference: torch.Tensor, tensor: torch.Tensor) -> float:
    """The norm of the difference, relative to the norm of `reference`."""
    return float((reference - tensor).norm() / reference.norm().clamp_min(torch.finfo(torch.float64).tiny))


def _size(job: Job) -> float:
    """The norm of all trained parameters. A gradient is (nearly) zero if it is small against this norm."""
    return math.sqrt(sum(float(p.detach().float().norm()) ** 2 for p in job.trained()))


def _tolerance(job: Job) -> float:
    """The relative difference that rounding can cause, for the coarsest type that the job computes with."""
    types = {parameter.dtype for parameter in job.trained()} | ({job.autocast} if job.autocast is not None else set())
    if types & {torch.float16, torch.bfloat16}:
        return 5e-2
    if types == {torch.float64}:
        return 1e-9
    tf32 = job.device.type == "cuda" and (torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)
    return 5e-3 if tf32 else 2e-4


def _dropouts(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The dropout modules. They are found by class name, because every library has its own (Dropout, DropPath, StochasticDepth)."""
    return [module for module in model.modules() if any(word in type(module).__name__ for word in ("Drop", "StochasticDepth"))]


@contextmanager
def _in_eval(modules: Any) -> Iterator[None]:
    """Puts these modules, but not their children, in eval mode inside the context."""
    trained = [module for module in modules if module.training]
    for module in trained:
        module.training = False
    try:
        yield
    finally:
        for module in trained:
            module.training = True


def _samples_of(job: Job, samples: int) -> Any:
    """A batch of at most this many different samples of the job."""
    if callable(job.batch):
        return job.batch_of(samples)
    have = _count(job, job.batch)
    if have <= samples:
        return job.batch
    sizes = [samples, have - samples]
    return (job.split(job.batch, sizes) if job.split is not None else batches.split(job.batch, sizes))[0]


def _count(job: Job, batch: Any) -> int:
    try:
        return batches.count(batch)
    except PlanError:
        if job.split is None:
            raise
        return 0  # only the job's own split can cut this batch, and its number of samples is not known


def _words(sizes: Sequence[int]) -> str:
    return " + ".join(str(size) for size in sizes)
