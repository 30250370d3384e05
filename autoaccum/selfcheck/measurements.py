"""The measurements of the self-check. Each runs in a process of its own and returns what it found.

A measurement returns a dict: "outcome" is "good" or "off" where there is something to judge, "told" where there is only a figure; "said" is
one sentence; all else are figures, bytes and seconds.
"""

from __future__ import annotations

import copy
import json
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from autoaccum import devices
from autoaccum.loop import Accumulator
from autoaccum.plan import Plan
from autoaccum.probe import own_program
from autoaccum.selfcheck.jobs import MAKERS
from autoaccum.simulate import profiles
from autoaccum.tuner import tune
from autoaccum.units import GIB, MIB, in_words
from autoaccum.window import Job

Found = dict[str, Any]

_TARGET = {False: 96, True: 12}
_LIMIT = {False: 6 * GIB, True: 3 * GIB}
_SIZES = {False: (8, 32), True: (2,)}
_NAMES = {False: tuple(MAKERS), True: ("mlp",)}
_PEAKS_AGREE = 0.05  # reserved peaks of convolutional nets are within this on the card that the rules come from
_WINDOWS = 50


def profile(label: str, tiny: bool) -> Found:
    """The card's own figures: memory, context, speeds."""
    if tiny:
        return {"outcome": "told", "said": "not measured: this is no card", "profile": {}}
    measured = devices.calibrate(label)
    document = profiles.document(measured)
    return {"outcome": "told", "said": f"{measured.name}, {in_words(measured.total.value)}, context {in_words(measured.context.value)}", "profile": document}


def peaks(label: str, tiny: bool) -> Found:
    """The measured peak of each job at two sizes beside the simulated one."""
    rows: list[dict[str, Any]] = []
    virtual = _virtual(label, tiny)
    for name in _NAMES[tiny]:
        for size in _SIZES[tiny]:
            measured, simulated = (_command("check", name, tiny, "-d", where, "-b", 2 * size, "-m", size) for where in (label, virtual))
            rows.append({"job": name, "micro_batch": size, "measured": measured.get("peak_bytes"), "simulated": simulated.get("peak_bytes")})
    errors = [abs(row["simulated"] / row["measured"] - 1) for row in rows if row["simulated"] and row["measured"]]
    worst = max(errors, default=None)
    said = (
        "no peak was measured" if worst is None else f"{len(errors)} simulated peaks, {statistics.median(errors):.1%} off in the median, the worst {worst:.1%}"
    )
    return {"outcome": _good(worst is not None and worst <= _PEAKS_AGREE), "said": f"{said} (simulated as {virtual})", "rows": rows}


def plans(label: str, tiny: bool) -> Found:
    """The plan of each job under a limit on this card beside the simulated one, and whether one more sample than the largest really does not fit."""
    rows: list[dict[str, Any]] = []
    virtual = _virtual(label, tiny)
    for name in _NAMES[tiny]:
        given = ("-b", _TARGET[tiny], "--memory-limit", _LIMIT[tiny], "--no-cache")
        measured, simulated = (_command("tune", name, tiny, "-d", where, *given) for where in (label, virtual))
        largest = measured.get("largest_fit") or 0
        refused = measured.get("smallest_refused")
        rows.append(
            {
                "job": name,
                "measured_steps": measured.get("accumulation_steps"),
                "simulated_steps": simulated.get("accumulation_steps"),
                "largest_fit": largest,
                "smallest_refused": refused,
                "seconds": measured.get("seconds"),
                "trials": len(measured.get("trials", ())),
            }
        )
    alike = sum(row["measured_steps"] is not None and row["measured_steps"] == row["simulated_steps"] for row in rows)
    seconds = [row["seconds"] for row in rows if row["seconds"]]
    return {
        "outcome": _good(alike == len(rows)),
        "said": f"{alike} of {len(rows)} plans under {in_words(_LIMIT[tiny])} take the steps that were simulated; found in {max(seconds, default=0):.1f} s at most",
        "rows": rows,
    }


