"""A job that outlives its machines: workers come and go, and every window of samples is trained once, on whatever ranks are there.

export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
torchrun --standalone --nproc-per-node 3 --max-restarts 10 examples/elastic.py run.pt
or on one to four machines: torchrun --nnodes 1:4 --max-restarts 100 --rdzv-backend c10d --rdzv-endpoint HOST:29400 examples/elastic.py run.pt

run.pt is the checkpoint, in a folder that all machines see. Without the variable, workers that were started again look for each other at the addresses
of the life before and hang (https://github.com/pytorch/pytorch/issues/135712).
"""

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import autoaccum

EPOCHS = 3
checkpoint = Path(sys.argv[1])
has_gpu = torch.cuda.is_available()
dist.init_process_group("nccl" if has_gpu else "gloo")
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if has_gpu else torch.device("cpu")
if has_gpu:
    torch.cuda.set_device(device)

torch.manual_seed(0)
inputs = torch.randn(1500, 8, dtype=torch.float64)
dataset = TensorDataset(inputs, inputs.sum(dim=1, keepdim=True))
net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)).double().to(device)
model = DistributedDataParallel(net) if dist.get_world_size() > 1 else net
optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
loop = autoaccum.Accumulator(model, optimizer, target_batch=120, rank_timeout_s=60)  # learns what each rank holds while it trains
loop.stop_at_window_end(signal.SIGTERM)  # what a cluster sends before it takes a machine away

if checkpoint.exists():
    state = torch.load(checkpoint, weights_only=True, map_location=device)
    net.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    loop.load_state_dict(state["loop"])


def save():
    """All or nothing: a worker may be killed here, too."""
    if dist.get_rank() == 0:
        torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict(), "loop": loop.state_dict()}, f"{checkpoint}.new")
        os.replace(f"{checkpoint}.new", checkpoint)


def loss(model, batch):
    inputs, targets = batch
    return nn.functional.mse_loss(model(inputs), targets)


loader = DataLoader(dataset, batch_size=50)  # plain: the same order for every rank and in every life; windows take what they need
for _ in range(loop.epoch, EPOCHS):
    for window in loop.windows(loader):
        loop.step(window, loss)
        save()
    if loop.is_stopping:
        break
if dist.get_rank() == 0:
    print(f"{'stopped' if loop.is_stopping else 'done'} after {loop.state_dict()['windows']} windows on {dist.get_world_size()} ranks")
dist.barrier()
dist.destroy_process_group()
