"""A hundred runs of three gloo ranks that learn their shares while they train: speeds, memory limits and an out-of-memory drawn anew for each.

    python benchmarks/learned_ranks.py --output benchmarks/results/learned_ranks.json

Each run has real processes; a sample takes a rank 2 to 12 ms, a third of the ranks has room for 40 to 120 MiB at 2 MiB a sample, and in half of the runs a
rank runs out of memory once. A run is good if all ranks end within a minute and a half, the parameters are those of whole windows in one process
(relative difference below 1e-13), and all ranks have the same shares. Where a rank runs out of memory in a window that is not voted on any more, because
the shares have settled, the job ends (docs/ranks.md): `all_raised` says whether every rank ended with an error. `ratio` is the window time with the shares after six windows beside that of
the best real-valued shares, from the drawn speeds and what each rank can hold.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.ranked import in_ranks  # noqa: E402 - the checkout need not be installed

TARGET, WINDOWS, SAMPLE_MIB = 60, 10, 2


def best_seconds(speeds: list[float]) -> float:
    return TARGET / sum(1 / speed for speed in speeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    draw, rows = random.Random(given.seed), []
    for run in range(given.runs):
        speeds = [round(draw.uniform(0.002, 0.012), 4) for _ in range(3)]
        rooms = [draw.randint(40, 120) if draw.random() < 1 / 3 else None for _ in range(3)]
        runs_out = draw.randint(1, 5) if draw.random() < 0.5 else None
        began = time.monotonic()
        row: dict[str, object] = {"speeds": speeds, "rooms_mib": rooms, "runs_out": runs_out}
        try:
            told = in_ranks("learned", speeds, rooms, WINDOWS, None, runs_out, timeout=90)
            raised = [None if each is None else each.get("raised") for each in told]
            if any(raised):
                row |= {"good": False, "all_raised": all(raised), "messages": [each and str(each.get("message"))[:200] for each in told]}
                rows.append({**row, "seconds": round(time.monotonic() - began, 2)})
                print(f"{run + 1}: {rows[-1]}", flush=True)
                continue
            shares = told[0]["shares"]
            took = max(share * speed for share, speed in zip(shares[-1], speeds))
            row |= {
                "good": all(each["difference"] < 1e-13 and each["shares"] == shares for each in told),
                "difference": max(each["difference"] for each in told),
                "settled_after": next((at for at in range(len(shares)) if all(each == shares[-1] for each in shares[at:])), None),
                "shares": shares[-1],
                "ratio": took / best_seconds(speeds),
            }
        except Exception as error:  # a rank that hung or failed
            row |= {"good": False, "error": f"{type(error).__name__}: {str(error)[:300]}"}
        rows.append({**row, "seconds": round(time.monotonic() - began, 2)})
        print(f"{run + 1}: {rows[-1]}", flush=True)
    good = [row for row in rows if row["good"]]
    free = [row["ratio"] for row in good if not any(row["rooms_mib"])]
    summary = {
        "runs": len(rows),
        "good": len(good),
        "ended_with_an_error_on_every_rank": sum(bool(row.get("all_raised")) for row in rows),
        "slowest_s": max(row["seconds"] for row in rows),
        "ratio_without_limits": statistics.median(free) if free else None,
    }
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()
    given.output.write_text(json.dumps({"schema": "autoaccum.learned_ranks/1", "commit": commit, **summary, "rows": rows}, indent=1) + "\n")
    print(summary)


if __name__ == "__main__":
    main()
