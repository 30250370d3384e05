"""The equivalence check: it compares the gradient of a split batch with that of the whole batch, and finds the cause of a difference.

The split batch runs as in training. If the two gradients differ, the check looks at the gradient of each piece alone.
If a weighted sum of the two pieces' gradients gives the whole gradient, the loss is a sum, or a mean over something else than samples.
If no weights do so, a layer or the loss looks at several samples at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from autoaccum.data import IGNORED, batches, variety
from autoaccum.errors import PlanError, UsageError
from autoaccum.probe.readings import COMPARED_SAMPLES, Equivalence
from autoaccum.window import Job, PerToken, RngState, accumulation, as_jobs, batch_norms, preserved, token_mean

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


def compare_values(job: Job, batch: Any, samples: int | None = None) -> str:
    """Looks at loss values alone: a sentence if the loss of a batch does not follow from those of its pieces, weighted by samples.

    Forward only, without dropout, on the given batch, so it costs little and holds no activations. "" if the loss is as expected, and if
    it cannot tell: for losses that draw random numbers, and for values that are not finite.
    samples: of the batch, if they are known.
    """
    samples = _count(job, batch) if samples is None else samples
    if samples < 2 or hasattr(job.loss, "of_window"):  # such a loss sees the whole window, and a piece of it says nothing
        return ""
    sizes = (samples - samples // 2, samples // 2)
    split = list(zip(batches.split(batch, sizes) if job.split is None else job.split(batch, sizes), sizes))
    job = replace(job, autocast=None)  # in half precision loss values are too near each other to tell
    # The whole model in eval mode only if dropout is a function: some models return no loss then.
    for modules in ([*_dropouts(job.model), *batch_norms(job.model).values()], list(job.model.modules())):
        with torch.no_grad(), _in_eval(modules), torch.compiler.set_stance("force_eager"):  # as in `compare`
            returned = [_loss(job, piece) for piece in (batch, batch, split[0][0], split[1][0])]
            whole, again, first, second = map(_scalars_of, returned)
            if whole == again and _sums_of(returned[0]) == _sums_of(returned[1]):
                wrong_pair = _no_count(job, (batch, samples), split)
                break
    else:
        return ""
    owed = [float(size) if job.count is None else float(job.count(piece)) for piece, size in split]
    if wrong_pair:
        return wrong_pair
    sums = [_sums_of(one) for one in (returned[0], *returned[2:])]
    for name, value in sums[0].items():
        parts = [of_piece.get(name, math.nan) for of_piece in sums[1:]]
        if math.isfinite(value) and abs(value - sum(parts)) > _tolerance(job) * max(abs(value), *map(abs, parts)):
            mean = sum(part * size for part, size in zip(parts, sizes)) / samples
            if abs(value - mean) <= _tolerance(job) * max(abs(value), *map(abs, parts)):
                return (
                    f"the first part of the pair that the loss returns is {value:.4g} for {samples} samples, and {parts[0]:.4g} and {parts[1]:.4g} for {_words(sizes)} "
                    "of them, so it is a mean, and a pair is read as (loss_sum, count): return the mean alone, or the sum of the losses and their count"
                )
            return (
                f"the loss sum is {value:.4g} for {samples} samples, and {parts[0]:.4g} and {parts[1]:.4g} for {_words(sizes)} of them, which do not add up: the "
                "samples' losses depend on which others are there (padding that counts, a mean over something else), so micro-batches change the gradient"
                + (f"; {own_cure}" if (own_cure := getattr(job.loss, "cure", "")) else "")
            )
    for name, value in whole.items():
        one, other = first.get(name, math.nan), second.get(name, math.nan)
        if not math.isfinite(value):
            continue
        if not sum(owed):
            continue
        expected = sum(value * weight for value, weight in zip((one, other), owed) if weight) / sum(owed)
        if abs(value - expected) <= _tolerance(job) * max(abs(value), abs(one), abs(other)):
            continue
        term = f"term {name!r} of the loss" if name else "the loss"
        weight = (value - other) / (one - other) if one != other else math.nan
        field = _field_that_weighs(split, torch.tensor([weight, 1 - weight])) if 0 < weight < 1 else ""
        if job.count is not None:
            return (
                f"{term} is no mean over what count= counts: for {_words(sizes)} samples it counts {owed[0]:g} and {owed[1]:g}, and they weigh "
                f"{weight:.3f} and {1 - weight:.3f}" + (f", as {field!r} does" if field else "") + "; let count= count what the loss is a mean over"
            )
        if not math.isfinite(expected):
            return f"{term} is {value:.4g} for {samples} samples and nan for a part of them, in which nothing counts: {_cure(job, batch, '')}"
        if field:
            weighed = f"{weight:.3f} and {1 - weight:.3f}, and by samples {sizes[0] / samples:.3f} and {sizes[1] / samples:.3f}"
            return f"{term} is a mean over what counts in {field!r} (labels, tokens, weights), not over samples: the parts of a split batch have the weights {weighed}; {_cure(job, batch, field)}"
        if abs(value - one - other) <= _tolerance(job) * max(abs(value), abs(one), abs(other)):
            return (
                f"{term} is {value:.4g} for {samples} samples, and {one:.4g} and {other:.4g} for {_words(sizes)} of them: it is a sum over samples, and is "
                "taken for a mean, so micro-batches change the gradient: return the mean, or the pair (loss_sum, count)"
            )
        return (
            f"{term} is {value:.4g} for {samples} samples, and {one:.4g} and {other:.4g} for {_words(sizes)} of them, whose mean is {expected:.4g}: it is no mean "
            "over samples, so micro-batches change it; autoaccum.equivalence(...) looks for the reason"
        )
    return ""


def _scalars_of(returned: Any) -> dict[str, float]:
    """The terms that are means over samples in what a loss returned, by name; by "" for a loss of one term."""
    named = dict(returned.items()) if isinstance(returned, Mapping) else dict(enumerate(returned)) if isinstance(returned, list) else {"": returned}
    return {str(name): float(term) for name, term in named.items() if isinstance(term, torch.Tensor) and term.numel() == 1}


def _sums_of(returned: Any) -> dict[str, float]:
    """The first parts of the pairs in what a loss returned, by term."""
    named = dict(returned.items()) if isinstance(returned, Mapping) else dict(enumerate(returned)) if isinstance(returned, list) else {"": returned}
    return {str(name): float(term[0]) for name, term in named.items() if isinstance(term, tuple) and len(term) == 2 and _is_number(term[0])}


def _cure(job: Job, batch: Any, field: str) -> str:
    own = getattr(job.loss, "cure", "")  # of an integration, whose users do not write the loss
    if own:
        return str(own)
    if isinstance(batch, Mapping) and isinstance(batch.get("labels"), torch.Tensor) and "label" in (field or "labels"):
        return "use loss=autoaccum.token_mean if the model returns its loss as .loss, or return (loss_sum, count)"
    return "return (loss_sum, count)"


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

    rng = RngState(job.device, [kept for kept in job.keep if isinstance(kept, torch.Generator)])
    rng.note()
    with _in_eval(_dropouts(job.model)):
        norm_error = _difference(_gradient(job, whole), _gradient(job, split)) if norms and min(sizes) > 1 else None
        with _in_eval(norms.values()):
            tolerance = _tolerance(job)
            wrong_pair = _no_count(job, whole[0], split)
            if wrong_pair:
                return told(False, None, "count", (), wrong_pair)
            rng.put_back()
            before = _buffers(job, norms)
            whole_gradient = _gradient(job, whole)
            moved = [name for name, buffer in _buffers(job, norms).items() if not torch.equal(buffer, before[name])]
            rng.put_back()
            again = _difference(whole_gradient, _gradient(job, whole))
            if again > (_rounding(job) if moved else tolerance):
                rng.put_back()
                layers, message = _what_moves(job, whole[0], moved, rng)
                if not layers:
                    return told(None, None, "random", (), message)
                return told(False, again, "state", layers, message)
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
                if not error <= tolerance:  # also if it is nan
                    piece_gradients = [_gradient(job, [piece]) for piece in split]
                    if not all(bool(torch.isfinite(gradient).all()) for gradient in piece_gradients):
                        message = f"the gradient of a part of these samples is nan, because nothing counts in it: {_cure(job, batch, '')}"
                        return told(False, None, "token-mean", (), message, norm_error)
                    cause, layers, message = _why(job, whole_gradient, piece_gradients, whole, split, tolerance)
                    return told(False, error, cause, layers, f"{message} (the gradient of {_words(sizes)} samples is {_percent(error)} off)", norm_error)
    if norms:
        shown = ", ".join(list(norms)[:3]) + (" and more" if len(norms) > 3 else "")
        figure = f": on {_words(sizes)} samples the gradient is {_percent(norm_error)} off" if norm_error is not None else ""
        return told(
            False,
            error,
            "batch-norm",
            list(norms),
            f"BatchNorm ({shown}) normalises each micro-batch by itself{figure}; the rest is exact. "
            "Accumulator(correct_running_stats=True) mends its running statistics, GroupNorm does not mix samples",
            norm_error,
        )
    if variety.is_countable(batch) and variety.is_uniform(batch) and not _returns_counts(job, split[0]):
        message = (
            f"could not tell: the gradient of {_words(sizes)} samples is that of {samples} at once, but these samples all hold the same number of labels, "
            "for which a mean over labels looks like a mean over samples: compare samples of unlike lengths, e.g. with batch=autoaccum.worst_case(loader)"
        )
        return told(None, error, "", (), message)
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
        return "mixed", [], _looks_at_several(job)
    if isinstance(job.loss, PerToken):
        actual = " and ".join(f"{float(weight / weights.sum()):.3f}" for weight in weights)
        return (
            "token-mean",
            [],
            "with a target in tokens a scalar is taken for the mean over the labels of its batch other than -100, and this loss is another mean (of sums, of "
            f"samples, or without each sequence's first label): the parts of a split batch have the weights {actual}; return (loss_sum, count), with the labels that it counts",
        )
    if float((weights - 1).abs().max()) < 0.02:
        return "sum", [], "the loss is a sum over the samples, not their mean: use reduction='mean', or return (loss_sum, number of samples)"
    shares = weights / weights.sum()
    own_cure = getattr(job.loss, "cure", "")  # of an integration, whose users do not write the loss
    if own_cure and all(abs(float(share) - size / whole[0][1]) < 0.0005 for share, (_, size) in zip(shares, split)):
        return "weights", [], f"the loss, or a part of it, is a mean over samples, and not over labels: {own_cure}; for a mean over samples, count=len"
    if all(abs(float(share) - size / whole[0][1]) < 0.0005 for share, (_, size) in zip(shares, split)):
        return (
            "mixed",
            [],
            "a part of the loss is no mean over samples (a balance or contrastive loss beside the main one, a regulariser that sees the batch): "
            "return the parts as a dict of terms, each a mean over samples or (loss_sum, count), in a loop of your own where a framework computes the loss",
        )
    actual = " and ".join(f"{float(share):.3f}" for share in shares)
    expected = " and ".join(f"{size / whole[0][1]:.3f}" for _, size in split)
    field = _field_that_weighs(split, shares)
    if abs(float(weights.sum()) - 1) < 0.02 and getattr(job.loss, "func", job.loss) is token_mean:
        return (
            "token-mean",
            [],
            f"token_mean counts other labels than the model does: the parts of a split batch have the weights {actual}; say whether it leaves out each sequence's first label, "
            "with loss=functools.partial(autoaccum.token_mean, shifted=True), or shifted=False",
        )
    if abs(float(weights.sum()) - 1) < 0.02 and field:
        return (
            "token-mean",
            [],
            f"the loss is a mean over what counts in {field!r} (labels, tokens, weights), not over samples: the parts of a split batch have the weights {actual}, and by samples {expected}; "
            + _cure(job, whole[0][0], field),
        )
    if any(float(gradient.norm()) < 1e-9 * float(whole_gradient.norm()) for gradient in piece_gradients):
        return "mixed", [], _looks_at_several(job)  # a sample alone has no gradient, so no weights can be read off
    return (
        "weights",
        [],
        f"the loss does not weigh samples alike: the parts of a split batch have the weights {actual}, and by samples {expected}; "
        + (
            getattr(job.loss, "cure", "")
            or "return (loss_sum, count) for a mean over something else than samples; a root or a logarithm of a mean cannot be split"
        ),
    )


def _looks_at_several(job: Job) -> str:
    return (
        "the loss looks at several samples at once (in-batch negatives, a contrastive or ranking loss), or its gradient is no sum over samples (hooks that clamp "
        "gradients, a ratio or a root of sums, a regulariser inside a sum), so micro-batches change it; "
        + (getattr(job.loss, "cure_of_mixing", "") or "for a loss of embeddings, autoaccum.contrastive(encode, loss) looks at the whole window")
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
    share, of_samples = float(shares[0]), split[0][1] / sum(size for _, size in split)
    nearest = min(0.005, abs(share - of_samples) / 5)  # a field that counts the same in every sample lies near, too, and explains nothing
    explaining: dict[str, tuple[bool, float]] = {}
    for (path, first_field), (_, second_field) in zip(first, second):
        # If two fields explain the weights, the labels win.
        unmarked = not bool((first_field == IGNORED).any() or (second_field == IGNORED).any())
        for count in _COUNTS:
            first_count, second_count = float(count(first_field)), float(count(second_field))
            if first_count + second_count > 0:
                deviation = abs(first_count / (first_count + second_count) - share)
                if deviation < nearest:
                    explaining[path] = min(explaining.get(path, (unmarked, deviation)), (unmarked, deviation))
    return min(explaining, key=explaining.__getitem__, default="")


def _no_count(job: Job, whole: tuple[Any, int], split: Sequence[tuple[Any, int]]) -> str:
    """A sentence if the loss returns pairs whose second part does not add up, as a metric does not; "" otherwise."""
    with torch.no_grad():
        first = _pairs_of(_loss(job, whole[0]))
        if not first:
            return ""
        pairs = [_pairs_of(_loss(job, batch)) for batch, _ in (whole, *split)]
    for name in pairs[0]:
        if not all(name in of_piece for of_piece in (first, *pairs)) or float(first[name]) != float(pairs[0][name]):
            continue  # drawn by chance, as the masks of masked language modelling are
        of_whole, *of_pieces = (float(found[name]) for found in pairs)
        if not all(map(math.isfinite, (of_whole, *of_pieces))):
            return (
                f"the count that the loss returned is {of_whole:g} for {whole[1]} samples: it overflowed, as a sum in float16 does above 65,504; add up in "
                "float32, count.float().sum()"
            )
        if math.isfinite(of_whole) and abs(sum(of_pieces) - of_whole) > 0.02 * max(abs(of_whole), abs(sum(of_pieces))):
            term = f"term {name!r} of the loss is" if name else "loss(model, batch) returned"
            shown = " and ".join(f"{value:.4g}" for value in of_pieces)
            return (
                f"{term} a pair, which is read as (loss_sum, count), but its second part is no count: it is {of_whole:.4g} for {whole[1]} samples and {shown} for "
                f"{_words([size for _, size in split])} of them, and counts add up. Return the loss alone if the second part is a metric, or (loss_sum, count)"
            )
    return ""


def _pairs_of(returned: Any) -> dict[str, Any]:
    """The second parts of the pairs in what a loss returned, by term; by "" for a loss of one term."""
    named = dict(returned.items()) if isinstance(returned, Mapping) else dict(enumerate(returned)) if isinstance(returned, list) else {"": returned}
    return {str(name): term[1] for name, term in named.items() if isinstance(term, tuple) and len(term) == 2 and _is_number(term[1])}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, torch.Tensor) and value.numel() == 1)


def _returns_counts(job: Job, piece: tuple[Any, int]) -> bool:
    """True if the loss says its counts itself, so that equal counts prove as much as unlike ones."""
    if job.count is not None:
        return True
    with torch.no_grad():
        return bool(_pairs_of(_loss(job, piece[0])))


def _buffers(job: Job, norms: Mapping[str, torch.nn.Module]) -> dict[str, torch.Tensor]:
    """Copies of the model's floating-point buffers up to a million elements, without BatchNorm's statistics."""
    skipped = {id(buffer) for norm in norms.values() for buffer in norm.buffers()}
    return {
        name: buffer.detach().clone()
        for name, buffer in job.model.named_buffers()
        if id(buffer) not in skipped and buffer.is_floating_point() and buffer.numel() <= 1_000_000
    }


def _what_moves(job: Job, whole: tuple[Any, int], moved: Sequence[str], rng: RngState) -> tuple[Sequence[str], str]:
    """The layers whose state changes in forward, and a sentence."""
    if moved:
        layers = list(dict.fromkeys(name.rpartition(".")[0] or "the model" for name in moved))
        what = f"{layers[0]!r} changes its buffer{'s' if len(moved) > 1 else ''} {', '.join(repr(name.rpartition('.')[2]) for name in moved[:3])} in forward"
    else:
        rng.put_back()
        first = _outputs(job, *whole)
        rng.put_back()
        second = _outputs(job, *whole)
        layers = [name for (name, _, one), (_, _, other) in zip(first, second) if one is not None and other is not None and _difference(one, other) > 0][:1]
        if not layers:
            return (
                [],
                "the loss of the same samples differs from run to run, so splitting cannot be compared: it draws random numbers from a generator of its own "
                "(give it in keep=[generator]), or keeps something from one call to the next",
            )
        what = f"{layers[0]!r} keeps something from the forward before"
    return (
        layers,
        f"{what} (a codebook, a queue, a hidden state): each micro-batch moves it once and the later ones see it moved, so splitting changes the gradient; "
        "update it once per optimizer step, after loop.step(), or reset it before every batch",
    )


def _first_that_mixes(job: Job, whole: tuple[Any, int], piece: tuple[Any, int], tolerance: float) -> str:
    """The name of the first module whose output for the first sample depends on the other samples; "" if there is none."""
    for (name, piece_inputs, piece_output), (_, whole_inputs, whole_output) in zip(_outputs(job, *piece), _outputs(job, *whole)):
        # Rows may be other samples in a batch of pairs. So a module is blamed only if it was given the same.
        if _differ(whole_output, piece_output, tolerance) and not _differ(whole_inputs, piece_inputs, tolerance):
            return name
    return ""


def _differ(whole: torch.Tensor | None, piece: torch.Tensor | None, tolerance: float) -> bool:
    return whole is not None and piece is not None and whole.shape == piece.shape and _difference(whole, piece) > tolerance


def _outputs(job: Job, batch: Any, samples: int) -> list[tuple[str, torch.Tensor | None, torch.Tensor | None]]:
    """The name, the input and the output for the first sample of each module without children, in the order in which they ran.

    Input and output are None if they are not a tensor with a batch dimension.
    """
    names = {module: name for name, module in job.model.named_modules() if name and not list(module.children())}
    outputs: list[tuple[str, torch.Tensor | None, torch.Tensor | None]] = []

    def of_first(value: Any) -> torch.Tensor | None:
        tensor = next((leaf for _, leaf in batches.tensors(value)), None) if not isinstance(value, torch.Tensor) else value
        if tensor is None or tensor.dim() == 0 or tensor.is_complex() or tensor.shape[0] % samples:
            return None
        return tensor[: tensor.shape[0] // samples].detach().flatten()[:_PER_PARAMETER].double().cpu()

    def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if module in names:
            outputs.append((names[module], of_first(inputs[0]) if inputs else None, of_first(output)))

    handle = torch.nn.modules.module.register_module_forward_hook(hook)
    try:
        with torch.no_grad():
            _loss(job, batch)
    finally:
        handle.remove()
    return outputs


def _loss(job: Job, batch: Any) -> Any:
    with torch.autocast(job.device.type, dtype=job.autocast, enabled=job.autocast is not None):
        return job.loss(job.model, batches.copied(batches.move(batch, job.device)))


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
        return 1e-6  # libraries sum in single precision here and there, as the label smoother of Transformers does
    tf32 = job.device.type == "cuda" and (torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)
    return 5e-3 if tf32 else 2e-4


def _rounding(job: Job) -> float:
    """By how much two runs of the same computation may differ, where the order of sums is not fixed."""
    types = {parameter.dtype for parameter in job.trained()}
    return 1e-2 if types & {torch.float16, torch.bfloat16} else 1e-12 if types == {torch.float64} else 1e-5


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
    """A batch of at most this many different samples of the job, as unlike as there are."""
    if callable(job.batch):
        varied = getattr(job.batch, "varied", None)
        return job.batch_of(samples) if varied is None else varied(samples)
    have = _count(job, job.batch)
    if job.split is None:
        return variety.most_unlike(job.batch, have, samples)
    return job.batch if have <= samples else job.split(job.batch, [samples, have - samples])[0]


def _count(job: Job, batch: Any) -> int:
    if job.split is None:
        return batches.count(batch) if job.samples is None else 0  # nothing can cut a batch whose first dimension does not count samples
    try:
        return job.samples_in(batch)
    except PlanError:
        return 0  # only the job's own split can cut this batch, and its number of samples is not known


def _percent(error: float) -> str:
    return f"{error:.1%}" if error >= 0.001 else f"{100 * error:.2g}%"


def _words(sizes: Sequence[int]) -> str:
    return " + ".join(str(size) for size in sizes)
