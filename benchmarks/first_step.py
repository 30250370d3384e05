"""Seconds until the first optimizer step: training that learns its plan, beside a plain loop that knows it and one that tunes before. Fresh processes, in turn.

    python benchmarks/first_step.py --output benchmarks/results/first_step.json

The plain loop is written by hand with `zero_grad`, a mean loss for each micro-batch, and one step, in the micro-batches that `tune` finds under the
same limit; `plain, steady` does the same with the C allocator set as autoaccum sets it on a CPU under a limit, where it gives freed memory back at once.
All begin when libraries, model, optimizer and samples are there, and end after the first step. Ratios are medians over the rounds, so that a
machine that others use, too, counts for all alike. `windows` are the seconds of each of the first six windows of the loop that learns.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
TARGET = 120
CASES = (
    ("mlp", f"{ROOT}/benchmarks/oracle.py:make_mlp", 450),
    ("conv net", f"{ROOT}/examples/conv_net.py:make_job", 520),
    ("tiny gpt", f"{ROOT}/examples/tiny_gpt.py:make_job", 560),
)
PROGRAM = """
import json, sys, time, warnings
import torch
torch.set_num_threads(1)
warnings.simplefilter("ignore")
import autoaccum
from autoaccum.data import batches
from autoaccum.devices import steady_malloc
from autoaccum.window import source

kind, where, limit, target, sizes = json.loads(sys.argv[1])
job = source.load(source.Source(where, {}), device="cpu")
samples = job.batch_of(target)
_ = autoaccum.Accumulator, autoaccum.tune  # imported now
if kind == "plain, steady":
    steady_malloc()
started = time.perf_counter()
told = {}
if kind.startswith("plain"):
    for _ in range(2):
        job.optimizer.zero_grad()
        for piece, size in zip(batches.split(samples, sizes), sizes):
            (job.loss(job.model, piece) * size / target).backward()
        job.optimizer.step()
        told.setdefault("first", time.perf_counter() - started)
elif kind == "learning":
    loop = autoaccum.Accumulator(job, target_batch=target, memory_limit=limit * 2**20)
    windows = []
    for _ in range(6):
        began = time.perf_counter()
        loop.step(samples)
        windows.append(round(time.perf_counter() - began, 4))
        told.setdefault("first", time.perf_counter() - started)
    told |= {"windows": windows, "micro_batches": loop.plan.micro_batches, "settled_after": loop.plan.learned_windows if not loop.plan.learning else None}
else:
    plan = autoaccum.tune(job, target_batch=target, memory_limit=limit * 2**20)
    autoaccum.Accumulator(job, plan).step(samples)
    told = {"first": time.perf_counter() - started, "micro_batches": plan.micro_batches}
print(json.dumps(told))
"""


def ran(kind: str, where: str, limit: int, sizes: list[int]) -> dict:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", PROGRAM, json.dumps([kind, where, limit, TARGET, sizes])]
    finished = subprocess.run(words, capture_output=True, text=True, check=True, env=environment, cwd=ROOT)
    told: dict = json.loads(finished.stdout.splitlines()[-1])
    return told


@click.command()
@click.option("--rounds", default=7, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), required=True)
def main(rounds: int, output: Path) -> None:
    import torch

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()
    rows = []
    for name, where, limit in CASES:
        tuned = [ran("tune", where, limit, [])]
        sizes = tuned[0]["micro_batches"]
        pairs = []
        for turn in range(rounds):
            kinds = ("plain", "plain, steady", "learning")
            told = {kind: ran(kind, where, limit, sizes) for kind in (kinds if turn % 2 else kinds[::-1])}
            seconds = {"plain_s": told["plain"]["first"], "plain_steady_s": told["plain, steady"]["first"], "learning_s": told["learning"]["first"]}
            pairs.append({**seconds, **told["learning"]})
        row = {
            "case": name,
            "limit_mib": limit,
            "micro_batches": sizes,
            **{name: statistics.median(pair[name] for pair in pairs) for name in ("plain_s", "plain_steady_s", "learning_s")},
            "ratio": statistics.median(pair["learning_s"] / pair["plain_s"] for pair in pairs),
            "ratio_steady": statistics.median(pair["learning_s"] / pair["plain_steady_s"] for pair in pairs),
            "tune_s": tuned[0]["first"],
            "rounds": pairs,
        }
        rows.append(row)
        click.echo(
            f"{name:9} plain {row['plain_s']:.2f} s, learning {row['learning_s']:.2f} s (ratio {row['ratio']:.2f}, same allocator {row['ratio_steady']:.2f}), tune first {row['tune_s']:.2f} s; "
            f"{sizes} and {pairs[-1]['micro_batches']}, settled after {pairs[-1]['settled_after']} windows"
        )
    machine = {"processor": platform.processor() or platform.machine(), "python": platform.python_version(), "torch": torch.__version__}
    output.write_text(json.dumps({"schema": "autoaccum.first_step/1", "commit": commit, "machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
