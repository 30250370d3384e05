"""Published runs over unlike nodes: seconds of every plan forecast and measured, and our shares beside the even split and the best plan known.

    python benchmarks/fleet_planners.py --output benchmarks/results/fleet_planners.json

Source: eth-easl/sailor (SOSP 2025), `benchmarks/data/sailor_runs.csv` and `sailor_profiles.csv`: OPT-350M over nodes of 2 or 8 RTX 3090, RTX 2080 Ti or
Titan RTX, each node one rank (tensor parallelism inside), 0.115 GB/s between nodes. Every published plan gives its replicas the same number of samples.

A rank's time is the straight line through its node's measured micro-steps of one sample and of the plan's two; gradients cross as a ring moves them. A
pipeline of p stages with m micro-batches runs "one forward, one backward" (arXiv 1806.03377): m - 1 micro-steps of its slowest stage after one pass
through all, each stage having the same part of the layers. After a micro-step an activation goes on while a gradient comes back, for the time of one.
That last rule was chosen with the runs in view; no crossing in a micro-step would make the pipelines' errors -38 to +2 %, two crossings -7 to +29 %.
Plans without stages have no such choice.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from autoaccum.distributed.fleet import Fleet  # noqa: E402 - the package need not be installed
from autoaccum.distributed.speed_curves import AffineCurve  # noqa: E402

PARAMETERS = 331e6  # of OPT-350M
ACTIVATION = 2048 * 1024 * 4  # bytes that a sample hands to the next stage: tokens, width, fp32
LINK = 0.115e9  # bytes a second between nodes, as the source's README gives it


def curve(profiles: list[dict[str, str]], gpu: str, parallel: str, most: int) -> AffineCurve:
    rows = {int(row["micro_batch"]): row for row in profiles if (row["gpu"], row["tensor_parallel"]) == (gpu, parallel)}
    one, all_ = (float(rows[size]["forward_s"]) + float(rows[size]["backward_s"]) for size in (1, most))
    sample = min((all_ - one) / (most - 1), all_ / most)  # where a sample more costs more than one alone, no part is fixed
    return AffineCurve(most, all_ - sample * most, sample, float(rows[most]["update_s"]), f"{gpu}x{parallel}")


def all_reduce(ranks: int, parameters: float) -> float:
    return 2 * (ranks - 1) / ranks * 4 * parameters / LINK


def of_pipelines(stages: list[list[AffineCurve]], target: int, micro_batch: int) -> float:
    """Seconds of a step of equal pipelines; `stages` holds, by stage, the curve of each pipeline's node."""
    count, pipelines = len(stages), len(stages[0])
    micro_steps = target // pipelines // micro_batch
    crossing = micro_batch * ACTIVATION / LINK if count > 1 else 0.0
    slowest = 0.0
    for nodes in zip(*stages):
        seconds = [(node.step_seconds + node.sample_seconds * micro_batch) / count for node in nodes]
        slowest = max(slowest, sum(seconds) + 2 * (count - 1) * crossing + (micro_steps - 1) * (max(seconds) + crossing))
    update = max(node.window_seconds for stage in stages for node in stage) / count
    return slowest + update + all_reduce(pipelines, PARAMETERS / count)


def _name(plan: dict[str, object]) -> str:
    if plan["stages"] == 1:
        return "even split"
    return f"{plan['pipelines']} x {plan['stages']} stages" if plan["pipelines"] != 1 else f"{plan['stages']} stages"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    profiles = list(csv.DictReader((HERE / "data" / "sailor_profiles.csv").open()))
    rows = [row for row in csv.DictReader((HERE / "data" / "sailor_runs.csv").open()) if row["file"].startswith("mit/")]
    plans, fleets = [], defaultdict(list)
    for row in rows:
        names = [[node.strip() for node in stage.split(",")] for stage in row["ranks"].split("|")]
        target, micro_batch, measured = int(row["gbs"]), int(row["micro_batch"]), float(row["real_s"])
        stages = [[curve(profiles, *re.fullmatch(r"(.+)x(\d+)", name).groups(), most=micro_batch) for name in stage] for stage in names]
        forecast = of_pipelines(stages, target, micro_batch)
        plan = {
            "run": row["file"],
            "nodes": sorted(name for stage in names for name in stage),
            "target": target,
            "plan": "",
            "stages": len(stages),
            "pipelines": len(stages[0]),
            "micro_batch": micro_batch,
            "measured_s": round(measured, 2),
            "forecast_s": round(forecast, 2),
            "error_percent": round(100 * (forecast / measured - 1), 1),
        }
        plan["plan"] = _name(plan)
        plans.append(plan)
        fleets[tuple(plan["nodes"]), target].append((plan, [each for stage in stages for each in stage]))
    ours = []
    for (nodes, target), known in fleets.items():
        curves = sorted(known[0][1], key=lambda each: each.gpu)
        crossing = all_reduce(len(curves), PARAMETERS)
        even, shared = Fleet.planned(curves, target, equal=True), Fleet.planned(curves, target)
        even_s, ours_s = (max(each.seconds(share) for each, share in zip(curves, fleet.shares)) + crossing for fleet in (even, shared))
        bound = target / sum(1 / (each.sample_seconds + each.step_seconds / each.most) for each in curves) + crossing
        measured_even = next((plan["measured_s"] for plan, _ in known if plan["stages"] == 1), None)
        best = min((plan for plan, _ in known), key=lambda plan: plan["measured_s"])
        gap = None if measured_even is None else measured_even - best["measured_s"]
        corrected = None if measured_even is None else ours_s * measured_even / even_s
        ours.append(
            {
                "nodes": list(nodes),
                "target": target,
                "measured_even_s": measured_even,
                "forecast_even_s": round(even_s, 2),
                "best_plan": _name(best),
                "best_plan_s": best["measured_s"],
                "shares": list(shared.shares),
                "forecast_ours_s": round(ours_s, 2),
                "corrected_ours_s": corrected and round(corrected, 2),  # by the error of the even split's forecast
                "of_the_even_split": round(ours_s / even_s, 3),
                "gap_to_best_plan_closed_percent": round(100 * (measured_even - corrected) / gap) if gap else None,
                "gap_to_bound_closed_percent": round(100 * (even_s - ours_s) / (even_s - bound), 1),
            }
        )
    result = {"schema": "autoaccum.fleet_planners/2", "parameters": PARAMETERS, "link_bytes_per_s": LINK, "plans": plans, "fleets": ours}
    if given.output:
        given.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
