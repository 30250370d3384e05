"""Window times of real DDP over three ranks whose emulated speeds are 6 : 3 : 1: shares as planned against an even split.

    python benchmarks/ranks.py [--output benchmarks/results/ranks.json]

Starts its three ranks itself, on gloo. A rank's speed is a sleep for every sample in the loss; all else is real: `tune` measures and
plans, the loop carries gradients across. Both splits run in the same processes, in turns. A rank's wait is the time from the end of its own
last backward to that of the slowest rank, on one clock. The ideal is (1/3 x 120) / (0.6 x 120 / 6) = 0.30 of the even split's time.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

WORLD, TARGET = 3, 120
SECONDS_PER_SAMPLE = (1e-3, 2e-3, 6e-3)


def rank_main(rounds: int, answer: Path) -> None:
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    import autoaccum

    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    torch.set_num_threads(1)
    rank = dist.get_rank()
    torch.manual_seed(0)
    batch = torch.randn(TARGET, 64)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
    optimizer = torch.optim.AdamW(model.parameters())
    ended = 0.0

    def loss(model, batch):
        time.sleep(SECONDS_PER_SAMPLE[rank] * len(batch))
        return (model(batch) - batch).square().mean()

    def note(gradient):
        nonlocal ended
        ended = time.perf_counter()  # of one clock for all processes of a Linux machine

    plans = {
        "even": autoaccum.tune(model, optimizer, loss, batch[:8], target_batch=TARGET, max_micro_batch=20, equal=True),
        "planned": autoaccum.tune(model, optimizer, loss, batch[:8], target_batch=TARGET, max_micro_batch=20),
    }
    next(model.parameters()).register_hook(note)  # the last gradient that a backward makes
    parallel = DistributedDataParallel(model)
    loops = {name: autoaccum.Accumulator(parallel, optimizer, plan) for name, plan in plans.items()}
    took: dict[str, list[float]] = {name: [] for name in plans}
    waits: dict[str, list[list[float]]] = {name: [] for name in plans}
    for at in range(rounds + 5):
        for name, plan in plans.items():
            started = time.perf_counter()
            loops[name].step(batch[: plan.share], loss)
            seconds = time.perf_counter() - started
            ends = [None] * WORLD
            dist.all_gather_object(ends, ended)
            if at >= 5:  # the first windows are voted on
                took[name].append(seconds)
                waits[name].append([max(ends) - each for each in ends])
    if rank == 0:
        found = {}
        for name, plan in plans.items():
            window = statistics.median(took[name])
            wait = [statistics.median(each) for each in zip(*waits[name])]
            found[name] = {
                "shares": list(plan.shares),
                "micro_batches": [list(plan.of_rank(each).micro_batches) for each in range(WORLD)],
                "predicted_seconds": plan.fleet.seconds(),
                "window_seconds": window,
                "window_seconds_p90": statistics.quantiles(took[name], n=10)[-1],
                "wait_seconds": wait,
                "largest_wait_share": max(wait) / window,
                "windows": len(took[name]),
            }
        answer.write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.answer is not None:
        rank_main(asked.rounds, asked.answer)
        return
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        own = [str(Path(__file__).resolve()), "--rounds", str(asked.rounds), "--answer", str(answer)]
        subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD), *own], check=True)
        found = json.loads(answer.read_text())
    document = {
        "versions": {name: importlib.metadata.version(name) for name in ("autoaccum", "torch")},
        "machine": {"python": platform.python_version(), "cores": os.cpu_count(), "threads": 1},
        "seconds_per_sample": SECONDS_PER_SAMPLE,
        "target_batch": TARGET,
        **found,
        "planned_over_even": found["planned"]["window_seconds"] / found["even"]["window_seconds"],
    }
    text = json.dumps(document, indent=2)
    print(text)
    if asked.output:
        asked.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
