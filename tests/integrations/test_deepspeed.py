"""DeepSpeed takes the three numbers, and its step is that of the whole batch. In a process of its own: it changes much when imported."""

import json
import os
import socket
import subprocess
import sys

from tests.command_line import ROOT

PROGRAM = """
import json, sys
import deepspeed, torch
import autoaccum
from tests import jobs
from tests.tuner.test_in_place import limit_for

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled first, for half a minute
deepspeed.init_distributed("gloo", verbose=False)

def net():
    torch.manual_seed(0)
    return torch.nn.Linear(8, 1)

model = net()
pairs = tuple(each for each in jobs.pairs(480))
allowed = limit_for(100)
plan = autoaccum.tune(model, torch.optim.SGD(model.parameters(), lr=0.1), jobs.mse, pairs, target_batch=24, max_micro_batch=9, equal=True, memory_limit=allowed)
config = {**plan.to_deepspeed(), "zero_optimization": {"stage": 0}, "gradient_clipping": 0.0}  # it clips to 1 by default
engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), config=config)
whole, seen = net(), 0
optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
from autoaccum.devices.cpu import Cpu
device = Cpu()
device.prepare()
apart = []
with device.capped(allowed):
    for window in plan.windows(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*pairs), batch_size=24)):
        for micro in plan.split(window):
            engine.backward(jobs.mse(engine, micro.batch))
            engine.step()
            seen += micro.samples
        optimizer.zero_grad()
        jobs.mse(whole, window.parts[0]).backward()
        optimizer.step()
        apart.append(max((ours - theirs).abs().max().item() for ours, theirs in zip(engine.module.parameters(), whole.parameters())))
triple = [engine.train_batch_size(), engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()]
print("told:" + json.dumps({"triple": triple, "steps": engine.global_steps, "seen": seen, "apart": max(apart)}), flush=True)
import os
os._exit(0)  # its threads may wait for each other at the end
"""


def test_twenty_steps_of_deepspeed_under_the_limit_are_those_of_the_whole_batch():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    one = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **one}, timeout=200, check=False)
    told = [line for line in done.stdout.splitlines() if line.startswith("told:")]
    assert told, done.stderr[-3000:]
    found = json.loads(told[0].removeprefix("told:"))
    assert found["triple"] == [24, 8, 3] and found["steps"] == 20 and found["seen"] == 480
    assert found["apart"] < 1e-6  # it knows no double precision
