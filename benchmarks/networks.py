"""Two networks whose memory on a CPU is real: a conv net with BatchNorm and a transformer with dropout, both with Adam."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn
from work import Samples


class ConvNet(nn.Module):
    """Much memory for little arithmetic, so that a run is short."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.body = nn.Sequential(*(part for a, b in pairwise((3, width, width)) for part in (nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU())))
        self.head = nn.Linear(width, 10)

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.head(self.body(inputs).mean((2, 3))), targets)


class Transformer(nn.Module):
    def __init__(self, width: int = 32, length: int = 64, words: int = 512) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Parameter(torch.zeros(length, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.1, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, words)

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.head(self.body(self.words(inputs) + self.places)).flatten(0, 1), targets.flatten())


def images(n: int, side: int = 32) -> dict[str, torch.Tensor]:
    """n of 3 x side x side, and their classes."""
    return {"inputs": torch.full((n, 3, side, side), 0.1), "targets": torch.arange(n) % 10}


def texts(n: int, length: int = 64) -> dict[str, torch.Tensor]:
    """n of so many tokens, and the next tokens."""
    tokens = torch.arange(n * (length + 1)).view(n, length + 1) % 512
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}


NETWORKS = {"conv net": (ConvNet, Samples(4096, images)), "transformer": (Transformer, Samples(4096, texts))}
# For a card, under a limit of some GiB.
LARGER = {
    "conv net": (lambda: ConvNet(128), Samples(8192, lambda n: images(n, 128))),
    "transformer": (lambda: Transformer(512, 512, 8192), Samples(8192, lambda n: texts(n, 512))),
}
