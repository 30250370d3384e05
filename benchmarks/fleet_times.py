"""Forecast seconds of forward and backward beside those that others measured, card by card.

    python benchmarks/fleet_times.py --output benchmarks/results/fleet_times.json

needs transformers. Source: eth-easl/sailor (SOSP 2025), `benchmarks/data/sailor_profiles.csv`: OPT-350M, 2,048 tokens, fp32, with TF32 where the card has
it, tensor parallelism 1. The parts of a card's rates that operators reach (`autoaccum/virtual/roofline.py`) were chosen on these rows; here each card is
also left out in turn, and the parts are chosen anew on the other six by the mean of the logarithmic error.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import statistics
import sys
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from autoaccum.simulate import profiles  # noqa: E402 - the package need not be installed
from autoaccum.virtual import roofline  # noqa: E402

CARDS = {
    "V100-16": "v100-16gb", "A100-40": "a100-40gb", "A100-80": "a100-80gb", "GH-96": "gh200", "RTX-3090": "rtx-3090", "RTX-2080": "rtx-2080-ti",
    "Titan-RTX": "titan-rtx",
}  # fmt: skip
PARTS = list(itertools.product((0.55, 0.65, 0.75, 0.85), (0.3, 0.4, 0.5, 0.6, 0.7), (0.45, 0.5, 0.55, 0.6, 0.7)))


def works() -> list[tuple[int, list]]:
    """What the operators of the published job do, at two and at four samples."""
    import torch
    import transformers

    from autoaccum import Job
    from autoaccum.simulate import Card
    from autoaccum.trace import fake
    from autoaccum.virtual import phantom, without_memory

    warnings.filterwarnings("ignore")
    fake.enable()
    torch.backends.cuda.matmul.allow_tf32 = True
    config = transformers.OPTConfig(
        hidden_size=1024, ffn_dim=4096, num_hidden_layers=24, num_attention_heads=16, word_embed_proj_dim=512, do_layer_norm_before=False, max_position_embeddings=2048,
    )  # fmt: skip
    with without_memory():
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()
        job = Job(model, torch.optim.Adam(model.parameters()), lambda model, ids: model(input_ids=ids, labels=ids).loss, torch.zeros(2, 2048, dtype=torch.long))
    made = phantom.Phantom([job])
    return [(samples, made.work(samples, Card(75))) for samples in (2, 4)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=HERE / "data" / "sailor_profiles.csv")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    traced = works()
    rows = [row for row in csv.DictReader(given.data.open()) if row["tensor_parallel"] == "1"]
    cards = {name: profiles.load(of) for name, of in CARDS.items()}
    measured = [float(row["forward_s"]) + float(row["backward_s"]) for row in rows]

    def forecast(row: dict[str, str]) -> tuple[float, ...]:
        samples = int(row["micro_batch"])
        return tuple(curve.step_seconds + curve.sample_seconds * samples for curve in roofline.traced_curves(cards[row["gpu"]], samples, *traced))

    def error(at: int, parts: tuple[float, float, float]) -> float:
        if (at, parts) not in known:
            roofline._OF_FP32, roofline._OF_TENSOR_CORES, roofline._OF_BANDWIDTH = parts
            known[at, parts] = forecast(rows[at])[1] / measured[at] - 1
        return known[at, parts]

    known: dict[tuple[int, tuple[float, float, float]], float] = {}
    chosen = (roofline._OF_FP32, roofline._OF_TENSOR_CORES, roofline._OF_BANDWIDTH)
    told = []
    for at, row in enumerate(rows):
        others = [each for each, other in enumerate(rows) if other["gpu"] != row["gpu"]]
        best = min(PARTS, key=lambda parts: sum(abs(math.log1p(error(each, parts))) for each in others))
        roofline._OF_FP32, roofline._OF_TENSOR_CORES, roofline._OF_BANDWIDTH = chosen
        slow, middle, fast = forecast(row)
        told.append(
            {
                "gpu": row["gpu"],
                "micro_batch": int(row["micro_batch"]),
                "measured_s": measured[at],
                "forecast_s": middle,
                "interval_s": [fast, slow],
                "inside": fast <= measured[at] <= slow,
                "error_percent": round(100 * (middle / measured[at] - 1), 1),
                "left_out_error_percent": round(100 * error(at, best), 1),
            }
        )
    absolute = sorted(abs(row["left_out_error_percent"]) for row in told)
    result = {
        "schema": "autoaccum.fleet_times/1",
        "rows": len(told),
        "inside": sum(row["inside"] for row in told),
        "left_out": {"median_percent": statistics.median(absolute), "p90_percent": absolute[int(0.9 * (len(absolute) - 1))], "worst_percent": absolute[-1]},
        "cards": told,
    }
    if given.output:
        given.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: value for name, value in result.items() if name != "cards"}, indent=1))


if __name__ == "__main__":
    main()
