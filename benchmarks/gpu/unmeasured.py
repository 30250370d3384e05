"""On a CUDA card: what nobody has measured yet, one function for each question. `everything.py` runs them first.

`python benchmarks/gpu/everything.py --parts unmeasured --device cpu --tiny --output tried.json` tries them out without a card.
"""

from __future__ import annotations

import math
import os
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import autoaccum
from autoaccum import devices, oom
from autoaccum.data import batches
from autoaccum.plan.arithmetic import candidate_sizes, micro_batches
from autoaccum.window import accumulation

GIB, MIB = 2**30, 2**20


def _made(model: str, tiny: bool, device: str) -> autoaccum.Job:
    import everything

    return everything.make(model, "bf16" if model == "gpt" else "fp32", tiny, device)


def _limits(tiny: bool, device: str) -> tuple[int, int]:
    """(target, memory limit)"""
    return (24, devices.get(device).held_bytes() + 300 * MIB) if tiny else (512, 8 * GIB)


def _planned(job: autoaccum.Job, tiny: bool, device: str, **given: Any) -> tuple[Any, float]:
    target, limit = _limits(tiny, device)
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = autoaccum.tune(job, target_batch=target, memory_limit=limit, **given)
    return plan, time.perf_counter() - started


def _windows(job: autoaccum.Job, sizes: tuple[int, ...], count: int, device: str) -> tuple[list[int], list[float]]:
    """The allocator's retries and the seconds of each of `count` windows."""
    backend, retries, took = devices.get(device), [], []
    whole = job.batch_of(sizes[0])
    for _ in range(count):
        with backend.watch() as watch:
            backend.synchronize()
            began = time.perf_counter()
            pieces = [(batches.resize(whole, size), size) for size in sizes]
            accumulation.run(job, job.loss, pieces, samples=sum(sizes), device=torch.device(device), scaler=job.scaler)
            backend.synchronize()
            took.append(time.perf_counter() - began)
            retries.append(watch.retries())
    return retries, took


def retries(tiny: bool, device: str) -> dict[str, Any]:
    """Of each size above the plan's that still runs: the retries in each of 50 windows, beside what the plan's size takes."""
    job = _made("conv net", tiny, device)
    plan, _ = _planned(job, tiny, device)
    backend, rows = devices.get(device), {}
    for size in [each for each in candidate_sizes(plan.target_batch, smallest=2) if each >= plan.micro_batch][:5]:
        sizes = micro_batches(plan.target_batch, math.ceil(plan.target_batch / size))
        backend.release()
        try:
            with backend.capped(plan.budget_bytes):
                counted, took = _windows(job, sizes, 4 if tiny else 50, device)
            rows[size] = {"retries": counted, "seconds": statistics.median(took)}
        except Exception as error:
            if oom.verdict(error) == "not":
                raise
            rows[size] = {"oom": True}
            del error
            job.optimizer.zero_grad()
    return {"planned": plan.micro_batch, "rows": rows}


def graphs(tiny: bool, device: str) -> dict[str, Any]:
    """Weights after five steps of four micro-batches under `mode="reduce-overhead"`, beside eager mode: they must be the same to rounding."""
    found = {}
    for mode in (None, "default", "reduce-overhead"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 10)).to(device)
        job = autoaccum.Job(
            model if mode is None else torch.compile(model, mode=mode),
            torch.optim.SGD(model.parameters(), lr=0.1),
            lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]),
            (torch.randn(8, 64), torch.arange(8) % 10),
        )
        plan, seconds = _planned(job, True, device, max_micro_batch=6)
        loop = autoaccum.Accumulator(job, plan)
        generator = torch.Generator().manual_seed(1)
        losses = [loop.step((torch.randn(24, 64, generator=generator), torch.randint(0, 10, (24,), generator=generator))).loss for _ in range(3 if tiny else 5)]
        found[str(mode)] = (torch.cat([each.detach().cpu().flatten() for each in model.parameters()]), losses, seconds)
    eager = found["None"]
    return {
        "largest_difference": {mode: float((weights - eager[0]).abs().max()) for mode, (weights, _, _) in found.items()},
        "losses": {mode: losses for mode, (_, losses, _) in found.items()},
        "tuning_seconds": {mode: seconds for mode, (_, _, seconds) in found.items()},
    }


def benchmark_mode(tiny: bool, device: str) -> dict[str, Any]:
    """The conv net's plan with `cudnn.benchmark` beside that without, and 20 windows of each."""
    found = {}
    for is_on in (False, True):
        torch.backends.cudnn.benchmark = is_on
        job = _made("conv net", tiny, device)
        plan, seconds = _planned(job, tiny, device)
        with devices.get(device).capped(plan.budget_bytes):
            counted, took = _windows(job, plan.micro_batches, 3 if tiny else 20, device)
        found[f"benchmark={is_on}"] = {
            "micro_batch": plan.micro_batch, "steps": plan.accumulation_steps, "peak_bytes": plan.peak_bytes, "tuning_seconds": seconds, "retries": counted,
            "seconds": statistics.median(took), "warnings": list(plan.warnings),
        }  # fmt: skip
    torch.backends.cudnn.benchmark = False
    return found


