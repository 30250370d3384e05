"""An ordinary training script, with two added lines: the plan, and the loop that follows it."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import autoaccum

torch.manual_seed(0)
inputs = torch.randn(1200, 8)
targets = inputs.sum(dim=1, keepdim=True)
loader = DataLoader(TensorDataset(inputs, targets), batch_size=120, shuffle=True)

model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)


def loss(model, batch):
    inputs, targets = batch
    return nn.functional.mse_loss(model(inputs), targets)


plan = autoaccum.tune(model, optimizer, loss, next(iter(loader)), target_batch=120, max_micro_batch=40)
loop = autoaccum.Accumulator(model, optimizer, plan)

print(plan)
for epoch in range(4):
    losses = [loop.step(batch, loss).loss for batch in loader]
    print(f"epoch {epoch + 1}  loss {sum(losses) / len(losses):.4f}")
