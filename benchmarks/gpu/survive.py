"""On a CUDA card: plans under capped budgets, and 200 windows trained at each. Raw JSON out.

    python benchmarks/gpu/survive.py --output benchmarks/results/gpu_survive.json

Records the card, the driver and the torch version. Takes a few minutes; needs no network.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]


@click.command()
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--windows", default=200, show_default=True)
def main(output: Path, windows: int) -> None:
    import conv_net
    import tiny_gpt
    import torch

    import autoaccum

    card = torch.cuda.get_device_properties(0)
    driver = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, check=False).stdout.strip()
    machine = {"card": card.name, "total_bytes": card.total_memory, "driver": driver, "torch": torch.__version__, "python": platform.python_version()}
    cases = [
        (name, make, dtype, scaler, limit, target)
        for name, make in (
            ("gpt", lambda: tiny_gpt.make_job(width=512, layers=8, heads=8, length=512)),
            ("conv", lambda: conv_net.make_job(channels=64, side=128, samples=64)),
        )
        for dtype, scaler in ((None, False), (torch.bfloat16, False), (torch.float16, True))
        for limit in ("4GiB", "8GiB", "16GiB")
        for target in (120, 512)
    ]
    rows = []
    for name, make, dtype, scaler, limit, target in cases:
        base = make()
        job = autoaccum.Job(
            base.model.cuda(), base.optimizer, base.loss, base.batch, autocast=dtype, scaler=torch.amp.GradScaler("cuda") if scaler else None, max_grad_norm=1.0
        )
        row = {"model": name, "autocast": str(dtype), "scaler": scaler, "limit": limit, "target": target}
        try:
            plan = autoaccum.tune(job, target_batch=target, memory_limit=limit)
            row["plan"] = plan.as_dict()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.set_per_process_memory_fraction((plan.budget_bytes + plan.headroom_bytes) / card.total_memory)
            before, started = torch.cuda.memory_stats(), time.perf_counter()
            loop, batch = autoaccum.Accumulator(job, plan), job.batch_of(target)
            ran = 0
            while ran < windows and time.perf_counter() - started < 15:
                loop.step(batch)
                ran += 1
            torch.cuda.synchronize()
            after = torch.cuda.memory_stats()
            row |= {"windows": ran, "samples_per_second": ran * target / (time.perf_counter() - started), "max_reserved": torch.cuda.max_memory_reserved()}
            row |= {key: after[key] - before[key] for key in ("num_ooms", "num_alloc_retries")}
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        rows.append(row)
        del base, job
        click.echo(json.dumps({key: value for key, value in row.items() if key != "plan"}))
        output.write_text(json.dumps({"schema": "autoaccum.gpu_survive/1", "machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