def exact(label: str, tiny: bool) -> Found:
    """The gradient of a split batch beside that of the whole one, in double precision."""
    errors = {}
    for name in ("mlp", "decoder"):
        job = MAKERS[name](True)
        model = job.model.double().to(label)
        inputs, targets = (each.to(label) for each in job.batch_of(24))
        inputs = inputs.double() if inputs.is_floating_point() else inputs
        whole = copy.deepcopy(model)
        job.loss(whole, (inputs, targets)).backward()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        accumulator = Accumulator(model, optimizer, _plan(model, optimizer, job.loss, (inputs, targets), 24, 7))
        kept: list[torch.Tensor] = []
        optimizer.register_step_pre_hook(lambda *_, model=model, kept=kept: kept.extend(_gradients(model)))
        accumulator.step((inputs, targets), job.loss)
        pairs = [(ours, theirs) for ours, theirs in zip(kept, _gradients(whole)) if theirs.norm() > 0]
        errors[name] = max(float((ours - theirs).norm() / theirs.norm()) for ours, theirs in pairs)
    worst = max(errors.values())
    return {"outcome": _good(worst < 1e-12), "said": f"gradients in micro-batches are the whole batch's to {worst:.0e}", "relative_errors": errors}


def loop(label: str, tiny: bool) -> Found:
    """What a micro-step of our loop takes beside one by hand, on data that lies on the card."""
    steps, samples = 8, 2 if tiny else 16
    job = MAKERS["conv"](tiny)
    model = job.model.to(label)
    data = tuple(each.to(label) for each in job.batch_of(steps * samples))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    accumulator = Accumulator(model, optimizer, _plan(model, optimizer, job.loss, data, steps * samples, samples))

    def by_hand() -> None:
        for piece in zip(*(each.split(samples) for each in data)):
            (job.loss(model, piece) / steps).backward()
        optimizer.step()
        optimizer.zero_grad()

    found = _seconds(label, {"by hand": by_hand, "autoaccum": lambda: accumulator.step(data, job.loss)}, 3 if tiny else 30)
    more = found["autoaccum"] / found["by hand"] - 1
    return {"outcome": "told", "said": f"a window of {steps} takes {more:+.1%} beside one by hand ({found['by hand'] * 1e3:.1f} ms)", "seconds": found}


def copies(label: str, tiny: bool) -> Found:
    """Windows whose samples come from the host beside windows whose samples lie on the card."""
    steps, samples = 8, 2 if tiny else 32
    job = MAKERS["conv"](tiny)
    model = job.model.to(label)
    pageable = job.batch_of(steps * samples)
    places = {"on the device": tuple(each.to(label) for each in pageable), "pageable": pageable}
    if label.startswith("cuda"):
        places["pinned"] = tuple(each.pin_memory() for each in pageable)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    accumulator = Accumulator(model, optimizer, _plan(model, optimizer, job.loss, pageable, steps * samples, samples))
    found = _seconds(label, {name: partial(accumulator.step, data, job.loss) for name, data in places.items()}, 3 if tiny else 20)
    slowest = max(found.values()) / found["on the device"] - 1
    return {"outcome": "told", "said": f"feeding from the host takes {slowest:+.1%} beside samples that lie on the card", "seconds": found}


