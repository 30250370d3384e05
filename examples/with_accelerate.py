"""An Accelerate loop at an effective batch of 50, whatever fits: `pip install 'autoaccum[accelerate]'`.

python examples/with_accelerate.py
torchrun --nproc_per_node 2 examples/with_accelerate.py
"""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

from autoaccum.integrations.accelerate import micro_batches, tune

torch.set_num_threads(1)
torch.manual_seed(0)
inputs = torch.randn(220, 8)
dataset = TensorDataset(inputs, inputs.sum(1, keepdim=True))
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))


def loss(model, batch):
    inputs, targets = batch
    return torch.nn.functional.mse_loss(model(inputs), targets)


accelerator = Accelerator(cpu=True)
model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
plan = tune(accelerator, model, optimizer, loss, dataset[:8], target_batch=50, max_micro_batch=16)
accelerator.print(plan)

loader = DataLoader(dataset, batch_sampler=plan.batch_sampler(dataset))  # not prepared: every rank reads its own part
for epoch in range(3):
    steps = 0
    for micro in micro_batches(accelerator, plan, loader):
        with accelerator.accumulate(model):
            accelerator.backward(loss(model, micro.batch) * micro.weight)
            optimizer.step()
            optimizer.zero_grad()
        steps += accelerator.sync_gradients
    accelerator.print(f"epoch {epoch + 1}: {steps} optimizer steps, loss of all {loss(model, dataset[:]).item():.4f}")
accelerator.wait_for_everyone()  # a rank that leaves while others are still connected may be aborted by gloo
accelerator.end_training()
