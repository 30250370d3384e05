"""The virtual GPU beside a real one. Predictions first, on any machine, and committed; then the card.

    python benchmarks/gpu/virtual.py predict --output benchmarks/results/gpu_virtual_predictions.json
    python benchmarks/gpu/virtual.py measure --output benchmarks/results/gpu_virtual.json

`measure` needs a CUDA card and no network, and takes under ten minutes on a large one. It has five parts; each row is written
as soon as it is there, and a run that was cut short goes on where it stopped.

A  The allocator alone: recorded events of real jobs and of random ones, replayed: allocated after every event, and every
   segment that is made or released, must agree to the byte.
B  What kernels take unseen: the recorded blocks of a job that the trace does not have, by size.
C  Constants: context, cuBLAS workspace, bandwidth and operations per second, as `autoaccum profiles record` writes them.
D  End to end: peak allocated, reserved and as the driver sees it, beside the prediction.
E  The boundary: the largest micro-batch under caps of 4 to 40 GiB, every probe in a fresh process, beside the prediction.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))
MIB, GIB = 2**20, 2**30

MODELS = ("mlp", "conv", "gpt", "vit")
BATCHES = {"mlp": (256, 4096), "conv": (16, 64), "gpt": (2, 8), "vit": (16, 64)}
WAYS = ("sgd-fp32", "adam-fp32", "adam-bf16", "fused-bf16")
CAPS_GIB = (4, 8, 16, 24, 40)


def job(model: str, way: str):
    """One of the jobs, on the CPU, with weights that nobody fills."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    import autoaccum

    def images(n=2, size=224):
        return torch.zeros(n, 3, size, size), torch.zeros(n, dtype=torch.long)

    def classes(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    if model == "mlp":
        net: nn.Module = nn.Sequential(nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 1000))
        batch: Any = (torch.zeros(2, 1024), torch.zeros(2, dtype=torch.long))
        loss = classes
    elif model == "conv":
        net, batch, loss = residual(), images(), classes
    elif model == "vit":
        net, batch, loss = transformer(768, 12, 12, patches=True), images(), classes
    else:
        net, batch = transformer(768, 12, 12, words=50304, length=1024), torch.zeros(2, 1025, dtype=torch.long)

        def loss(model, ids):
            return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    optimizer, dtype = way.split("-")
    parameters = net.parameters()
    made = (
        torch.optim.SGD(parameters, lr=1e-3, momentum=0.9) if optimizer == "sgd" else torch.optim.AdamW(parameters, lr=1e-4, fused=optimizer == "fused" or None)
    )
    return autoaccum.Job(net, made, loss, batch, autocast=torch.bfloat16 if dtype == "bf16" else None)


def residual():
    """ResNet-50's layout, written out."""
    from torch import nn

    class Block(nn.Module):
        def __init__(self, inputs, width, stride):
            super().__init__()
            outputs = 4 * width
            self.path = nn.Sequential(
                nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
                nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
                nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
            )  # fmt: skip
            same = stride == 1 and inputs == outputs
            self.short = nn.Identity() if same else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x):
            return self.relu(self.path(x) + self.short(x))

    layers: list[Any] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512))):
        for block in range(blocks):
            layers.append(Block(inputs, width, 2 if stage and not block else 1))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))


def transformer(width, depth, heads, *, words=1000, length=197, patches=False):
    """GPT-2's or ViT-B's layout, written out."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

        def forward(self, x):
            n, t, w = x.shape
            q, k, v = self.qkv(self.one(x)).view(n, t, 3, heads, w // heads).permute(2, 0, 3, 1, 4)
            x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=not patches).transpose(1, 2).reshape(n, t, w))
            return x + self.mlp(self.two(x))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, width, 16, 16) if patches else nn.Embedding(words, width)
            self.places = nn.Embedding(length, width)
            self.layers, self.norm, self.head = nn.Sequential(*(Layer() for _ in range(depth))), nn.LayerNorm(width), nn.Linear(width, words, bias=False)

        def forward(self, x):
            x = self.first(x).flatten(2).transpose(1, 2) if patches else self.first(x)
            x = self.norm(self.layers(x + self.places(torch.arange(x.shape[1], device=x.device))))
            return self.head(x.mean(1) if patches else x)

    return Model()


# -- predictions, on any machine --


def predict(card: str) -> dict[str, Any]:
    from autoaccum import phantom, profiles, simulation
    from autoaccum.reading import Limits
    from autoaccum.simulate import fake
    from autoaccum.simulate.allocator import Allocator
    from autoaccum.simulate.tape import replay

    fake.enable()
    profile = profiles.load(card)
    peaks, boundaries = [], []
    for model in MODELS:
        for way in WAYS:
            with phantom.unfilled():
                made = job(model, way)
            simulated = simulation.Simulation([made], profile, Limits(headroom=0))
            for batch in BATCHES[model]:
                tape = simulated._on_card(simulated._traced.exactly(simulated._card, (batch, batch)))
                ran = replay(tape, Allocator())
                peaks.append({"model": model, "way": way, "batch": batch, "allocated": ran.peak_allocated_bytes, "reserved": ran.peak_reserved_bytes})
            for cap in CAPS_GIB:
                limit = cap * GIB
                simulated.use(dataclasses.replace(profile, total=dataclasses.replace(profile.total, value=limit), context=profiles.of_size(limit).context))
                most = [simulated._most(partial(stays_below, simulated, limit)), simulated._most(simulated._survives)]
                boundaries.append({"model": model, "way": way, "cap_gib": cap, "largest": most[0], "hard_largest": most[1]})
            simulated.use(profile)
    return {"schema": "autoaccum.gpu_virtual_predictions/1", "card": card, "commit": commit(), "peaks": peaks, "boundaries": boundaries}


def stays_below(simulated: Any, limit: int, size: int) -> bool:
    return simulated._peak(size, 2) <= limit


# -- on the card --


def events_of(snapshot: dict[str, Any]) -> list[tuple[str, int, int]]:
    """(action, address, bytes) of the first device's trace, in order; a free counts when it is complete."""
    names = {"alloc": "alloc", "free_completed": "free", "segment_alloc": "segment_alloc", "segment_free": "segment_free"}
    names |= {"segment_map": "segment_map", "segment_unmap": "segment_unmap"}
    return [(names[each["action"]], each["addr"], each["size"]) for each in snapshot["device_traces"][0] if each["action"] in names]


