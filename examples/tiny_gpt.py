"""A decoder-only transformer, written out plainly. Try:

autoaccum tune examples/tiny_gpt.py:make_job --target-batch 120 --memory-limit 640MiB --device cpu
"""

import torch
from torch import nn
from torch.nn import functional as F

import autoaccum


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        samples, length, width = hidden.shape
        parts = self.qkv(self.norm_attention(hidden)).view(samples, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.projection(mixed.transpose(1, 2).reshape(samples, length, width))
        return hidden + self.mlp(self.norm_mlp(hidden))


class TinyGPT(nn.Module):
    def __init__(self, vocabulary: int, width: int, layers: int, heads: int, length: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight  # tied

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.norm(self.blocks(hidden)))


def loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Every sample has as many labels as the next, so the mean over tokens is the mean over samples."""
    logits = model(ids[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def make_job(width: int = 128, layers: int = 4, heads: int = 4, length: int = 128, vocabulary: int = 256, samples: int = 360) -> autoaccum.Job:
    torch.manual_seed(0)
    model = TinyGPT(vocabulary, width, layers, heads, length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    text = torch.randint(0, vocabulary, (samples, length + 1))
    return autoaccum.Job(model, optimizer, loss, text[:8], data=text)


if __name__ == "__main__":
    job = make_job()
    plan = autoaccum.tune(job, target_batch=120, memory_limit="640MiB")
    print(plan.explain())
    loop = autoaccum.Accumulator(job, plan)
    for window in torch.utils.data.DataLoader(job.data, batch_size=120):
        print(loop.step(window))
