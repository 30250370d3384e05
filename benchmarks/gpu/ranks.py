"""On one CUDA card: two and three ranks that share it, each with a cap of its own; tune, and 50 windows. Raw JSON out.

    python benchmarks/gpu/ranks.py --output benchmarks/results/gpu_ranks.json

NCCL refuses ranks that share a card, so gradients cross by gloo; all work is on the card. Starts its ranks itself.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
CAPS = {"two": ("12GiB", "4GiB"), "three": ("12GiB", "6GiB", "3GiB")}
TARGET, WINDOWS = 240, 50


def rank_main(caps: tuple[str, ...], engine: str, answer: Path) -> None:
    import tiny_gpt
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    import autoaccum
    from autoaccum.units import parse_size

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.cuda.set_device(0)
    torch.manual_seed(0)
    base = tiny_gpt.make_job(width=512, layers=8, heads=8, length=512)
    model = base.model.cuda()
    data = base.batch_of(TARGET)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    given = {"autocast": torch.bfloat16, "max_grad_norm": 1.0}
    if engine == "ddp":
        model = DistributedDataParallel(model, device_ids=[0])
    started = time.perf_counter()
    plan = autoaccum.tune(model, optimizer, base.loss, data[:8], target_batch=TARGET, memory_limit=caps[rank], **given)
    tuned = time.perf_counter() - started
    if engine == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        model = fully_shard(model, mesh=init_device_mesh("cuda", (len(caps),)))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    loop = autoaccum.Accumulator(model, optimizer, plan, **given)
    first = sum(plan.shares[:rank])
    own = data[first : first + plan.share]
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_per_process_memory_fraction((parse_size(caps[rank]) - (plan.outside_bytes or 0)) / torch.cuda.get_device_properties(0).total_memory)
    took, losses, rescued = [], [], 0
    for _ in range(WINDOWS):
        started = time.perf_counter()
        result = loop.step(own, base.loss)
        losses.append(result.loss)
        took.append(time.perf_counter() - started)
        rescued += result.rescued is not None
    stats = torch.cuda.memory_stats()
    mine = {
        "plan": plan.as_dict(), "tune_seconds": tuned, "windows": len(took), "window_seconds": sorted(took)[len(took) // 2], "losses": losses[::10],
        "rescued": rescued, "max_reserved": torch.cuda.max_memory_reserved(), "ooms": stats["num_ooms"], "retries": stats["num_alloc_retries"],
    }  # fmt: skip
    everyone = [None] * len(caps)
    dist.all_gather_object(everyone, mine)
    if rank == 0:
        answer.write_text(json.dumps(everyone))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rank", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.rank:
        rank_main(CAPS[asked.rank[0]], asked.rank[1], Path(asked.rank[2]))
        return
    import torch

    card = torch.cuda.get_device_properties(0)
    driver = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, check=False).stdout.strip()
    machine = {"card": card.name, "total_bytes": card.total_memory, "driver": driver, "torch": torch.__version__, "python": platform.python_version()}
    rows = []
    for name, caps in CAPS.items():
        for engine in ("ddp", "fsdp2"):
            answer = asked.output.with_suffix(f".{os.getpid()}")
            own = [str(Path(__file__).resolve()), "--output", str(asked.output), "--rank", name, engine, str(answer)]
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(len(caps)), *own]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
            row = {"ranks": len(caps), "engine": engine, "caps": caps}
            row |= {"by_rank": json.loads(answer.read_text())} if answer.exists() else {"error": done.stderr[-4000:]}
            answer.unlink(missing_ok=True)
            rows.append(row)
            print(name, engine, "error" if "error" in row else row["by_rank"][0]["plan"]["shares"], flush=True)
            asked.output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
