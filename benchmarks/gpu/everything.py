"""On a CUDA card, without a network: all that is to be known there, in under ten minutes, as one JSON.

    python benchmarks/gpu/everything.py --output benchmarks/results/gpu.json [--minutes 9]

Every measurement is a case of its own, in a fresh process, written as soon as it is there; a run that was cut short, or that ran out of
its minutes, goes on where it stopped. Records the card, the driver and the versions.

tune    plans under a cap of 8 GiB for a conv net and a GPT (fp32, bf16, fp16 with a scaler, checkpointed, compiled), beside an oracle
        that runs every larger size that would save a step; 30 windows trained at the plan; samples per second.
peers   the systems of `benchmarks/peers` that are installed here, on two networks under a cap of 8 GiB, beside the largest size that
        trains there; what is not installed is listed.
peak    32 cases of model, way and batch: allocated, reserved, and what the driver sees; `virtual.py` has predicted them.
loop    overhead of the loop, copies ahead, a rescue, a snapshot (`loop.py`).

`--device cpu --tiny` tries the first two parts out where there is no card.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any

import click

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent), str(HERE.parent.parent / "examples")]
GIB, MIB = 2**30, 2**20
CAP, TARGET = 8 * GIB, 512
WAYS = ("fp32", "bf16", "fp16", "checkpointed", "compiled")
PEERS = (
    ("autoaccum", "autoaccum"), ("toma", "toma"), ("torch_max_mem", "torch-max-mem"), ("accelerate", "Accelerate"), ("lightning", "Lightning, power"),
    ("lightning", "Lightning, binsearch"), ("transformers", "HF Trainer"), ("composer", "Composer"), ("textbook", "textbook"),
)  # fmt: skip


def cases() -> dict[str, list[str]]:
    """What is run, by name: a case of every part in turn, so that a short lease has of everything."""
    import virtual

    tune = {f"tune {model} {way}": ["tune", model, way] for way in WAYS for model in ("conv net", "gpt")}
    peers = {f"peers {system}, {network}": ["peer", name, system, network] for name, system in PEERS for network in ("conv net", "transformer")}
    peaks = {
        f"peak {model} {way} {batch}": ["peak", model, way, str(batch)] for model in virtual.MODELS for way in virtual.WAYS for batch in virtual.BATCHES[model]
    }
    oracles = {f"oracle {network}": ["oracle", network] for network in ("conv net", "transformer")}
    parts = [{"loop": ["loop"], **oracles}, tune, peers, peaks]
    found: dict[str, list[str]] = {}
    for row in zip_longest(*(part.items() for part in parts)):
        found |= dict(each for each in row if each is not None)
    return found


def make(model: str, way: str, tiny: bool, device: str) -> Any:
    """One of the examples' jobs, larger, on the card."""
    import conv_net
    import tiny_gpt
    import torch

    import autoaccum

    if model == "gpt":
        base = tiny_gpt.make_job() if tiny else tiny_gpt.make_job(width=512, layers=8, heads=8, length=512)
        if way == "checkpointed":
            for block in base.model.blocks:
                block.forward = _checkpointed(block.forward)
    else:
        base = conv_net.make_job() if tiny else conv_net.make_job(channels=64, side=128, samples=64)
        if way == "checkpointed":
            base.model.forward = _checkpointed(base.model.forward)
    net = base.model.to(device)
    autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(way)
    return autoaccum.Job(
        torch.compile(net) if way == "compiled" else net, base.optimizer, base.loss, base.batch, autocast=autocast, max_grad_norm=1.0,
        scaler=torch.amp.GradScaler(device) if way == "fp16" else None,
    )  # fmt: skip


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    from torch.utils.checkpoint import checkpoint

    return lambda *given: checkpoint(forward, *given, use_reentrant=False)


