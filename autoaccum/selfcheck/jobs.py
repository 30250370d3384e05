"""The jobs of the self-check: a multilayer perceptron, a conv net and a decoder, each with the same numbers on every machine."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import nn

from autoaccum.window import Job


class _Decoder(nn.Module):
    def __init__(self, words: int, width: int, layers: int, length: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Parameter(torch.zeros(length, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, words)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.words(ids) + self.places
        scores: torch.Tensor = self.head(self.body(hidden, mask=self.mask, is_causal=True))
        return scores.transpose(1, 2)


def _classes(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def mlp(tiny: bool = False) -> Job:
    """Four linear layers. Its peak is the optimizer's, whatever the micro-batch."""
    torch.manual_seed(0)
    width = 64 if tiny else 4096
    model = nn.Sequential(*(part for _ in range(3) for part in (nn.Linear(width, width), nn.GELU())), nn.Linear(width, 10))
    return Job(model, torch.optim.AdamW(model.parameters(), lr=1e-4), _classes, (torch.randn(8, width), torch.arange(8) % 10))


def conv(tiny: bool = False) -> Job:
    """Convolutions with BatchNorm, whose workspaces a library chooses."""
    torch.manual_seed(0)
    width, side = (8, 16) if tiny else (64, 112)
    layers = [part for a, b in pairwise((3, width, width, 2 * width)) for part in (nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))
    return Job(model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), _classes, (torch.randn(8, 3, side, side), torch.arange(8) % 10))


def decoder(tiny: bool = False) -> Job:
    """A language model in bfloat16."""
    torch.manual_seed(0)
    words, width, layers, length = (64, 32, 1, 16) if tiny else (8192, 512, 6, 512)
    model = _Decoder(words, width, layers, length)
    ids = torch.randint(0, words, (8, length + 1))
    return Job(model, torch.optim.AdamW(model.parameters(), lr=1e-4), _classes, (ids[:, :-1], ids[:, 1:]), autocast=torch.bfloat16)


MAKERS: dict[str, Callable[[bool], Job]] = {"mlp": mlp, "conv": conv, "decoder": decoder}
