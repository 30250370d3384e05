"""Does splitting change the gradient, and why: the split of a few samples against the same samples at once.

The split runs as training runs it. Where it differs, the gradients of the two pieces alone tell more: if some
weights make the whole of them, the loss is a sum or a mean over something else than samples; if none do, a layer or
the loss looks at several samples at once.
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

ORDER = [False, None, True]  # of several jobs, what is told first
_PER_PARAMETER = 4096  # elements of each parameter's gradient that are looked at


def equivalence(model: Any, optimizer: Any = None, loss: Any = None, batch: Any = None, *, samples: int = COMPARED_SAMPLES, **job: Any) -> Equivalence:
    """Compares the gradient of a split batch with that of the whole one, on a few of the job's own samples.

    model, optimizer, loss, batch: as in `tune`, or a `Job` alone, or a list of them. samples: how many, at least 2.
    Everything comes back as it was, as after `tune`. Raises what the job's own code raises.
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
    """As `equivalence`; leaves the jobs' state changed. Of several jobs, the first that is not exact."""
    with torch.compiler.set_stance("force_eager"):  # nothing is worth compiling for three sizes that no one trains with
        found = [_compared(job, _samples_of(jobs[0], samples)) for job in jobs]
    told = min(range(len(found)), key=lambda number: ORDER.index(found[number].exact))
    one = found[told]
    return one if len(jobs) == 1 or one.exact else replace(one, message=f"job {told + 1} of {len(jobs)}: {one.message}")


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
            together = _gradient(job, whole)
            near = _tolerance(job)
            quiet = list(job.model.modules()) if _difference(together, _gradient(job, whole)) > near else []
            with _in_eval(quiet):
                together = _gradient(job, whole) if quiet else together
                if not bool(torch.isfinite(together).all()) or float(together.norm()) <= 1e-7 * _size(job):
                    return told(None, None, "", (), "the gradient of these samples is (nearly) zero or not finite, so it says nothing about splitting")
                if quiet and _difference(together, _gradient(job, whole)) > near:
                    return told(
                        None,
                        None,
                        "random",
                        (),
                        "the loss draws random numbers, also in eval mode: its gradients differ from run to run and cannot be compared",
                    )
                error = _difference(together, _gradient(job, split))
                if error > near:
                    alone = [_gradient(job, [piece]) for piece in split]
                    cause, layers, message = _why(job, together, alone, whole, split, near)
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
    how = ", in eval mode, because the loss draws random numbers in training" if quiet else ""
    return told(True, error, "", (), f"exact: the gradient of {_words(sizes)} samples is that of {samples} at once{how} (relative difference {error:.0e})")


def _why(
    job: Job,
    together: torch.Tensor,
    alone: Sequence[torch.Tensor],
    whole: Sequence[tuple[Any, int]],
    split: Sequence[tuple[Any, int]],
    near: float,
) -> tuple[str, Sequence[str], str]:
    """Cause, layers and a sentence. alone: the gradient of each piece by itself."""
    weights = torch.linalg.lstsq(torch.stack(list(alone), dim=1), together.unsqueeze(1)).solution.squeeze(1)
    rest = _difference(together, sum(weight * gradient for weight, gradient in zip(weights, alone)))  # type: ignore[arg-type]
    if rest > max(near, 0.01):
        mixing = _first_that_mixes(job, whole[0], split[0], near)
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
    as_is = " and ".join(f"{float(share):.3f}" for share in shares)
    owed = " and ".join(f"{size / whole[0][1]:.3f}" for _, size in split)
    field = _field_that_weighs(split, shares)
    if abs(float(weights.sum()) - 1) < 0.02 and getattr(job.loss, "func", job.loss) is token_mean:
        return (
            "token-mean",
            [],
            f"token_mean counts other labels than the model does: pieces weigh {as_is}; say whether it leaves out each sequence's first label, "
            "with loss=functools.partial(autoaccum.token_mean, shifted=True), or shifted=False",
        )
    if abs(float(weights.sum()) - 1) < 0.02 and field:
        return (
            "token-mean",
            [],
            f"the loss is a mean over what counts in {field!r} (labels, tokens, weights), not over samples: pieces weigh {as_is} instead of {owed}; "
            "use loss=autoaccum.token_mean, or return (loss_sum, count)",
        )
    return (
        "weights",
        [],
        f"the loss does not weigh samples alike: pieces weigh {as_is} instead of {owed}; return (loss_sum, count) for a mean over something else than samples",
    )


# What a loss may count in a field: labels that are not left out, also when the first one is shifted away; a mask's
# ones or what is no padding; lengths.
_COUNTS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    lambda field: (field != IGNORED).sum(),
    lambda field: (field[..., 1:] != IGNORED).sum(),
    lambda field: (field != 0).sum(),
    lambda field: (field[..., 1:] != 0).sum(),
    lambda field: field.sum(),
)