def tuned(model: str, way: str, tiny: bool, device: str) -> dict[str, Any]:
    """The plan, the oracle's verdict on every larger size worth trying, and windows trained at the plan."""
    import torch

    import autoaccum
    from autoaccum import batches, devices, oom, search, window
    from autoaccum.plan import micro_batches

    backend = devices.get(device)
    backend.prepare()
    target = 24 if tiny else TARGET
    limit = backend.held_bytes() + 300 * MIB if tiny else CAP
    job = make(model, way, tiny, device)
    started = time.perf_counter()
    plan = autoaccum.tune(job, target_batch=target, memory_limit=limit)
    row: dict[str, Any] = {"plan": plan.as_dict(), "tuning_seconds": time.perf_counter() - started}
    loop, batch = autoaccum.Accumulator(job, plan), job.batch_of(target)
    took: list[float] = []
    with backend.capped(plan.budget_bytes + plan.headroom_bytes), backend.watch() as watch:
        for _ in range(3 if tiny else 30):
            backend.synchronize()
            began = time.perf_counter()
            rescued = loop.step(batch).rescued
            backend.synchronize()
            took.append(time.perf_counter() - began)
            row["rescued"] = row.get("rescued") or (str(rescued) if rescued else None)
            if sum(took) > 12:
                break
        row |= {"windows": len(took), "samples_per_second": target / statistics.median(took[1:] or took), "peak_bytes": watch.peak_bytes()}
    job.optimizer.zero_grad()
    smallest = 2 if model == "conv net" else 1
    row["oracle"] = {}
    if way == "compiled":  # every size would be compiled anew, longer than a case may take
        return row
    for size in [each for each in search.sizes(target, smallest=smallest) if each >= plan.micro_batch]:
        sizes = micro_batches(target, math.ceil(target / size))
        backend.release()
        try:
            with backend.capped(plan.budget_bytes):
                for _ in range(2):
                    whole = job.batch_of(sizes[0])
                    pieces = [(batches.resize(whole, each), each) for each in sizes[:2]]
                    window.run(job, job.loss, pieces, samples=sum(each for _, each in pieces), device=torch.device(device), scaler=job.scaler)
            row["oracle"][size] = True
        except Exception as error:
            if oom.verdict(error) == "not":
                raise
            row["oracle"][size] = False
            del error
            job.optimizer.zero_grad()
    fitting = [size for size, fits in row["oracle"].items() if fits]
    row["oracle_steps"] = math.ceil(target / max(fitting)) if fitting else None
    return row


def oracle(network: str) -> dict[str, Any]:
    """The largest size of which two micro-batches train under the cap, by bisection in one process whose cache is emptied."""
    import torch
    from networks import LARGER
    from work import Work

    build, samples = LARGER[network]
    torch.cuda.set_per_process_memory_fraction(CAP / torch.cuda.get_device_properties(0).total_memory)

    def trains(size: int) -> bool:
        torch.cuda.empty_cache()
        work = Work(2 * size, 2, samples, build, place="cuda")
        try:
            work.train((size, size))
        except torch.OutOfMemoryError:
            return False
        return True

    low, high = 0, TARGET + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if trains(middle) else (low, middle)
    return {"largest": low}


def peer(name: str, system: str, network: str, tiny: bool, device: str) -> dict[str, Any]:
    """One system on the card; "missing" where its package is not here."""
    import contestant
    import torch
    from networks import LARGER, NETWORKS
    from work import Work

    adapter = contestant.adapter(name)
    build, samples = (NETWORKS if tiny else LARGER)[network]
    target, limit = (16, 0) if tiny else (TARGET, CAP)
    if limit:
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    if name == "autoaccum" and limit:  # its limit holds what the process takes beside its allocator, the others' cap does not
        from autoaccum import devices
        from autoaccum.devices.base import ASSUMED_OUTSIDE

        outside = devices.get(device).memory().outside_bytes
        limit += ASSUMED_OUTSIDE if outside is None else outside
    work = Work(target, 2 if tiny else 10, samples, build, limit_bytes=limit or contestant.held("VmRSS") + GIB, place=device)
    row = contestant.outcome(adapter.run, system, work)
    return {"missing": row["error"]} if (row["error"] or "").startswith(("ModuleNotFoundError", "ImportError", "PackageNotFoundError")) else row