def compiled(tiny: bool, device: str) -> dict[str, Any]:
    """A compiled GPT: the plan, the trials that were compiled, and how long it took."""
    job = _made("gpt", tiny, device)
    eager, _ = _planned(job, tiny, device)
    job = _made("gpt", tiny, device)
    model = torch.compile(job.model, backend="eager" if tiny else "inductor")
    plan, seconds = _planned(autoaccum.Job(model, job.optimizer, job.loss, job.batch, autocast=job.autocast), tiny, device)
    return {
        "eager_steps": eager.accumulation_steps, "steps": plan.accumulation_steps, "micro_batch": plan.micro_batch, "tuning_seconds": seconds,
        "trials": [(trial.micro_batch, trial.full, trial.outcome, trial.peak_bytes, trial.seconds) for trial in plan.trials],
    }  # fmt: skip


def throughput(tiny: bool, device: str) -> dict[str, Any]:
    """The plan with the fewest steps beside the fastest one, on both jobs."""
    found = {}
    for name in ("conv net", "gpt"):
        for objective in ("fewest-steps", "throughput"):
            plan, seconds = _planned(_made(name, tiny, device), tiny, device, objective=objective)
            found[f"{name}, {objective}"] = {
                "micro_batch": plan.micro_batch, "steps": plan.accumulation_steps, "samples_per_second": plan.samples_per_second, "tuning_seconds": seconds,
            }  # fmt: skip
    return found


def survival(situation: str, tiny: bool, device: str) -> dict[str, Any]:
    """200 windows at the plan, beside a neighbour that comes and goes, with a memory fraction that the caller has set, or with expandable segments."""
    on_card = device == "cuda"
    if situation == "expandable" and on_card:
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    if situation == "fraction" and on_card:
        torch.cuda.set_per_process_memory_fraction(6 * GIB / torch.cuda.get_device_properties(0).total_memory)
    job = _made("gpt", tiny, device)
    plan, _ = _planned(job, tiny, device)
    loop, batch = autoaccum.Accumulator(job, plan), job.batch_of(plan.target_batch)
    backend, rescued, began = devices.get(device), [], time.monotonic()
    neighbour: list[torch.Tensor] = []
    with backend.capped(plan.budget_bytes), backend.watch() as watch:
        for number in range(6 if tiny else 200):
            if situation == "neighbour" and number % 20 == 5:
                neighbour.append(torch.empty((64 if tiny else 1024) * MIB, dtype=torch.uint8, device=device))
            if situation == "neighbour" and number % 20 == 15:
                neighbour.clear()
            result = loop.step(batch)
            if result.rescued:
                rescued.append((number, str(result.rescued)))
            if time.monotonic() - began > 60:
                break
        windows, counted, peak = number + 1, watch.retries(), watch.peak_bytes()
    return {
        "windows": windows,
        "rescued": rescued,
        "retries": counted,
        "peak_bytes": peak,
        "planned_peak_bytes": plan.peak_bytes,
        "micro_batch": plan.micro_batch,
    }


def billion(tiny: bool, device: str) -> dict[str, Any]:
    """A decoder of a billion parameters with Adam: how long tuning takes, and ten windows."""
    import tiny_gpt

    base = tiny_gpt.make_job() if tiny else tiny_gpt.make_job(width=2048, layers=20, heads=16, length=512, vocabulary=8192, samples=64)
    job = autoaccum.Job(base.model.to(device), base.optimizer, base.loss, base.batch, autocast=torch.bfloat16)
    limit = _limits(tiny, device)[1] if tiny else 60 * GIB
    started = time.perf_counter()
    plan = autoaccum.tune(job, target_batch=24 if tiny else 256, memory_limit=limit)
    seconds = time.perf_counter() - started
    _, took = _windows(job, plan.micro_batches, 2 if tiny else 5, device)
    return {
        "parameters": sum(each.numel() for each in base.model.parameters()), "micro_batch": plan.micro_batch, "steps": plan.accumulation_steps, "tuning_seconds": seconds,
        "trials": len(plan.trials), "peak_bytes": plan.peak_bytes, "window_seconds": statistics.median(took),
    }  # fmt: skip


# In the order of what is to be known first.
QUESTIONS: dict[str, Callable[[bool, str], dict[str, Any]]] = {
    "retries": retries,
    "graphs": graphs,
    "benchmark mode": benchmark_mode,
    "compiled": compiled,
    "throughput": throughput,
    **{
        f"200 windows, {situation}": (lambda tiny, device, situation=situation: survival(situation, tiny, device))
        for situation in ("neighbour", "fraction", "expandable")
    },  # type: ignore[misc]
    "a billion": billion,
}