def _field_that_weighs(split: Sequence[tuple[Any, int]], shares: torch.Tensor) -> str:
    """The batch's field that explains the weights best; "" where none does."""
    first, second = (batches.tensors(piece) for piece, _ in split)
    off: dict[str, float] = {}
    for (path, here), (_, there) in zip(first, second):
        for count in _COUNTS:
            one, other = float(count(here)), float(count(there))
            if one + other > 0:
                marked = bool((here == IGNORED).any() or (there == IGNORED).any())  # of two that explain it alike, the labels
                off[path] = min(off.get(path, 1.0), abs(one / (one + other) - float(shares[0])) + (0 if marked else 1e-3))
    best = min(off, key=off.__getitem__, default="")
    return best if off.get(best, 1.0) < 0.005 else ""


def _first_that_mixes(job: Job, whole: tuple[Any, int], piece: tuple[Any, int], near: float) -> str:
    """The first module whose result for the first sample depends on which others are there; "" if none does."""
    for (name, alone), (_, among) in zip(_outputs(job, *piece), _outputs(job, *whole)):
        if alone is not None and among is not None and alone.shape == among.shape and _difference(among, alone) > near:
            return name
    return ""


def _outputs(job: Job, batch: Any, samples: int) -> list[tuple[str, torch.Tensor | None]]:
    """What each innermost module made of the first sample, in the order they ran."""
    names = {module: name for name, module in job.model.named_modules() if name and not list(module.children())}
    found: list[tuple[str, torch.Tensor | None]] = []

    def hook(module: torch.nn.Module, _: Any, output: Any) -> None:
        if module in names:
            made = next((leaf for _, leaf in batches.tensors(output)), None) if not isinstance(output, torch.Tensor) else output
            if made is None or not made.is_floating_point() or made.dim() == 0 or made.shape[0] % samples:
                found.append((names[module], None))
            else:
                found.append((names[module], made[: made.shape[0] // samples].detach().flatten()[:_PER_PARAMETER].double().cpu()))

    handle = torch.nn.modules.module.register_module_forward_hook(hook)
    try:
        with torch.no_grad():
            _loss(job, batch)
    finally:
        handle.remove()
    return found


def _loss(job: Job, batch: Any) -> Any:
    with torch.autocast(job.device.type, dtype=job.autocast, enabled=job.autocast is not None):
        return job.loss(job.model, batches.move(batch, job.device))


def _gradient(job: Job, pieces: Sequence[tuple[Any, int]]) -> torch.Tensor:
    """The gradient of a window of these pieces, as training accumulates it: some elements of every parameter, on the host."""
    for parameter in job.trained():
        parameter.grad = None
    accumulation.gradients(job, job.loss, pieces, samples=sum(size for _, size in pieces), device=job.device)
    picked = []
    for parameter in job.trained():
        grad = parameter.grad
        parameter.grad = None
        every = max(parameter.numel() // _PER_PARAMETER, 1)
        if grad is None:
            picked.append(torch.zeros(len(range(0, parameter.numel(), every)), dtype=torch.float64))
        else:
            picked.append((grad.to_dense() if grad.layout != torch.strided else grad).detach().flatten()[::every].double().cpu())
    return torch.cat(picked)


def _difference(right: torch.Tensor, other: torch.Tensor) -> float:
    return float((right - other).norm() / right.norm().clamp_min(torch.finfo(torch.float64).tiny))


def _size(job: Job) -> float:
    """The norm of the parameters: what a gradient is small against."""
    return math.sqrt(sum(float(p.detach().float().norm()) ** 2 for p in job.trained()))


def _tolerance(job: Job) -> float:
    """What rounding explains, of the coarsest type that computes."""
    types = {parameter.dtype for parameter in job.trained()} | ({job.autocast} if job.autocast is not None else set())
    if types & {torch.float16, torch.bfloat16}:
        return 5e-2
    if types == {torch.float64}:
        return 1e-9
    tf32 = job.device.type == "cuda" and (torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)
    return 5e-3 if tf32 else 2e-4


def _dropouts(model: torch.nn.Module) -> list[torch.nn.Module]:
    """By name: every library has its own (Dropout, DropPath, StochasticDepth)."""
    return [module for module in model.modules() if any(word in type(module).__name__ for word in ("Drop", "StochasticDepth"))]


@contextmanager
def _in_eval(modules: Any) -> Iterator[None]:
    """These modules alone, not what they contain, in eval mode."""
    trained = [module for module in modules if module.training]
    for module in trained:
        module.training = False
    try:
        yield
    finally:
        for module in trained:
            module.training = True


def _samples_of(job: Job, samples: int) -> Any:
    """At most this many different samples of the job's own."""
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
        return 0  # only its owner knows how to cut it, and nobody said how many it holds


def _words(sizes: Sequence[int]) -> str:
    return " + ".join(str(size) for size in sizes)
