"""On a CUDA card: the loop beside a hand-written one, feeding from the host with and without overlap, and a rescue. Raw JSON out.

    python benchmarks/gpu/loop.py --output benchmarks/results/gpu_loop.json

Records the card, the driver and the torch version. Takes about two minutes; needs no network.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import click
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also where the package is not installed

import autoaccum
from autoaccum.data import batches, prefetch
from autoaccum.plan.arithmetic import micro_batches
from autoaccum.plan.plan import Plan
from autoaccum.plan.record import PlannedDevice
from autoaccum.window.start import WindowStart

MIB = 2**20


def plan(target: int, micro_batch: int) -> Plan:
    sizes = micro_batches(target, -(-target // micro_batch))
    here = PlannedDevice("cuda", "card", None, 0, 0, 0)
    return Plan(target, sizes[0], len(sizes), sizes, target, (target,), 0, 1, sizes[0], None, here, {}, 2**40, 0, None, 0, None, (), 0.0, {}, "")


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def conv(channels: int) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, channels), (channels, channels), (channels, 2 * channels), (2 * channels, 2 * channels)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * channels, 10)).cuda()


def seconds_of(windows: dict[str, object], rounds: int, warm_up: int = 5) -> dict[str, float]:
    """Median seconds of each, device idle before and after, interleaved."""
    took: dict[str, list[float]] = {name: [] for name in windows}
    for number in range(rounds + warm_up):
        for name, window in windows.items():
            torch.cuda.synchronize()
            started = time.perf_counter()
            window()
            torch.cuda.synchronize()
            if number >= warm_up:
                took[name].append(time.perf_counter() - started)
    return {name: statistics.median(each) for name, each in took.items()}


def overhead(channels: int, side: int, samples: int, rounds: int) -> dict[str, float]:
    """Windows of 8 on data that lies on the card: what the loop itself costs."""
    steps = 8
    data = torch.randn(steps * samples, 3, side, side, device="cuda"), torch.randint(0, 10, (steps * samples,), device="cuda")
    model = conv(channels)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    loop = autoaccum.Accumulator(model, optimizer, plan(steps * samples, samples))

    def by_hand():
        for piece in zip(*(each.split(samples) for each in data)):
            (loss(model, piece) / steps).backward()
        optimizer.step()
        optimizer.zero_grad()

    found = seconds_of({"by hand": by_hand, "autoaccum": lambda: loop.step(data, loss)}, rounds)
    return {name: each / steps * 1e6 for name, each in found.items()}


def overlap(samples: int, side: int, channels: int, rounds: int) -> dict[str, object]:
    """Windows of 8 from the host's pageable and pinned memory: copied ahead, or each when its turn comes; samples per second."""
    steps = 8
    pageable = torch.randn(steps * samples, 3, side, side), torch.randint(0, 10, (steps * samples,))
    pinned = tuple(each.pin_memory() for each in pageable)
    model = conv(channels)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    loop = autoaccum.Accumulator(model, optimizer, plan(steps * samples, samples))
    ahead = prefetch.feed

    def with_feed(feed, data):
        def window():
            prefetch.feed = feed
            try:
                loop.step(data, loss)
            finally:
                prefetch.feed = ahead

        return window

    def in_turn(pieces, device):
        return ((batches.move(piece, device), size) for piece, size in pieces)

    on_card = tuple(each.cuda() for each in pageable)
    found = seconds_of(
        {
            "on the card": with_feed(ahead, on_card),
            "pinned, ahead": with_feed(ahead, pinned),
            "pinned, in turn": with_feed(in_turn, pinned),
            "pageable, ahead": with_feed(ahead, pageable),
            "pageable, in turn": with_feed(in_turn, pageable),
        },
        rounds,
    )
    mib = sum(each.nbytes for each in pageable) / MIB
    return {"window_mib": mib, "samples_per_second": {name: steps * samples / each for name, each in found.items()}}


class Hungry(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, inputs):
        return (inputs.mean() + self.weight * torch.ones(len(inputs), 4 * MIB, device=inputs.device)).exp().mean()


def rescue() -> dict[str, object]:
    """A neighbour's gigabytes, played by the cap, arrive in mid-training."""
    model = Hungry().cuda()
    loop = autoaccum.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.0), plan(128, 128))
    batch = torch.randn(128, 4)

    def step(batch=batch):
        torch.cuda.synchronize()
        started = time.perf_counter()
        result = loop.step(batch, lambda model, batch: model(batch))
        torch.cuda.synchronize()
        return result, time.perf_counter() - started

    before = [step() for _ in range(5)]
    held = torch.cuda.memory_allocated()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(2500 * MIB / total)
    try:
        result, seconds = step()
        after = [step() for _ in range(5)]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return {
        "line": str(result.rescued),
        "kept_bytes": result.rescued.kept_bytes if result.rescued else None,
        "allocated_before_and_after": [held, torch.cuda.memory_allocated()],
        "window_seconds": {
            "before": statistics.median(each for _, each in before),
            "rescued": seconds,
            "after": statistics.median(each for _, each in after),
        },
    }


def snapshot() -> dict[str, float]:
    """Noting a window's start with ResNet-50's BatchNorm layers on the card: microseconds until it returns, and until it is done."""
    widths = [64]
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        widths += [width, width, 4 * width] * blocks + [4 * width]
    model = nn.Sequential(*(nn.BatchNorm2d(width) for width in widths)).cuda()
    start = WindowStart([autoaccum.Job(model, torch.optim.SGD(model.parameters(), lr=0.1), loss, ())])
    returned, done = [], []
    for _ in range(300):
        torch.cuda.synchronize()
        began = time.perf_counter()
        start.note()
        returned.append(time.perf_counter() - began)
        torch.cuda.synchronize()
        done.append(time.perf_counter() - began)
    return {"returned_microseconds": statistics.median(returned) * 1e6, "done_microseconds": statistics.median(done) * 1e6}


@click.command()
@click.option("--output", type=click.Path(path_type=Path), required=True)
def main(output: Path) -> None:
    card = torch.cuda.get_device_properties(0)
    driver = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, check=False).stdout.strip()
    document: dict[str, object] = {
        "machine": {"card": card.name, "total_bytes": card.total_memory, "driver": driver, "torch": torch.__version__, "python": platform.python_version()}
    }
    parts = {
        "microseconds_per_micro_step_small": lambda: overhead(4, 8, 4, 60),
        "microseconds_per_micro_step_large": lambda: overhead(64, 64, 32, 30),
        "overlap_light_compute": lambda: overlap(256, 128, 4, 10),
        "overlap_heavy_compute": lambda: overlap(64, 128, 64, 8),
        "rescue": rescue,
        "snapshot_of_resnet50": snapshot,
    }
    for name, part in parts.items():
        document[name] = part()
        output.write_text(json.dumps(document, indent=2) + "\n")  # a time limit loses only what has not run
        print(name, json.dumps(document[name]))


if __name__ == "__main__":
    main()
