"""A real out-of-memory in mid-training: a longer batch than was measured comes along, and the window is run again, smaller.

On a CPU, under a limit that the operating system enforces.
"""

import logging

import torch
from torch import nn

import autoaccum

logging.basicConfig(format="%(message)s")
torch.manual_seed(0)


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.hidden, self.out = nn.Embedding(100, 128), nn.Linear(128, 512), nn.Linear(512, 10)

    def forward(self, tokens):
        return self.out(nn.functional.gelu(self.hidden(self.embed(tokens))))


def loss(model, batch):
    tokens, tags = batch
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), tags.flatten())


def batch(samples, length):
    return torch.randint(0, 100, (samples, length)), torch.randint(0, 10, (samples, length))


model = Tagger()
optimizer = torch.optim.AdamW(model.parameters())
limit = autoaccum.devices.get("cpu").memory().ours_bytes + 70 * 2**20
plan = autoaccum.tune(model, optimizer, loss, batch(60, 128), target_batch=120, memory_limit=limit)
print(plan)

loop = autoaccum.Accumulator(model, optimizer, plan)
with autoaccum.devices.get("cpu").capped(limit):
    for step, length in enumerate([128, 128, 256, 256, 128], start=1):
        result = loop.step(batch(120, length), loss)
        print(f"step {step}: length {length}, {result.micro_batches} micro-batches, loss {result.loss:.3f}{'  <- rescued' if result.rescued else ''}")