def rescue(label: str, tiny: bool) -> Found:
    """Memory runs out in mid-training, as a lower limit has it; weights afterwards beside those of an undisturbed run in the same micro-batches."""
    device = devices.get(label)
    device.prepare()
    per_sample = (1 if tiny else 16) * MIB
    results: list[tuple[torch.Tensor, int, Any]] = []
    for runs_out in (True, False):
        torch.manual_seed(0)
        model = _Hungry(per_sample).to(label)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        batch = torch.linspace(0, 1, 64).unsqueeze(1)
        steps = results[0][1] if results else 1
        accumulator = Accumulator(model, optimizer, _plan(model, optimizer, _own, batch, 64, -(-64 // steps)))
        device.release()
        if runs_out:
            with device.capped(device.held_bytes() + 60 * per_sample):
                told = accumulator.step(batch, _own)
        else:
            told = accumulator.step(batch, _own)
        results.append((model.weight.detach().cpu().clone(), told.micro_batches, told.rescued))
    (ours, pieces, rescued), (undisturbed, _, _) = results
    difference = float((ours - undisturbed).abs().max())
    good = rescued is not None and difference == 0
    said = f"a window that ran out ran again in {pieces} micro-batches" if rescued is not None else "no memory ran out, so nothing was rescued"
    return {
        "outcome": _good(good),
        "said": f"{said}; weights differ by {difference:.0e} from an undisturbed run",
        "rescued": str(rescued),
        "difference": difference,
    }


def windows(label: str, tiny: bool) -> Found:
    """Whole windows at a plan, under its budget: none may run out, and the allocator should not have to flush its cache."""
    device = devices.get(label)
    job = MAKERS["decoder"](tiny).moved(label)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = tune(job, target_batch=_TARGET[tiny], memory_limit=_LIMIT[tiny])
    accumulator, batch = Accumulator(job, plan), job.batch_of(_TARGET[tiny])
    rescued = 0
    with device.capped(plan.budget_bytes), device.watch() as watch:
        for _ in range(4 if tiny else _WINDOWS):
            rescued += accumulator.step(batch).rescued is not None
        peak, retries = watch.peak_bytes(), watch.retries()
    good = not rescued and not retries
    count = 4 if tiny else _WINDOWS
    return {
        "outcome": _good(good),
        "said": f"{count} windows of {plan.micro_batch} x {plan.accumulation_steps} under {in_words(plan.budget_bytes)}: {rescued} ran out, "
        f"{retries} flushes of the allocator's cache",
        "peak_bytes": peak,
        "planned_peak_bytes": plan.peak_bytes,
        "retries": retries,
        "rescued": rescued,
    }


MEASUREMENTS: dict[str, Callable[[str, bool], Found]] = {
    each.__name__: each for each in (profile, exact, windows, rescue, plans, peaks, loop, copies)
}  # what says most comes first, for a run that is cut short


class _Hungry(nn.Module):
    def __init__(self, per_sample: int) -> None:
        super().__init__()
        self.weight, self._elements = nn.Parameter(torch.ones(1)), per_sample // 4

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return (self.weight * inputs.expand(len(inputs), self._elements)).exp().mean()


def _gradients(model: nn.Module) -> list[torch.Tensor]:
    return [each.grad.detach().clone() for each in model.parameters() if each.grad is not None]


def _own(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(batch)
    return loss


def _plan(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Any, batch: Any, target: int, micro_batch: int) -> Plan:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tune(Job(model, optimizer, loss, batch), target_batch=target, max_micro_batch=micro_batch)


def _seconds(label: str, runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, in turn, with the device idle before and after."""
    device = devices.get(label)
    took: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 3):
        for name, run in runs.items():
            device.synchronize()
            started = time.perf_counter()
            run()
            device.synchronize()
            if number >= 3:
                took[name].append(time.perf_counter() - started)
    return {name: statistics.median(each) for name, each in took.items()}


def _virtual(label: str, tiny: bool) -> str:
    """The simulated device that stands for this card: the known card of its name, else one of its size."""
    if tiny:
        return "virtual:a100-80gb"
    properties = torch.cuda.get_device_properties(torch.device(label))
    known = [name for name in profiles.names() if profiles.load(name).name == properties.name]
    return f"virtual:{known[0] if known else f'{properties.total_memory // MIB}MiB'}"


def _command(verb: str, job: str, tiny: bool, *words: object) -> dict[str, Any]:
    """What a command of ours says as JSON; without a plan there is an error in it."""
    given: Sequence[str] = [verb, f"autoaccum.selfcheck.jobs:{job}", "--set", f"tiny={tiny}", "--json", "-q", *map(str, words)]
    done = subprocess.run(own_program(f"from autoaccum.cli import main; main({given!r})"), capture_output=True, text=True, check=False)
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        return {"error": done.stderr[-500:]}
    return answer


def _good(is_good: bool) -> str:
    return "good" if is_good else "off"
