"""What `tune` takes, beside another checkout of autoaccum: the same jobs in fresh processes, in turn.

    python benchmarks/tune_cost.py --before ../autoaccum-before --output benchmarks/results/tune_cost.json

`long window`: 64 micro-batches of about 0.2 s each. The others are cases of `oracle.py`, one of each model.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import json, sys, time, warnings
import torch
torch.set_num_threads(1)
warnings.simplefilter("ignore")
import autoaccum

name, where, limit, target = json.loads(sys.argv[1])
if name == "long window":
    computed = 0

    def loss(model, batch):
        global computed
        computed += len(batch[0])
        until = time.perf_counter() + 0.02 * len(batch[0])
        while time.perf_counter() < until:
            pass
        return ((model(batch[0]) - batch[1]) ** 2).mean()

    model = torch.nn.Linear(8, 1)
    optimizer = torch.optim.Adam(model.parameters())  # the first one of a process imports torch's compiler, for a second
    started = time.perf_counter()
    plan = autoaccum.tune(model, optimizer, loss, (torch.randn(8, 8), torch.randn(8, 1)), target_batch=640, max_micro_batch=10)
    print(json.dumps({"seconds": time.perf_counter() - started, "plan": plan.micro_batches[:1] + (len(plan.micro_batches),), "samples": computed}))
else:
    from autoaccum.probe import request
    from autoaccum.tuner import job_file
    from autoaccum.window.source import Source

    plan = job_file.tune_source(Source(where, {}), request.Request(target, memory_limit=limit), device="cpu")
    print(json.dumps({"seconds": plan.seconds, "plan": (plan.micro_batch, plan.accumulation_steps), "trials": len(plan.trials)}))
"""


def took(checkout: Path, case: tuple[str, str, int, int]) -> dict:
    """One tune in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM, json.dumps(case)], capture_output=True, text=True, check=True, env=environment, cwd=checkout)
    told: dict = json.loads(done.stdout.splitlines()[-1])
    return told


@click.command()
@click.option("--before", type=click.Path(path_type=Path, exists=True), required=True, help="The other checkout.")
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--runs", default=3, show_default=True)
def main(before: Path, output: Path, runs: int) -> None:
    cases = [
        ("long window", "", 0, 640),
        ("mlp", f"{ROOT}/benchmarks/oracle.py:make_mlp", 450 * 2**20, 120),
        ("conv net", f"{ROOT}/examples/conv_net.py:make_job", 520 * 2**20, 120),
        ("tiny gpt", f"{ROOT}/examples/tiny_gpt.py:make_job", 560 * 2**20, 120),
    ]
    commits = [
        subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=each, check=True).stdout.strip() for each in (before, ROOT)
    ]
    rows = []
    for case in cases:
        pairs = [(took(before, case), took(ROOT, case)) for _ in range(1 if case[0] == "long window" else runs)]
        seconds = [statistics.median(each[side]["seconds"] for each in pairs) for side in (0, 1)]
        rows.append({"case": case[0], "before_s": seconds[0], "now_s": seconds[1], "ratio": seconds[1] / seconds[0], "runs": pairs})
        click.echo(f"{case[0]:12} {seconds[0]:6.1f} s -> {seconds[1]:6.1f} s  {seconds[1] / seconds[0]:.2f}  {pairs[0][0]['plan']} {pairs[0][1]['plan']}")
    document = {"schema": "autoaccum.tune_cost/1", "commits": {"before": commits[0], "now": commits[1]}, "rows": rows}
    output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