def replayed(events: list[tuple[str, int, int]], allocator: Any) -> dict[str, Any]:
    """Runs recorded requests and frees through the simulated allocator; says where the two first part."""
    made: list[tuple[str, int]] = []
    allocator.observer = lambda action, address, size: made.append((f"segment_{action}", size))
    real: list[tuple[str, int]] = []
    blocks: dict[int, Any] = {}
    asked = 0
    for at, (action, address, size) in enumerate(events):
        if action == "alloc":
            blocks[address] = allocator.malloc(size)
            asked += 1
        elif action == "free":
            if address in blocks:
                allocator.free(blocks.pop(address))
        else:
            real.append((action, size))
            continue
        if action == "alloc" and made != real:  # the card tells of a segment before the block that needed it
            return {"exact": False, "event": at, "requests": asked, "simulated": made[-3:], "real": real[-3:]}
    return {"exact": made == real, "event": None, "requests": asked, "segments": len(real), "peak_reserved": allocator.peak_reserved_bytes}


def measure(output: Path, predictions: Path) -> None:
    done: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {}
    told = json.loads(predictions.read_text()) if predictions.exists() else {"peaks": [], "boundaries": []}
    if "machine" not in done:
        done.update(schema="autoaccum.gpu_virtual/1", machine=machine(), commit=commit(), predictions_commit=told.get("commit"), rows={})

    def row(key: str, arguments: list[str], timeout: int = 120, environment: dict[str, str] | None = None) -> Any:
        if key not in done["rows"]:
            ran = subprocess.run(
                [sys.executable, __file__, *arguments], capture_output=True, text=True, timeout=timeout, env={**os.environ, **(environment or {})}, check=False
            )
            lines = [line for line in ran.stdout.splitlines() if line.startswith("{")]
            done["rows"][key] = json.loads(lines[-1]) if lines else {"error": (ran.stderr or ran.stdout)[-500:], "code": ran.returncode}
            output.write_text(json.dumps(done, indent=1) + "\n")
        return done["rows"][key]

    row("C constants", ["part", "constants"])
    for name, conf in {
        "default": "",
        "max split": "max_split_size_mb:64",
        "rounded": "roundup_power2_divisions:4",
        "expandable": "expandable_segments:True",
    }.items():
        row(f"A random, {name}", ["part", "random"], environment={"PYTORCH_CUDA_ALLOC_CONF": conf} if conf else None)
        row(f"A gpt, {name}", ["part", "allocator", "gpt", "adam-bf16", "4"], environment={"PYTORCH_CUDA_ALLOC_CONF": conf} if conf else None)
    for model in MODELS:
        row(f"B {model}", ["part", "unseen", model, "adam-fp32", str(BATCHES[model][0])])
    for each in told["peaks"]:
        row(f"D {each['model']} {each['way']} {each['batch']}", ["part", "peak", each["model"], each["way"], str(each["batch"])])
    for each in told["boundaries"]:
        if each["way"] != "adam-bf16" or not each["largest"]:
            continue
        name = f"{each['model']} {each['way']} {each['cap_gib']}"
        low, high = 0, None
        size = each["hard_largest"]
        step = max(size // 32, 1)
        while high is None or high - low > max(low // 100, 1):  # to one in a hundred
            fits = row(f"E {name} {size}", ["part", "fits", each["model"], each["way"], str(size), str(each["cap_gib"])]).get("fits", False)
            low, high = (size, high) if fits else (low, size)
            size = low + step if high is None else (low + high) // 2 if low else max(size - step, 1)
            step *= 2
            if high == 1:
                break
        done.setdefault("boundaries", {})[name] = {"largest": low, "predicted_hard": each["hard_largest"], "predicted": each["largest"]}
        output.write_text(json.dumps(done, indent=1) + "\n")


def part(name: str, arguments: list[str]) -> dict[str, Any]:
    """One measurement, in this process, on the card."""
    import torch

    from autoaccum import phantom, profiles, recording
    from autoaccum.simulate.allocator import Allocator
    from autoaccum.simulate.settings import from_environment

    if name == "constants":
        return profiles.document(recording.record("cuda"))
    if name == "random":
        chance, exact, tried = random.Random(7), 0, []
        for _ in range(50):
            torch.cuda.empty_cache()
            torch.cuda.memory._record_memory_history(context=None, max_entries=100_000)
            alive: list[Any] = []
            for _ in range(300):
                if alive and chance.random() < 0.45:
                    alive.pop(chance.randrange(len(alive)))
                else:
                    alive.append(torch.empty(int(2 ** chance.uniform(0, 29)), dtype=torch.uint8, device="cuda"))
            events = events_of(torch.cuda.memory._snapshot())
            torch.cuda.memory._record_memory_history(enabled=None)
            alive.clear()
            found = replayed(events, Allocator(settings=from_environment()))
            exact += found["exact"]
            tried.append(found)
        return {"exact": exact, "of": len(tried), "first_wrong": next((each for each in tried if not each["exact"]), None)}
    model, way, batch = arguments[0], arguments[1], int(arguments[2])
    if name == "fits":
        torch.cuda.set_per_process_memory_fraction(min(int(arguments[3]) * GIB / torch.cuda.get_device_properties(0).total_memory, 1.0))
    if name in ("allocator", "unseen"):
        torch.cuda.memory._record_memory_history(context=None, max_entries=1_000_000)
    made = job(model, way).moved("cuda")
    torch.cuda.reset_peak_memory_stats()
    try:
        ran(made, batch)
    except torch.OutOfMemoryError:
        return {"fits": False}
    if name == "fits":
        return {"fits": True, "retries": torch.cuda.memory_stats()["num_alloc_retries"]}
    if name == "peak":
        free, total = torch.cuda.mem_get_info()
        stats = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved(), "driver_used": total - free}
        return {"model": model, "way": way, "batch": batch, **stats}
    events = events_of(torch.cuda.memory._snapshot())
    if name == "allocator":
        return replayed(events, Allocator(settings=from_environment()))
    # Unseen: sizes of recorded blocks that the trace of the same job does not have.
    del made
    from autoaccum.job import in_turn
    from autoaccum.simulate import fake
    from autoaccum.simulate.kernels import Card

    fake.enable()
    with phantom.unfilled():
        again = in_turn(job(model, way))
    major, minor = torch.cuda.get_device_capability()
    tape = phantom.Phantom(again).tape([[batch], [batch, batch]], Card(10 * major + minor, 1))
    from collections import Counter

    real = Counter(size for action, _, size in events if action == "alloc" and size > 512)
    seen = Counter(size for size, kind in zip(tape.sizes, tape.kinds) if kind != "workspace" and size > 512)
    matched = sum(min(count, seen[size]) * size for size, count in real.items())
    missing, extra = real - seen, seen - real
    return {
        "bytes": sum(size * count for size, count in real.items()),
        "matched_bytes": matched,
        "unseen": sorted(([size, count] for size, count in missing.items()), reverse=True)[:40],
        "not_there": sorted(([size, count] for size, count in extra.items()), reverse=True)[:40],
    }


def ran(made: Any, batch: int) -> None:
    """The windows of a trial: one micro-batch and a step, then two and a step."""
    import torch

    from autoaccum import batches, window

    device = torch.device("cuda", 0)
    whole = batches.resize(made.batch, batch)
    for pieces in (1, 2):
        window.run(made, made.loss, [(whole, batch)] * pieces, samples=batch * pieces, device=device)
    torch.cuda.synchronize()


def machine() -> dict[str, Any]:
    import torch

    from autoaccum.devices import nvml

    return {
        "card": torch.cuda.get_device_name(0),
        "driver": nvml.driver_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "when": time.strftime("%Y-%m-%d"),
    }


def commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False)
    return found.stdout.strip() or "unknown"


def main() -> None:
    if sys.argv[1:2] == ["part"]:
        print(json.dumps(part(sys.argv[2], sys.argv[3:])))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("verb", choices=["predict", "measure"])
    parser.add_argument("--card", default="h200")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--predictions", type=Path, default=ROOT / "benchmarks/results/gpu_virtual_predictions.json")
    given = parser.parse_args()
    if given.verb == "predict":
        given.output.write_text(json.dumps(predict(given.card), indent=1) + "\n")
    else:
        measure(given.output, given.predictions)


if __name__ == "__main__":
    main()
