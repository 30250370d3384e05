"""Workers that are killed at random moments, under torchrun with restarts: what is left of the run.

    python benchmarks/elastic.py [--kills 100] [--in-windows 40] [--output benchmarks/results/elastic.json]

Each run is `examples/elastic.py` over three gloo ranks. One of the three workers, drawn at random, is killed (SIGKILL) at a random moment between its
start and the time that an undisturbed run takes, until so many were killed. Most of that time
goes by before the first window, so in further runs the moment is drawn inside a window, itself drawn at random. torchrun starts all of them again. A run is good if it ends within `--timeout` seconds, after every
window of every epoch, and if its parameters are those of one process that takes every window at once, to 1e-12 in double precision: a sample that was
trained twice or never would show. The exit code is 1 if a run is not good.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "elastic.py"
RANKS, WINDOWS = 3, 39


def undisturbed() -> dict[str, torch.Tensor]:
    """The parameters of one process that takes every window of the example at once."""
    torch.manual_seed(0)
    inputs = torch.randn(1500, 8, dtype=torch.float64)
    targets = inputs.sum(dim=1, keepdim=True)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(3):
        for start in range(0, 1500, 120):
            nn.functional.mse_loss(net(inputs[start : start + 120]), targets[start : start + 120]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return {name: value.detach() for name, value in net.state_dict().items()}


def started(checkpoint: Path, log, ranks: int = RANKS) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        "--max-restarts",
        "5",
        "--monitor-interval",
        "0.1",
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([*command, str(EXAMPLE), str(checkpoint)], stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True)


def workers(agent: subprocess.Popen) -> list[psutil.Process]:
    try:
        return [each for each in psutil.Process(agent.pid).children() if EXAMPLE.name in " ".join(each.cmdline())]
    except psutil.Error:
        return []


def run(seed: int, seconds: float, timeout_s: float, expected: dict[str, torch.Tensor], *, in_window: bool = False) -> dict[str, object]:
    """One run. in_window: kill up to 30 ms after a window of the first life, drawn at random, and not within the first `seconds`."""
    draw = random.Random(seed)
    victim, moment = draw.randrange(RANKS), draw.uniform(0, 0.03 if in_window else seconds)
    after, seen, seen_at = (draw.randrange(1, WINDOWS) if in_window else 0), 0, 0
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w+") as log:
        checkpoint = Path(folder) / "run.pt"
        begun = time.monotonic()
        agent = started(checkpoint, log)
        killed_in = None
        try:
            while agent.poll() is None and time.monotonic() - begun < timeout_s:
                if after and seen < after:  # every window is saved in a file of its own
                    here = checkpoint.stat().st_ino if checkpoint.exists() else 0
                    seen, seen_at = (seen + 1, here) if here != seen_at else (seen, seen_at)
                    if seen < after:
                        time.sleep(0.001)
                        continue
                    time.sleep(moment)
                if killed_in is None and (after or time.monotonic() - begun >= moment) and len(found := workers(agent)) == RANKS:
                    killed_in = "before the first window"
                    if checkpoint.exists():
                        killed_in = f"window {1 + torch.load(checkpoint, weights_only=True)['loop']['windows']}"
                    found[victim].kill()
                time.sleep(0.02)
            ended = agent.poll()
        finally:
            for process in [*workers(agent), psutil.Process(agent.pid)] if agent.poll() is None else []:
                process.send_signal(signal.SIGKILL)
            agent.wait()
        took = time.monotonic() - begun
        log.seek(0)
        said = log.read()
        state = torch.load(checkpoint, weights_only=True) if checkpoint.exists() else None
    difference = None if state is None else max(float((state["model"][name] - value).abs().max()) for name, value in expected.items())
    windows = None if state is None else state["loop"]["windows"]
    good = ended == 0 and windows == WINDOWS and difference is not None and difference < 1e-12
    found = {"seed": seed, "victim": victim, "killed_in": killed_in, "seconds": round(took, 1), "exit": ended, "windows": windows, "difference": difference}
    return {**found, "good": good, **({} if good else {"said": said[-3000:]})}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--in-windows", type=int, default=40)
    parser.add_argument("--keep", type=Path, help="results whose runs are kept, beside those of now")
    parser.add_argument("--timeout", type=float, default=90)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    expected = undisturbed()
    whole = run(-1, 1e9, given.timeout, expected)  # nobody is killed
    rows = [] if given.keep is None else json.loads(given.keep.read_text())["rows"]
    for seed in [*range(3 * given.kills), *range(10_000, 10_000 + given.in_windows)]:
        if seed < 10_000 and sum(row["killed_in"] is not None for row in rows) >= given.kills:
            continue
        rows.append(row := run(seed, whole["seconds"], given.timeout, expected, in_window=seed >= 10_000))
        print({name: value for name, value in row.items() if name != "said"}, row.get("said", ""), flush=True)
    killed = [row for row in rows if row["killed_in"] is not None]
    result = {
        "schema": "autoaccum.elastic/1",
        "machine": {"processor": platform.processor() or platform.machine(), "cpus": os.cpu_count(), "torch": torch.__version__},
        "undisturbed": whole,
        "runs": len(rows),
        "killed": len(killed),
        "good": sum(row["good"] for row in rows),
        "worst_difference": max((row["difference"] for row in rows if row["difference"] is not None), default=None),
        "longest_seconds": max((row["seconds"] for row in rows), default=None),
        "rows": rows,
    }
    if given.output:
        given.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: value for name, value in result.items() if name != "rows"}, indent=1))
    return 0 if whole["good"] and result["good"] == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
