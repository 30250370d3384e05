"""A DistributedDataParallel script with three added lines; every rank carries what its own GPU holds.

torchrun --nproc-per-node 3 examples/ddp.py
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import autoaccum

has_gpu = torch.cuda.is_available()
dist.init_process_group("nccl" if has_gpu else "gloo")
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if has_gpu else torch.device("cpu")
if has_gpu:
    torch.cuda.set_device(device)

torch.manual_seed(0)
inputs = torch.randn(1300, 8)
dataset = TensorDataset(inputs, inputs.sum(dim=1, keepdim=True))
model = DistributedDataParallel(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1)).to(device))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)


def loss(model, batch):
    inputs, targets = batch
    return nn.functional.mse_loss(model(inputs), targets)


plan = autoaccum.tune(model, optimizer, loss, dataset[:8], target_batch=120, max_micro_batch=20)
loop = autoaccum.Accumulator(model, optimizer, plan)
loader = DataLoader(dataset, batch_sampler=plan.batch_sampler(dataset))

if plan.rank == 0:
    print(plan)
for epoch in range(3):
    results = [loop.step(window, loss) for window in plan.windows(loader)]
    if plan.rank == 0:
        samples = sum(result.samples for result in results)
        print(f"epoch {epoch + 1}  loss {results[-1].loss:.4f}  {len(results)} steps, {samples} samples")
dist.barrier()  # a rank that leaves while others are still connected may be aborted by gloo
dist.destroy_process_group()
