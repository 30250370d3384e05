"""What would make a job fit: the same job with one thing or several changed, to be traced or tuned like any other.

torch is imported only where a job is changed: the process that asks does without.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from autoaccum.errors import UsageError, in_brief

if TYPE_CHECKING:
    import torch

    from autoaccum.plan import Plan
    from autoaccum.window import Job

# Names of changes, those that cost the least first: first each alone, then several together.
ALONE: tuple[tuple[str, ...], ...] = (("bf16",), ("fused",), ("8-bit-optimizer",), ("checkpointing",), ("lora",), ("half-length",))
_TOGETHER: tuple[tuple[str, ...], ...] = (
    ("bf16", "checkpointing"),
    ("bf16", "checkpointing", "8-bit-optimizer"),
    ("lora", "checkpointing"),
    ("lora", "bf16", "checkpointing"),
    ("nf4", "lora", "bf16", "checkpointing"),
    ("lora", "bf16", "checkpointing", "half-length"),
    ("nf4", "lora", "bf16", "checkpointing", "half-length"),
)
IN_WORDS = {
    "bf16": "bfloat16 autocast", "fused": "a fused optimizer", "8-bit-optimizer": "an 8-bit optimizer", "checkpointing": "blocks checkpointed",
    "nf4": "base packed in 4 bits", "lora": "frozen base with LoRA (r=16)", "half-length": "half the length",
}  # fmt: skip
_ALREADY = "already"  # in the sentence about a change that the job has
_FEWEST_BLOCKS = 2
_OPTIONS = ("lr", "betas", "eps", "weight_decay")  # of an optimizer, that another one takes as they are
_SHORTEST = 8  # a dimension that is shorter is no length
_LENGTH = "length-"  # before a percentage
_LOOKS, _NEAR = 8, 3  # for the longest length that fits: at most so many, to so many percent


@dataclass(frozen=True)
class WhatIf:
    """A changed job on a card. changes: names of `IN_WORDS`. times: the arithmetic of a sample, as a multiple of the unchanged job's.

    error: why the changed job could not be traced; "" if it was. length: of the samples, where the longest that fits was looked for.
    """

    changes: tuple[str, ...]
    fits: bool
    micro_batches: tuple[int, ...]
    peak_bytes: int
    times: float
    error: str = ""
    length: int | None = None

    @property
    def words(self) -> str:
        return in_words(self.changes) + ("" if self.length is None else f" ({self.length})")


@dataclass(frozen=True)
class ChangedPlan:
    """A changed job's plan on the device that is here. plan: None if nothing fits or the job failed; error says why.

    speed: samples a second, as a multiple of the unchanged job's; None if one of the two was not timed.
    """

    changes: tuple[str, ...]
    plan: Plan | None
    speed: float | None = None
    error: str = ""

    @property
    def words(self) -> str:
        return in_words(self.changes)

    @property
    def part(self) -> float:
        """How much of the length is left, from 0 to 1."""
        return part(self.changes)

    def as_dict(self) -> dict[str, Any]:
        plan = self.plan
        figures = {} if plan is None else {"peak_bytes": plan.peak_bytes, "samples_per_second": plan.samples_per_second}
        sizes = () if plan is None else plan.micro_batches
        return {"changes": list(self.changes), "fits": plan is not None, "micro_batches": list(sizes), **figures, "speed": self.speed, "error": self.error}


def in_words(names: Sequence[str]) -> str:
    """A set of changes in words: `"bfloat16 autocast + 40 % of the length"`."""
    return " + ".join(f"{_percent(name)} % of the length" if _percent(name) else IN_WORDS[name] for name in names)


def of_length(percent: int) -> str:
    """The name of the change to so much of the length of samples."""
    return f"{_LENGTH}{percent}"


def _percent(name: str) -> int:
    """What `of_length` was given; 0 for any other change."""
    given = name.removeprefix(_LENGTH)
    return int(given) if name.startswith(_LENGTH) and given.isdigit() else 0


def changed(jobs: Sequence[Job], names: Sequence[str]) -> tuple[Job, ...]:
    """The jobs with these changes. Their models change in place. Raises `UsageError` with the reason for what the job has already, or cannot have."""
    for name in names:
        if name not in _CHANGES and not 0 < _percent(name) < 100:
            raise UsageError(f"there is no change {in_brief(name)}: {', '.join(_CHANGES)}, {of_length(75)} for three quarters of the length")
        jobs = tuple(_at_length(job, _percent(name)) if _percent(name) else _CHANGES[name](job) for job in jobs)
    return tuple(jobs)


def longest(excess: Callable[[int], float], *, whole: float, half: float | None = None) -> int:
    """The largest part of the length that fits, in percent, to about 3 %; 0 if no part that was looked at does.

    excess: `excess(percent)`, the bytes by which the peak is above what may be taken, negative if it fits; infinite if that is not known. whole, half:
    the same of all and of half the length. A straight line through what is known says where to look first, then a look is taken beside it, and then in
    the middle of what is left, because peaks come in the steps of an allocator.
    """
    known = {0: -math.inf, 100: whole} if half is None else {0: -math.inf, 100: whole, 50: half}
    low = max(percent for percent, over in known.items() if over < 0)
    high = min(percent for percent, over in known.items() if percent > low)
    for look in range(_LOOKS):
        if high - low <= _NEAR:
            break
        percent = (low + high) // 2
        line = sorted((size, over) for size, over in known.items() if math.isfinite(over))
        if look == 0 and len(line) > 1 and line[1][1] > line[0][1]:
            (first, below), (second, above) = line[:2]
            percent = int(first - below * (second - first) / (above - below))
        elif look == 1:  # beside the first
            percent = low + _NEAR if known.get(low, -math.inf) > -math.inf else high - _NEAR
        percent = min(max(percent, low + 1), high - 1)
        known[percent] = excess(percent)
        low, high = (percent, high) if known[percent] < 0 else (low, percent)
    return low


def together(refused: Mapping[str, str]) -> list[tuple[str, ...]]:
    """Changes to be tried together. refused: by change, why the job cannot have it: what it has already is left out, and so is all with what it cannot have."""
    found: dict[tuple[str, ...], None] = {}
    for names in _TOGETHER:
        rest = tuple(name for name in names if _ALREADY not in refused.get(name, ""))
        if len(rest) > 1 and not any(name in refused for name in rest):
            found[rest] = None
    return list(found)


def times(names: Sequence[str], half_rate: float) -> float:
    """The arithmetic of a sample, as a multiple of the unchanged job's: forward counts 1 and backward 2.

    half_rate: how many times as fast the card computes in half precision. Checkpointing runs forward once more; with a frozen base, backward
    computes no gradients of weights (Hu et al. 2021, arXiv 2106.09685).
    """
    forward, backward = 1.0, 1.0 if "lora" in names else 2.0
    total = forward * (2 if "checkpointing" in names else 1) + backward
    return total / 3 / (half_rate if "bf16" in names else 1.0) * part(names)


def part(names: Sequence[str]) -> float:
    """How much of the length is left with these changes, from 0 to 1."""
    return next((_percent(name) / 100 for name in names if _percent(name)), 0.5 if "half-length" in names else 1.0)


def _bf16(job: Job) -> Job:
    if job.autocast is not None or all(parameter.element_size() <= 2 for parameter in job.model.parameters()):
        raise UsageError(f"the job computes in half precision {_ALREADY}")
    import torch

    return replace(job, autocast=torch.bfloat16)


def _fused(job: Job) -> Job:
    for optimizer in job.optimizers:
        if "fused" not in optimizer.defaults or optimizer.defaults["fused"]:
            raise UsageError(f"{type(optimizer).__name__} has no fused form, or is fused")
        for group in optimizer.param_groups:
            group["fused"], group["foreach"] = True, None
        optimizer.defaults["fused"] = True
    return job


def _eight_bit_optimizer(job: Job) -> Job:
    bitsandbytes = _bitsandbytes()
    for optimizer in job.optimizers:
        if type(optimizer).__name__ not in ("Adam", "AdamW") or not type(optimizer).__module__.startswith("torch."):
            raise UsageError("an 8-bit optimizer is tried in the place of torch's Adam and AdamW")
    made = []
    for optimizer in job.optimizers:
        groups = [{name: value for name, value in group.items() if name in ("params", *_OPTIONS)} for group in optimizer.param_groups]
        made.append(getattr(bitsandbytes.optim, f"{type(optimizer).__name__}8bit")(groups))
    return replace(job, optimizer=made if len(made) > 1 else made[0])


def _nf4(job: Job) -> Job:
    model: Any = job.model
    if not hasattr(model, "config") or not hasattr(model, "get_output_embeddings"):
        raise UsageError("4-bit weights are tried for models of Transformers")
    in_four_bits(model)
    return job


def in_four_bits(model: Any, dtype: torch.dtype | None = None) -> None:
    """Packs the weights of a model's linear layers into four bits (nf4, its scales packed too), in place, without quantising them. Its head stays as it is, and so
    do adapters that train.

    The layers are frozen, and are those of bitsandbytes; the weights have no values any more. dtype: what they compute in, and what a weight is unpacked
    to; None for the type of their input, and bfloat16. Raises `UsageError` without bitsandbytes.
    """
    import torch

    bitsandbytes = _bitsandbytes()
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    has_adapters = not all(parameter.requires_grad for parameter in model.parameters())  # then what trains stays as it is
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is not torch.nn.Linear or layer is head or (has_adapters and layer.weight.requires_grad):
                continue
            packed = bitsandbytes.nn.Linear4bit(
                layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=dtype, quant_type="nf4", device="meta"
            )
            packed.weight = bitsandbytes.nn.Params4bit(
                torch.empty(layer.weight.shape, dtype=dtype or torch.bfloat16), requires_grad=False, quant_type="nf4", module=packed
            )
            if layer.bias is not None:
                packed.bias = torch.nn.Parameter(layer.bias.data, requires_grad=False)
            setattr(module, name, packed)
    model.is_loaded_in_4bit = True


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError:
        raise UsageError("4 and 8 bits need bitsandbytes: pip install bitsandbytes") from None
    return bitsandbytes


def _checkpointing(job: Job) -> Job:
    model: Any = job.model
    if any(getattr(each, "gradient_checkpointing", False) is True for each in model.modules()):
        raise UsageError(f"blocks are checkpointed {_ALREADY}")
    if hasattr(model, "gradient_checkpointing_enable") and getattr(model, "supports_gradient_checkpointing", True):
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # the name until Transformers 5.2
        enable({"use_reentrant": False})
        return job
    blocks = repeated_blocks(model)
    if not blocks:
        raise UsageError("the model has no repeated blocks")
    for block in blocks:
        block.forward = _again(block.forward)
    return job


def _again(forward: Callable[..., Any]) -> Callable[..., Any]:
    import torch
    from torch.utils.checkpoint import checkpoint

    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs) if torch.is_grad_enabled() else forward(*args, **kwargs)

    return run


def repeated_blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The outermost blocks of one class that stand side by side in a `ModuleList` or `Sequential`."""
    import torch

    found: list[torch.nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if id(module) in inside or not isinstance(module, (torch.nn.ModuleList, torch.nn.Sequential)):
            continue
        children = list(module)
        kinds = {type(child) for child in children}
        if len(children) >= _FEWEST_BLOCKS and len(kinds) == 1 and any(True for _ in children[0].children()):
            found += children
            inside |= {id(each) for child in children for each in child.modules()}
    return found


def _lora(job: Job) -> Job:
    model: Any = job.model
    if not hasattr(model, "config") or not hasattr(model, "get_input_embeddings"):
        raise UsageError("LoRA is tried for models of Transformers")
    if any("lora_" in name for name, _ in model.named_parameters()):
        raise UsageError(f"the model has LoRA matrices {_ALREADY}")
    try:
        import peft
    except ImportError:
        raise UsageError("LoRA needs peft: pip install peft") from None
    if len(job.optimizers) != 1:
        raise UsageError("LoRA is tried with one optimizer")
    try:
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    except (ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"PEFT cannot adapt this model: {str(error)[:100]}") from None
    adapted.enable_input_require_grads()
    optimizer = job.optimizers[0]
    options = {name: value for name, value in optimizer.defaults.items() if name in (*_OPTIONS, "momentum", "fused", "foreach") and value is not None}
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    return replace(job, model=adapted.train(), optimizer=type(optimizer)(trained, **options))


def _at_length(job: Job, percent: int) -> Job:
    from autoaccum.data import batches

    batch = job.batch_of(2)
    lengths = {tensor.shape[1] for _, tensor in batches.tensors(batch) if tensor.dim() == 2 and not tensor.is_floating_point()}
    if len(lengths) != 1 or (length := lengths.pop()) < _SHORTEST:
        raise UsageError("the batch has no length: integers of one second dimension")
    kept = max(length * percent // 100, 1)
    shorter = batches.changed(batch, lambda tensor: tensor[:, :kept].clone() if tensor.dim() >= 2 and tensor.shape[1] == length else tensor)
    return replace(job, batch=shorter)


_CHANGES: dict[str, Callable[[Job], Job]] = {
    "bf16": _bf16, "fused": _fused, "8-bit-optimizer": _eight_bit_optimizer, "checkpointing": _checkpointing, "nf4": _nf4, "lora": _lora, "half-length": partial(_at_length, percent=50),
}  # fmt: skip
