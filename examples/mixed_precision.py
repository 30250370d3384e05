"""Half precision with a GradScaler, clipping and a scheduler: each acts once per window, not once per micro-batch."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import autoaccum

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
inputs = torch.randn(1000, 32)
labels = (inputs[:, :4].sum(dim=1) > 0).long()
loader = DataLoader(TensorDataset(inputs, labels), batch_size=50, shuffle=True)  # any size will do

model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 2)).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=24)
scaler = torch.amp.GradScaler(device)


def loss(model, batch):
    inputs, labels = batch
    return nn.functional.cross_entropy(model(inputs), labels)


job = autoaccum.Job(model, optimizer, loss, next(iter(loader)), scheduler=scheduler, scaler=scaler, autocast=torch.float16, max_grad_norm=1.0)
plan = autoaccum.tune(job, target_batch=127, max_micro_batch=40)
loop = autoaccum.Accumulator(job, plan)

print(plan)
for epoch in range(3):
    for window in plan.windows(loader):  # 127 samples each, the last one of an epoch 111
        result = loop.step(window)
        if result.skipped:
            print("an inf in a gradient: the window was skipped and the scale halved")
    print(f"epoch {epoch + 1}  loss {result.loss:.3f}  norm {result.grad_norm:.2f}  scale {scaler.get_scale():.0f}  lr {scheduler.get_last_lr()[0]:.5f}")
