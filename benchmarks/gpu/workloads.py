"""The jobs on which the virtual GPU meets a real one: twelve networks, of which six were set aside before anything was measured.

Needs torchvision and transformers for the networks that are theirs. Weights come from configurations, never from files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import autoaccum

# By name: micro-batches, from a few hundred MiB to some 16 GiB.
LEARNT = {
    "mlp": (64, 1024, 8192, 32768),
    "resnet50": (8, 32, 64, 128),
    "vgg16": (8, 16, 32, 64),
    "mobilenet_v3_large": (16, 64, 128, 256),
    "gpt2": (1, 2, 4, 8),
    "vit_b_16": (8, 32, 64, 128),
}
JUDGED = {
    "efficientnet_b0": (16, 32, 64, 128),
    "convnext_tiny": (8, 32, 64, 96),
    "unet": (2, 4, 8, 16),
    "bert": (2, 8, 16, 32),
    "t5_small": (4, 8, 16, 32),
    "llama": (1, 2, 4, 8),
}
BATCHES = LEARNT | JUDGED
IMAGES = ("resnet50", "vgg16", "mobilenet_v3_large", "efficientnet_b0", "convnext_tiny", "unet")
ATTENTION = ("flash", "efficient", "math")  # the only kernel allowed
WAYS = tuple(f"{optimizer}-{dtype}" for optimizer in ("sgd", "adam", "fused") for dtype in ("fp32", "bf16"))


def cases(networks: dict[str, tuple[int, ...]]) -> list[tuple[str, str, int]]:
    """(network, way, micro-batch) of every comparison: all ways at all sizes, and at one size what some jobs do beside."""
    found = [(name, way, batch) for name, batches in networks.items() for batch in batches for way in WAYS]
    for name, batches in networks.items():
        more = ["adam-fp16", "adam-bf16+clipped"]
        if name in IMAGES:
            more += ["sgd-fp32+benchmark", "adam-bf16+channels_last", "adam-bf16+channels_last+benchmark"]
        if name in ("gpt2", "vit_b_16", "bert", "t5_small", "llama"):
            more += ["adam-bf16+checkpointed", "adam-fp32+checkpointed", *(f"adam-bf16+{kernel}" for kernel in ATTENTION)]
        found += [(name, way, batches[1]) for way in more]
    return found


def job(name: str, way: str) -> autoaccum.Job:
    """A network trained in one way: `"adam-bf16+checkpointed"`. On the CPU; `+benchmark` and `+flash` set switches of the process."""
    kind, *more = way.split("+")
    optimizer, dtype = kind.split("-")
    net, batch, loss = _MADE[name]()
    net.train()
    if "channels_last" in more:
        net = net.to(memory_format=torch.channels_last)
        batch = (batch[0].to(memory_format=torch.channels_last), *batch[1:])
    if "checkpointed" in more:
        _checkpoint(net)
    torch.backends.cudnn.benchmark = "benchmark" in more
    alone = next((each for each in more if each in ATTENTION), None)
    for kernel in ("cudnn", "flash", "mem_efficient"):
        getattr(torch.backends.cuda, f"enable_{kernel}_sdp")(alone is None or kernel.endswith(alone))
    parameters = net.parameters()
    made: torch.optim.Optimizer = (
        torch.optim.SGD(parameters, lr=1e-3, momentum=0.9) if optimizer == "sgd" else torch.optim.AdamW(parameters, lr=1e-4, fused=optimizer == "fused" or None)
    )
    return autoaccum.Job(
        net, made, loss, batch, autocast={"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype), max_grad_norm=1.0 if "clipped" in more else None,
        scaler=torch.amp.GradScaler("cuda") if dtype == "fp16" else None,
    )  # fmt: skip


def _checkpoint(net: nn.Module) -> None:
    if hasattr(net, "gradient_checkpointing_enable"):
        net.gradient_checkpointing_enable({"use_reentrant": False})
        return
    from torch.utils.checkpoint import checkpoint

    def again(forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given: checkpoint(forward, *given, use_reentrant=False)

    for layer in net.encoder.layers:  # torchvision's vision transformers
        layer.forward = again(layer.forward)


def _classes(model: Any, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _images(size: int = 224) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(2, 3, size, size), torch.zeros(2, dtype=torch.long)


def _vision(name: str) -> Callable[[], Any]:
    def make() -> Any:
        import torchvision

        return getattr(torchvision.models, name)(), _images(), _classes

    return make


def _mlp() -> Any:
    net = nn.Sequential(nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 1000))
    return net, (torch.zeros(2, 1024), torch.zeros(2, dtype=torch.long)), _classes


class UNet(nn.Module):
    """Down and up four times, 64 to 1024 channels, a class for every pixel."""

    def __init__(self, width: int = 64, depth: int = 4, classes: int = 21) -> None:
        super().__init__()
        widths = [width << level for level in range(depth + 1)]
        self.down = nn.ModuleList(_twice(3 if not level else widths[level - 1], each) for level, each in enumerate(widths))
        self.grow = nn.ModuleList(nn.ConvTranspose2d(2 * each, each, 2, 2) for each in reversed(widths[:-1]))
        self.up = nn.ModuleList(_twice(2 * each, each) for each in reversed(widths[:-1]))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = []
        for level, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if level else x)
            kept.append(x)
        kept.pop()
        for grow, block in zip(self.grow, self.up):
            x = block(torch.cat([kept.pop(), grow(x)], 1))
        return self.head(x)  # type: ignore[no-any-return]


def _twice(inputs: int, outputs: int) -> nn.Sequential:
    parts: list[nn.Module] = []
    for each in (inputs, outputs):
        parts += [nn.Conv2d(each, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*parts)


def _unet() -> Any:
    return UNet(), (torch.zeros(2, 3, 256, 256), torch.zeros(2, 256, 256, dtype=torch.long)), _classes


def _words(make: Callable[[Any], Any], length: int, **more: int) -> Callable[[], Any]:
    def made() -> Any:
        import transformers

        batch = {"input_ids": torch.zeros(2, length, dtype=torch.long)}
        batch["labels"] = torch.zeros(2, more.get("labels", length), dtype=torch.long)
        return make(transformers), batch, lambda model, batch: model(**batch).loss

    return made


_LLAMA = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 32000}
_MADE: dict[str, Callable[[], Any]] = {
    **{name: _vision(name) for name in ("resnet50", "vgg16", "mobilenet_v3_large", "efficientnet_b0", "convnext_tiny", "vit_b_16")},
    "mlp": _mlp,
    "unet": _unet,
    "gpt2": _words(lambda t: t.GPT2LMHeadModel(t.GPT2Config()), 1024),
    "bert": _words(lambda t: t.BertForMaskedLM(t.BertConfig()), 512),
    "t5_small": _words(lambda t: t.T5ForConditionalGeneration(t.T5Config(decoder_start_token_id=0)), 512, labels=128),
    "llama": _words(lambda t: t.LlamaForCausalLM(t.LlamaConfig(**_LLAMA)), 1024),
}
