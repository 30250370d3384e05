"""Shares over unlike cards beside published runs: the even split's forecast and measured seconds, and how much of its loss our shares take away.

    python benchmarks/fleet_planners.py --output benchmarks/results/fleet_planners.json

Source: eth-easl/sailor (SOSP 2025), `benchmarks/data/sailor_runs.csv` and `sailor_profiles.csv`: OPT-350M over nodes of 2 or 8 RTX 3090, RTX 2080 Ti or
Titan RTX, each node one rank (tensor parallelism inside), 0.115 GB/s between nodes. Every published run splits evenly. A rank's time is the straight line
through its node's measured micro-steps of one to four samples; gradients cross as a ring moves them. Nothing was chosen on the runs. Runs with pipeline
stages are no plans of ours: they are listed as the best that other planners reached with the same nodes and the same effective batch.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from autoaccum.distributed.fleet import Fleet  # noqa: E402 - the package need not be installed
from autoaccum.distributed.speed_curves import AffineCurve  # noqa: E402

PARAMETERS = 331e6  # of OPT-350M
LINK = 0.115e9  # bytes a second between nodes, as the source's README gives it


def curve(profiles: list[dict[str, str]], gpu: str, parallel: str, most: int) -> AffineCurve:
    rows = [row for row in profiles if (row["gpu"], row["tensor_parallel"]) == (gpu, parallel) and int(row["micro_batch"]) <= 4]
    points = [(int(row["micro_batch"]), float(row["forward_s"]) + float(row["backward_s"])) for row in rows]
    middle_x, middle_y = (sum(values) / len(points) for values in zip(*points))
    slope = sum((x - middle_x) * (y - middle_y) for x, y in points) / sum((x - middle_x) ** 2 for x, _ in points)
    update = sum(float(row["update_s"]) for row in rows) / len(rows)
    return AffineCurve(most, max(middle_y - slope * middle_x, 0.0), slope, update, f"{gpu}x{parallel}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    profiles = list(csv.DictReader((HERE / "data" / "sailor_profiles.csv").open()))
    runs = [row for row in csv.DictReader((HERE / "data" / "sailor_runs.csv").open()) if row["file"].startswith("mit/")]
    told = []
    for run in runs:
        if run["stages"] != "1":
            continue
        nodes = [re.fullmatch(r"(.+)x(\d+)", node.strip()).groups() for node in run["ranks"].split(",")]
        target, most, ranks = int(run["gbs"]), int(run["micro_batch"]), len(nodes)
        curves = [curve(profiles, gpu, parallel, most) for gpu, parallel in nodes]
        crossing = 2 * (ranks - 1) / ranks * 4 * PARAMETERS / LINK
        even, ours = Fleet.planned(curves, target, equal=True), Fleet.planned(curves, target)
        seconds = [max(each.seconds(share) for each, share in zip(curves, fleet.shares)) + crossing for fleet in (even, ours)]
        bound = target / sum(1 / (each.sample_seconds + each.step_seconds / most) for each in curves) + crossing
        measured = float(run["real_s"])
        others = [float(row["real_s"]) for row in runs if row["gbs"] == run["gbs"] and row["file"].split("/")[1] == run["file"].split("/")[1]]
        told.append(
            {
                "run": run["file"],
                "nodes": run["ranks"],
                "target": target,
                "measured_even_s": measured,
                "forecast_even_s": round(seconds[0], 2),
                "error_percent": round(100 * (seconds[0] / measured - 1), 1),
                "best_published_s": min(others),
                "shares": list(ours.shares),
                "forecast_ours_s": round(seconds[1], 2),
                "of_the_even_split": round(seconds[1] / seconds[0], 3),
                "gap_closed_percent": round(100 * (seconds[0] - seconds[1]) / (seconds[0] - bound), 1),
            }
        )
    result = {"schema": "autoaccum.fleet_planners/1", "parameters": PARAMETERS, "link_bytes_per_s": LINK, "runs": told}
    if given.output:
        given.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
