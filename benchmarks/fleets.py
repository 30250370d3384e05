"""How long it takes to share a window out over many ranks, and how much the usual ways lose against the exact one.

    python benchmarks/fleets.py [--output benchmarks/results/fleets.json]

Random fleets of 64 classes of GPUs, seeded. "proportional" gives every rank a share in proportion to its speed, rounded by largest
remainder, as most systems do: it does not see that a share which ends in one more micro-step costs that step.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import time
from pathlib import Path

from autoaccum.distributed.shares import solve
from autoaccum.distributed.speed_curves import AffineCurve


def fleet(draw: random.Random, ranks: int, kinds: int = 64) -> list[tuple[AffineCurve, int]]:
    kinds = min(kinds, ranks)
    made = [
        (
            AffineCurve(draw.randint(2, 128), draw.uniform(0.005, 0.05), draw.uniform(0.001, 0.04), draw.uniform(0, 0.05)),
            ranks // kinds + (kind < ranks % kinds),
        )
        for kind in range(kinds)
    ]
    return made


def timed(ranks: int, repeats: int = 7) -> dict:
    took = []
    for seed in range(repeats):
        of, samples = fleet(random.Random(seed), ranks), 84 * ranks
        started = time.perf_counter()
        shares = solve(of, samples)
        took.append(time.perf_counter() - started)
        assert sum(shares) == samples
    return {"ranks": ranks, "classes": min(64, ranks), "samples": 84 * ranks, "median_seconds": statistics.median(took), "worst_seconds": max(took)}


def proportional(curves: list[AffineCurve], samples: int) -> list[int]:
    speeds = [1 / (curve.step_seconds / curve.most + curve.sample_seconds) for curve in curves]
    raw = [samples * speed / sum(speeds) for speed in speeds]
    shares = [int(each) for each in raw]
    for rank in sorted(range(len(raw)), key=lambda rank: shares[rank] - raw[rank])[: samples - sum(shares)]:
        shares[rank] += 1
    return shares


def lost(instances: int = 2000) -> dict:
    draw, ratios = random.Random(1), []
    for _ in range(instances):
        curves = [
            AffineCurve(draw.choice([1, 2, 4, 8, 16, 40]), draw.choice([0.0, 0.01, 0.05, 0.2]), draw.choice([0.004, 0.01, 0.02, 0.05, 0.1]))
            for _ in range(draw.randint(2, 8))
        ]
        samples = draw.choice([32, 64, 120, 256])
        best = max(curve.seconds(share) for curve, share in zip(curves, solve([(curve, 1) for curve in curves], samples)))
        ratios.append(max(curve.seconds(share) for curve, share in zip(curves, proportional(curves, samples))) / best)
    return {"instances": instances, "proportional_over_exact_mean": statistics.mean(ratios), "proportional_over_exact_worst": max(ratios)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    document = {
        "machine": {"python": platform.python_version(), "cores": os.cpu_count()},
        "solve": [timed(ranks) for ranks in (8, 100, 1000, 10_000, 30_000, 100_000)],
        "against_proportional": lost(),
    }
    text = json.dumps(document, indent=2)
    print(text)
    if asked.output:
        asked.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
