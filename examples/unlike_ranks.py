"""Three unlike ranks on one machine: each has a memory limit and a speed of its own, and carries what it can.

    torchrun --nproc-per-node 3 examples/unlike_ranks.py

The limits are enforced by the operating system; the speeds are emulated by sleeping.
"""

import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import autoaccum

MIB = 2**20
dist.init_process_group("gloo")
rank = dist.get_rank()
spare = [120 * MIB, 60 * MIB, 40 * MIB][rank % 3]  # memory for the training, beyond what the process holds already
seconds_per_sample = [0.5e-3, 1e-3, 3e-3][rank % 3]

torch.manual_seed(0)  # the same weights and data on every rank
inputs = torch.randn(1300, 64, 16)
dataset = TensorDataset(inputs, inputs.mean(dim=(1, 2)))
model = nn.Sequential(nn.Linear(16, 256), nn.GELU(), nn.Linear(256, 16), nn.Flatten(), nn.Linear(1024, 1))
optimizer = torch.optim.AdamW(model.parameters())


def loss(model, batch):
    inputs, targets = batch
    time.sleep(seconds_per_sample * len(inputs))
    return nn.functional.mse_loss(model(inputs).flatten(), targets)


cpu = autoaccum.devices.get("cpu")
limit = cpu.memory().ours_bytes + spare
plan = autoaccum.tune(model, optimizer, loss, dataset[:8], target_batch=120, memory_limit=limit, headroom="8MiB")
loop = autoaccum.Accumulator(DistributedDataParallel(model), optimizer, plan)
loader = DataLoader(dataset, batch_sampler=plan.batch_sampler(dataset))  # reads this rank's samples alone
if rank == 0:
    print(plan.explain())

with cpu.capped(limit):
    for epoch in range(2):
        started = time.perf_counter()
        results = [loop.step(window, loss) for window in plan.windows(loader)]
        took = time.perf_counter() - started
        if rank == 0:
            print(f"epoch {epoch + 1}  loss {results[-1].loss:.4f}  {len(results)} windows, {took / len(results) * 1000:.0f} ms each")
dist.barrier()  # a rank that leaves while others are still connected may be aborted by gloo
dist.destroy_process_group()
