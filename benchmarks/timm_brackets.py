"""Does it fit an RTX 3090? Simulated verdicts beside timm's published training benchmark, at the batch that trained and at the next one, which ran out.

    python benchmarks/timm_brackets.py --output benchmarks/results/timm_brackets.json

needs timm and torchvision, in an environment of its own, as `estimate_published.py` does. Source: huggingface/pytorch-image-models, its folder of results
(Apache-2.0), `benchmarks/data/timm_brackets_dev.csv`: models in mixed precision (fp16 without a scaler), SGD with momentum, cross-entropy, cuDNN's benchmark
mode, no fused attention, torch 1.12 with CUDA 11.3. How much its context took is not known: 1.5 GiB are assumed for all, and nothing was fitted to these
rows. What cuDNN tries out in benchmark mode takes no more than is free, so it alone never runs out.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import random
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TIMM_FUSED_ATTN"] = "0"

import estimate_published  # beside this file

HERE = Path(__file__).resolve().parent
GIB = 1 << 30
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
CONTEXT_BYTES = 3 * GIB // 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, default=HERE / "data" / "timm_brackets_dev.csv")
    parser.add_argument("--sample", type=int, default=0, help="rows drawn with a fixed seed; 0 for all")
    parser.add_argument("--seed", type=int, default=20261129)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    started, rows = time.perf_counter(), list(csv.DictReader(given.rows.open()))
    if given.sample:
        rows = random.Random(given.seed).sample(rows, min(given.sample, len(rows)))
    with multiprocessing.get_context("spawn").Pool(given.processes, initializer=estimate_published.prepare, maxtasksperchild=8) as pool:
        told = list(pool.imap(verdict, rows, chunksize=1))
    judged = [row for row in told if "error" not in row]
    result = {
        "schema": "autoaccum.timm_brackets/1",
        "versions": estimate_published.versions(),
        "seconds": round(time.perf_counter() - started, 1),
        "rows": len(judged),
        "fits_where_it_trained": sum(row["fits"] for row in judged),
        "does_not_fit_where_it_ran_out": sum(not row["next_fits"] for row in judged),
        "both": sum(row["fits"] and not row["next_fits"] for row in judged),
        "failed": [f"{row['model']}: {row['error']}" for row in told if "error" in row],
        "told": told,
    }
    if given.output:
        given.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "told"}, indent=1))


def verdict(row: dict[str, str]) -> dict[str, object]:
    started = time.perf_counter()
    try:
        found = judged(row["model"], int(row["train_batch_size"]), int(row["train_img_size"]))
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]}
    return {"model": row["model"], "batch": int(row["train_batch_size"]), **found, "seconds": round(time.perf_counter() - started, 2)}


def judged(name: str, batch: int, side: int) -> dict[str, object]:
    from autoaccum.virtual import phantom, without_memory

    with without_memory():
        job = timm_job(name, side)
    made = phantom.Phantom([job])
    peaks = {size: most_bytes(made, job, size) for size in (batch, SIZES[SIZES.index(batch) + 1])}
    (fits, peak), (next_fits, next_peak) = peaks.values()
    return {"fits": fits, "peak_bytes": peak, "next": list(peaks)[1], "next_fits": next_fits, "next_peak_bytes": next_peak}


def timm_job(name: str, side: int):
    import timm
    import torch
    from torch.nn.functional import cross_entropy

    from autoaccum import Job

    try:
        model = timm.create_model(name, pretrained=False, img_size=side)
    except TypeError:  # a model that takes any size
        model = timm.create_model(name, pretrained=False)
    model.train()

    def loss(model, batch):
        with torch.autocast("cuda", dtype=torch.float16):
            out = model(batch[0])
            out = out[0] if isinstance(out, (tuple, list)) else out
            return cross_entropy(out, batch[1]), out

    sample = (torch.zeros(2, 3, side, side), torch.zeros(2, dtype=torch.long))
    return Job(model, torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, foreach=False), loss, sample)


def most_bytes(made, job, batch: int) -> tuple[bool, int]:
    """If three iterations fit, and the most that they reserve where memory has no end. The input stays on the card."""
    import torch

    from autoaccum.data import batches
    from autoaccum.simulate import profiles
    from autoaccum.simulate.allocator import Allocator
    from autoaccum.simulate.kernel_choice import Card
    from autoaccum.simulate.tape import replay

    def run(tracer) -> None:
        inputs = batches.move(made.batch(batch), torch.device("cuda"))
        estimate_published.plain_loop(job, lambda: inputs, "start", 3, tracer)

    card = profiles.load("rtx-3090")
    tape = made.recorded(run, Card(card.capability, benchmark=True)).on(card.cublas_workspace.value, *card.parallel)
    for number, operator in enumerate(tape.operators):
        if operator == "cudnn benchmark":
            tape.sizes[number] = 0
    limited = replay(tape, Allocator(card.total_bytes, available_bytes=card.total_bytes - CONTEXT_BYTES))
    return limited.failed_at is None, replay(tape, Allocator()).peak_reserved_bytes


if __name__ == "__main__":
    main()
