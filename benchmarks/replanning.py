"""A rank that slows down to a third in mid-run: the loop's windows afterwards beside those of the best plan that knows it from the start.

    python benchmarks/replanning.py [--output benchmarks/results/replanning.json]

Starts its three ranks itself, real DDP on gloo. A rank's speed is a sleep for every sample in the loss, 6 : 3 : 1 at first; after window 30 of 110 the
quickest rank has a third of its speed. The loop has no plan and is told nothing. Afterwards `tune` measures the slowed ranks, and 40 windows run with
its plan, which never changes. All in the same processes.
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

WORLD, TARGET, SLOWED_AT, WINDOWS, STATIC = 3, 120, 30, 110, 40
SECONDS_PER_SAMPLE = (1e-3, 2e-3, 6e-3)


def rank_main(answer: Path) -> None:
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import DataLoader, TensorDataset

    import autoaccum

    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    torch.set_num_threads(1)
    rank, speeds = dist.get_rank(), list(SECONDS_PER_SAMPLE)
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)))
    optimizer = torch.optim.AdamW(model.parameters())
    loader = DataLoader(TensorDataset(torch.randn(WINDOWS * TARGET, 64)), batch_size=TARGET)

    def loss(model, batch):
        time.sleep(speeds[rank] * len(batch[0]))
        return (model(batch[0]) - batch[0]).square().mean()

    def run(loop, windows, count):
        """Seconds of each window, of the slowest rank."""
        took = []
        for at, window in enumerate(windows):
            if at == count:
                break
            if loop is learning and at == SLOWED_AT:
                speeds[0] *= 3
            started = time.perf_counter()
            loop.step(window, loss)
            seconds = [0.0] * WORLD
            dist.all_gather_object(seconds, time.perf_counter() - started)
            took.append(max(seconds))
            shares.append(list(loop.plan.shares))
        return took

    shares: list[list[int]] = []
    learning = autoaccum.Accumulator(model, optimizer, target_batch=TARGET, max_micro_batch=20)
    took = run(learning, learning.windows(loader), WINDOWS)
    shares_of_windows, shares = shares, []
    best = autoaccum.tune(model, optimizer, loss, (torch.randn(8, 64),), target_batch=TARGET, max_micro_batch=20)
    static = autoaccum.Accumulator(model, optimizer, best, replan_after=None)
    took_best = run(static, best.windows(DataLoader(loader.dataset, batch_sampler=best.batch_sampler(loader.dataset))), STATIC)
    if rank == 0:
        last = statistics.median(took[-40:])
        found = {
            "shares_before": shares_of_windows[SLOWED_AT - 1],
            "shares_after": shares_of_windows[-1],
            "windows_until_shares_changed": next(
                (at - SLOWED_AT for at in range(SLOWED_AT, WINDOWS) if shares_of_windows[at] != shares_of_windows[SLOWED_AT - 1]), None
            ),
            "shares_of_the_best_plan": list(best.shares),
            "window_seconds_before": statistics.median(took[10:SLOWED_AT]),
            "window_seconds_with_the_old_shares": statistics.median(took[SLOWED_AT : SLOWED_AT + 10]),
            "window_seconds_after": last,
            "window_seconds_of_the_best_plan": statistics.median(took_best[5:]),
            "after_over_best": last / statistics.median(took_best[5:]),
        }
        answer.write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.answer is not None:
        rank_main(asked.answer)
        return
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        own = [str(Path(__file__).resolve()), "--answer", str(answer)]
        subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD), *own], check=True, timeout=300)
        found = json.loads(answer.read_text())
    document = {
        "schema": "autoaccum.replanning/1",
        "versions": {name: importlib.metadata.version(name) for name in ("autoaccum", "torch")},
        "machine": {"python": platform.python_version(), "cores": os.cpu_count(), "threads": 1},
        "seconds_per_sample": SECONDS_PER_SAMPLE,
        "target_batch": TARGET,
        "slowed": {"rank": 0, "times": 3, "after_window": SLOWED_AT},
        **found,
    }
    text = json.dumps(document, indent=2)
    print(text)
    if asked.output:
        asked.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
