"""Sequences of many lengths: the mean over all label tokens of the window, whatever falls into which micro-batch."""

import torch
from torch import nn
from torch.utils.data import DataLoader

import autoaccum

torch.manual_seed(0)
texts = [torch.randint(1, 50, (int(length),)) for length in torch.randint(5, 60, (360,))]


def collate(texts):
    """Each batch is padded to its own longest text; padding has the label -100."""
    pad = nn.utils.rnn.pad_sequence
    return {"input_ids": pad(texts, batch_first=True), "labels": pad(texts, batch_first=True, padding_value=-100)}


class Bigram(nn.Module):
    """Like a causal language model of Transformers: takes **batch, returns `.loss`, a mean over labels."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(50, 32), nn.Linear(32, 50)

    def forward(self, input_ids, labels):
        logits = self.out(self.embed(input_ids))[:, :-1]
        self.loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        return self


def loss(model, batch):
    return autoaccum.token_mean(model, batch, shifted=True)  # (sum over labels, how many); known by itself for Transformers


model = Bigram()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
few, worst = sorted(texts[:8], key=len), sorted(texts, key=len)[-40:]
print("model.loss:", autoaccum.equivalence(model, optimizer, lambda model, batch: model(**batch).loss, collate(few)))
print("token_mean:", autoaccum.equivalence(model, optimizer, loss, collate(few)))

plan = autoaccum.tune(model, optimizer, loss, collate(worst), target_batch=120, max_micro_batch=40)
loop = autoaccum.Accumulator(model, optimizer, plan)
loader = DataLoader(texts, batch_sampler=plan.batch_sampler(texts, seed=1), collate_fn=collate)
print(plan)
for epoch in range(3):
    for window in plan.windows(loader):
        result = loop.step(window, loss)
    print(f"epoch {epoch + 1}  loss {result.loss:.3f}  over {result.count:.0f} label tokens in {result.micro_batches} micro-batches")
