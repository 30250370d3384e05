"""A job from a configuration file of Transformers alone: `hf:path/to/config.json`. It needs no weights and no file of the user's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from autoaccum.errors import UsageError
from autoaccum.integrations import needed
from autoaccum.tuner import in_four_bits
from autoaccum.window import Job, token_mean

_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}
_OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD, "adafactor": torch.optim.Adafactor}
_OF_BITSANDBYTES = {"adamw8bit": "AdamW8bit", "paged_adamw8bit": "PagedAdamW8bit"}
_LORA = {"r": "16", "alpha": "", "targets": "all-linear", "dropout": "0"}


def make_job(
    config: str,
    length: int | None = None,
    lora: str | None = None,
    precision: str = "bf16",
    checkpointing: bool = False,
    optimizer: str = "adamw",
    attention: str = "sdpa",
    quantize: str = "",
) -> Job:
    """A causal language model of this configuration, as it is usually fine-tuned.

    config: `config.json`, or its folder. length: tokens of a sample; by default 1024, or less where the model has fewer positions.
    lora: such as `"r=16"`, or `"r=8,alpha=16,targets=q_proj+v_proj,dropout=0.1"`: the base is frozen, in the precision's type. Without it all
    parameters are trained, in fp32.
    precision: the type of autocast, bf16 or fp16, or fp32 for none. checkpointing: each block's activations are computed again in backward.
    optimizer: adamw, adam, sgd, adafactor, or with bitsandbytes adamw8bit and paged_adamw8bit. attention: sdpa or eager.
    quantize: nf4 packs the frozen base into four bits (QLoRA); it needs bitsandbytes and `lora`.
    Raises `UsageError` for a file that is no configuration of a causal language model, and for other values.
    """
    transformers = needed("transformers", "huggingface")
    if precision not in _PRECISIONS:
        raise UsageError(f"precision must be one of {', '.join(_PRECISIONS)}, not {precision!r}")
    if optimizer not in (*_OPTIMIZERS, *_OF_BITSANDBYTES):
        raise UsageError(f"optimizer must be one of {', '.join((*_OPTIMIZERS, *_OF_BITSANDBYTES))}, not {optimizer!r}")
    if quantize not in ("", "nf4"):
        raise UsageError(f"quantize must be nf4, or left out, not {quantize!r}")
    if quantize and lora is None:
        raise UsageError("quantize=nf4 packs a base that is frozen: give --lora, such as --lora r=16, too")
    known = _configuration(transformers, config)
    positions = getattr(known, "max_position_embeddings", None) or 2**31
    tokens = min(1024, positions) if length is None else length
    if isinstance(tokens, bool) or not isinstance(tokens, int) or not 2 <= tokens <= positions:
        raise UsageError(f"length must be a number of tokens from 2 to the model's {positions} positions, not {tokens!r}")
    known.use_cache = False
    dtype = _PRECISIONS[precision]
    held = dtype if lora is not None and dtype is not None else torch.float32
    setattr(known, "dtype" if hasattr(known, "dtype") else "torch_dtype", held)  # a file may name the type that its weights were saved in
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(held)
        model = transformers.AutoModelForCausalLM.from_config(known, attn_implementation=attention)
    except ValueError as error:
        raise UsageError(f"{config} is no configuration of a causal language model: {str(error).splitlines()[0][:160]}") from None
    finally:
        torch.set_default_dtype(before)
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # the name until Transformers 5.2
        enable({"use_reentrant": False})
    if quantize:
        needed("bitsandbytes", "bitsandbytes")
        in_four_bits(model, dtype)
        for parameter in model.parameters():  # as PEFT's prepare_model_for_kbit_training does
            if parameter.is_floating_point() and not hasattr(parameter, "quant_state"):
                parameter.data = parameter.data.float()
    if lora is not None:
        model = _with_lora(model, lora)
    model.train()
    ids = torch.zeros(2, tokens, dtype=torch.long)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kind = _OPTIMIZERS.get(optimizer) or getattr(needed("bitsandbytes", "bitsandbytes").optim, _OF_BITSANDBYTES[optimizer])
    return Job(model, kind(trained, lr=1e-4), token_mean, {"input_ids": ids, "labels": ids.clone()}, autocast=dtype)


def _configuration(transformers: Any, place: str) -> Any:
    path = Path(place)
    try:
        return transformers.AutoConfig.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{place} is no configuration of Transformers: {str(error).splitlines()[0][:160]}") from None


def _with_lora(model: Any, text: str) -> Any:
    """The model with LoRA matrices in fp32. Raises `UsageError` for settings that are none."""
    peft = needed("peft", "peft")
    settings = dict(_LORA)
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if name not in settings or not equals or not value:
            raise UsageError(f"--lora takes {', '.join(f'{each}=' for each in settings)} with commas between, not {part!r}")
        settings[name] = value
    try:
        rank = int(settings["r"])
        alpha, dropout = int(settings["alpha"] or 2 * rank), float(settings["dropout"])
    except ValueError:
        raise UsageError(f"--lora {text!r}: r and alpha are whole numbers, dropout is a number") from None
    if rank < 1 or not 0 <= dropout < 1:
        raise UsageError(f"--lora {text!r}: r is at least 1, and dropout from 0 to below 1")
    targets = settings["targets"] if settings["targets"] == "all-linear" else settings["targets"].split("+")
    try:
        model = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM"))
    except ValueError as error:
        raise UsageError(f"--lora {text!r}: {str(error).splitlines()[0][:160]}") from None
    model.enable_input_require_grads()
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype is not torch.float32:
            parameter.data = parameter.data.float()
    return model
