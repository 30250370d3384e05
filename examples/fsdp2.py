"""FSDP2: tuned before the model is sharded, trained with parameters kept gathered over a window, so that ranks may run different numbers of micro-steps.

    torchrun --nproc-per-node 3 examples/fsdp2.py

Needs torch 2.11 or later.
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

import autoaccum

has_gpu = torch.cuda.is_available()
dist.init_process_group("nccl" if has_gpu else "gloo")
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if has_gpu else torch.device("cpu")
if has_gpu:
    torch.cuda.set_device(device)

torch.manual_seed(0)
texts = torch.randint(0, 64, (500, 17))
dataset = TensorDataset(texts)
layers = [nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True) for _ in range(2)]
model = nn.Sequential(nn.Embedding(64, 32), *layers, nn.Linear(32, 64)).to(device)


def loss(model, batch):
    (ids,) = batch
    return nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


plan = autoaccum.tune(model, torch.optim.AdamW(model.parameters()), loss, dataset[:8], target_batch=60, max_micro_batch=8, max_grad_norm=1.0)

mesh = init_device_mesh(device.type, (plan.world_size,))
for layer in layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)  # of the sharded parameters
loop = autoaccum.Accumulator(model, optimizer, plan, max_grad_norm=1.0)
loader = DataLoader(dataset, batch_sampler=plan.batch_sampler(dataset))

if plan.rank == 0:
    print(plan)
for epoch in range(2):
    results = [loop.step(window, loss) for window in plan.windows(loader)]
    if plan.rank == 0:
        print(f"epoch {epoch + 1}  loss {results[-1].loss:.4f}  norm {results[-1].grad_norm:.3f}  {len(results)} steps")
dist.barrier()  # a rank that leaves while others are still connected may be aborted by gloo
dist.destroy_process_group()