def one(words: list[str], tiny: bool, device: str) -> dict[str, Any]:
    """A case, in this process."""
    kind, *rest = words
    if kind == "tune":
        return tuned(rest[0], rest[1], tiny, device)
    if kind == "peer":
        return peer(rest[0], rest[1], rest[2], tiny, device)
    if kind == "oracle":
        return oracle(rest[0])
    if kind == "machine":
        return machine(device)
    if kind == "peak":
        import virtual

        return virtual.part("peak", rest)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "loop.json"
        try:
            done = subprocess.run([sys.executable, str(HERE / "loop.py"), "--output", str(output)], check=False, timeout=140, capture_output=True, text=True)
            cut_short = done.stderr.strip().splitlines()[-3:] if done.returncode else None
        except subprocess.TimeoutExpired:
            cut_short = ["took longer than 140 s"]
        found: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {}
        return found | {"cut_short": cut_short}


def machine(device: str) -> dict[str, Any]:
    """The card, the driver and the versions."""
    import torch

    told: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__, "when": time.strftime("%Y-%m-%d")}
    for package in ("accelerate", "lightning", "transformers", "toma", "torch-max-mem"):
        try:
            told[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            told[package] = None
    if device != "cpu":
        card = torch.cuda.get_device_properties(0)
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        told |= {
            "card": card.name,
            "total_bytes": card.total_memory,
            "driver": subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip(),
        }
    return told


@click.command()
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--minutes", default=9.0, show_default=True, help="No case is begun after that.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--tiny", is_flag=True, help="Small networks and targets, to try this file out.")
@click.option("--case", "words", hidden=True)
def main(output: Path, minutes: float, device: str, tiny: bool, words: str | None) -> None:
    if words is not None:
        output.write_text(json.dumps(one(json.loads(words), tiny, device)))
        return
    ends = time.monotonic() + 60 * minutes
    document = json.loads(output.read_text()) if output.exists() else {"schema": "autoaccum.gpu/1", "cap_bytes": CAP, "target": TARGET, "rows": {}}

    def ran(case: list[str]) -> dict[str, Any]:
        left = min(160.0, ends - time.monotonic())
        with tempfile.NamedTemporaryFile("r", suffix=".json") as answer:
            command = [sys.executable, __file__, "--output", answer.name, "--device", device, "--case", json.dumps(case), *(["--tiny"] if tiny else [])]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=left, check=False)
            except subprocess.TimeoutExpired:
                return {"failed": [f"took longer than {left:.0f} s"], "out_of_time": left < 160}
            text = Path(answer.name).read_text()
            told: dict[str, Any] = (
                json.loads(text) if done.returncode == 0 and text else {"failed": done.stderr.strip().splitlines()[-3:], "code": done.returncode}
            )
            return told

    here = ran(["machine"])  # in a process of its own: a context in this one would be in what the driver sees
    if document.setdefault("machine", here).get("card") != here.get("card"):
        raise click.ClickException(f"{output} was begun on {document['machine'].get('card')}, this is {here.get('card')}: give another output")
    for name, case in cases().items():
        known = document["rows"].get(name, {"out_of_time": True})
        if not (known.get("out_of_time") or known.get("missing")) or (device == "cpu" and case[0] in ("peak", "loop", "oracle")):
            continue
        if time.monotonic() > ends - 5:
            click.echo(f"{minutes:g} minutes are over; run it again to go on from {name}")
            break
        row = document["rows"][name] = ran(case)
        beside = output.with_suffix(".new")  # a run that is killed leaves a whole file
        beside.write_text(json.dumps(document, indent=1) + "\n")
        beside.replace(output)
        told = {key: row.get(key) for key in ("micro_batch", "samples_per_second", "missing", "failed", "reserved") if row.get(key)}
        click.echo(f"{ends - time.monotonic():5.0f} s left  {name}  {told}")


if __name__ == "__main__":
    main()
