"""A loop of your own: `plan.split` cuts and weighs, the rest stays as it was."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import autoaccum

torch.manual_seed(0)
inputs = torch.randn(1000, 8)
targets = inputs.sum(dim=1, keepdim=True)
loader = DataLoader(TensorDataset(inputs, targets), batch_size=32, shuffle=True)

model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.02)


def loss(model, batch):
    inputs, targets = batch
    return nn.functional.mse_loss(model(inputs), targets)


plan = autoaccum.tune(model, optimizer, loss, next(iter(loader)), target_batch=127, max_micro_batch=40)
print(plan)
for epoch in range(4):
    for window in plan.windows(loader):
        total = torch.zeros(())
        for micro in plan.split(window):  # micro.batch, micro.weight, micro.samples, micro.last
            part = loss(model, micro.batch) * micro.weight
            part.backward()
            total += part.detach()
        optimizer.step()
        optimizer.zero_grad()
    print(f"epoch {epoch + 1}  loss {total:.4f}")
