"""An ordinary training script that knows nothing of autoaccum. Tuned from outside by

autoaccum tune -b 120 --memory-limit 600MiB -- python examples/unmodified_script.py --batch-size {micro_batch} --accum {accumulation_steps}
"""

import argparse

import torch
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--accum", type=int, default=1)
parser.add_argument("--max-steps", type=int, default=2)
parser.add_argument("--width", type=int, default=8192)
parser.add_argument("--layers", type=int, default=32)
options = parser.parse_args()

torch.manual_seed(0)
layers = [part for _ in range(options.layers) for part in (nn.Linear(8, options.width), nn.Tanh(), nn.Linear(options.width, 8))]
model = nn.Sequential(*layers, nn.Linear(8, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

for step in range(options.max_steps):
    total = 0.0
    for _ in range(options.accum):
        inputs = torch.randn(options.batch_size, 8)
        loss = (model(inputs) - inputs.sum(dim=1, keepdim=True)).square().mean() / options.accum
        loss.backward()
        total += loss.item()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1}  loss {total:.4f}")
