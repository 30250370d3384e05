"""The output of the command line: reports, tables and JSON documents."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from typing import Any

from autoaccum.devices import STEADY_MALLOC, Facts, Memory, steady_wanted
from autoaccum.errors import AutoaccumError, JobFailed, NothingFits
from autoaccum.plan import Plan, window_notation
from autoaccum.probe import Reading
from autoaccum.simulate import Profile
from autoaccum.tuner import ChangedPlan
from autoaccum.units import in_words, number, unit_for

DEMO_INTRO = "demo: the 8-16-1 network of the classic tutorial, 1200 samples, SGD; its learning rate stays as it is"


def text(plan: Plan) -> str:
    """The plan in words. The plan of the built-in demo gets an introduction."""
    lines = [plan.explain()]
    if plan.job == "demo":
        lines.insert(0, DEMO_INTRO)
        if plan.accumulation_steps == 1:
            lines.append(
                f"hint: all {plan.target_batch} fit at once: try --max-micro-batch 40, or a model of your own: autoaccum tune train.py:make_job -b {plan.target_batch}"
            )
    return "\n".join(lines)


def as_json(document: Any) -> str:
    """The document as JSON that strict parsers accept: nan and infinite figures become null."""
    return json.dumps(_finite(document), indent=2, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def env(plan: Plan) -> str:
    """Shell assignments of the plan. On a CPU also the two settings of glibc's allocator that the trials had."""
    values = {
        "AUTOACCUM_TARGET_BATCH": str(plan.target_batch),
        "AUTOACCUM_MICRO_BATCH": str(plan.micro_batch),
        "AUTOACCUM_ACCUMULATION_STEPS": str(plan.accumulation_steps),
        "AUTOACCUM_MICRO_BATCHES": " ".join(map(str, plan.micro_batches)),
    }
    if plan.world_size > 1:
        values["AUTOACCUM_WORLD_SIZE"] = str(plan.world_size)
    if plan.target_tokens is not None:
        values |= {"AUTOACCUM_TARGET_TOKENS": str(plan.target_tokens), "AUTOACCUM_MICRO_TOKENS": str(plan.micro_tokens)}
    if plan.eval_batch is not None:
        values["AUTOACCUM_EVAL_BATCH"] = str(plan.eval_batch)
    lines = [f"export {name}={shlex.quote(value)}" for name, value in values.items()]
    if plan.device.kind == "cpu" and steady_wanted():
        lines += [f"export {name}={value}" for name, value in STEADY_MALLOC.items()]
    return "\n".join(lines)


def error(raised: AutoaccumError) -> dict[str, Any]:
    """The document of a failure, schema autoaccum.error/1."""
    name = raised.kind if isinstance(raised, JobFailed) and raised.kind else type(raised).__name__
    trials: Sequence[Any] = getattr(raised, "trials", ())
    return {
        "schema": "autoaccum.error/1",
        "error": name,
        "message": str(raised),
        "exit_code": raised.exit_code,
        "trials": [trial(reading) for reading in trials],
        **({"what_if": raised.what_if} if isinstance(raised, NothingFits) and raised.what_if else {}),
    }


def changed(rows: Sequence[ChangedPlan]) -> str:
    """The table of a job with changes, each tuned on the device that is here."""
    lines = ["what if: each measured here, the quickest first"]
    wide = max((len(row.words) for row in rows), default=0) + 2
    for row in rows:
        if row.plan is None:
            lines.append(f"  {row.words:<{wide}}{f'failed: {row.error}' if row.error else 'does not fit'}")
            continue
        per_second = row.plan.samples_per_second
        rate = "" if per_second is None else f"{per_second:,.0f} samples a second" if per_second >= 100 else f"{per_second:.3g} samples a second"
        speed = "" if row.speed is None else f", {row.speed:.2f} times as fast"
        halves = f" ({row.part:.0%} as long)" if row.part < 1 else ""
        peak = "" if row.plan.peak_bytes is None else in_words(row.plan.peak_bytes)
        lines.append(f"  {row.words:<{wide}}{window_notation(row.plan.micro_batches):<22}{peak:<11}{rate}{halves}{speed}")
    return "\n".join(lines if rows else ["what if: the job can have none of the changes that are known"])


def trial(reading: Reading) -> dict[str, Any]:
    """One trial in the documents."""
    names = ("micro_batch", "accumulation_steps", "outcome", "phase", "peak_bytes", "seconds", "cached", "full")
    return {name: getattr(reading, name) for name in names}


def profile(found: Profile) -> str:
    """One card, each number with its source."""
    lines = [f"{found.label}: {found.name}, {found.architecture}, {found.backend}"]
    for name, figure in found.figures():
        value = f"{figure.value:,} bytes, {in_words(figure.value)}" if name.endswith("bytes") else f"{figure.value:.4g}"
        lines.append(f"  {name}: {value}\n    {'estimated' if figure.estimated else 'source'}: {figure.source}")
    return "\n".join(lines)


def profiles(found: Sequence[Profile]) -> str:
    """All cards, one a line."""
    lines = [f"{'name':24}{'total':>10}  {'architecture':14}driver's name"]
    lines += [f"{card.label:24}{in_words(card.total_bytes):>10}  {card.architecture:14}{card.name}" for card in found]
    return "\n".join(lines)


def devices(found: Sequence[tuple[Facts, Memory]]) -> str:
    """A table of devices, one a line. Other processes on a device are listed below it."""
    lines = [f"{'device':8}{'total':>11}{'free':>11}{'by us':>11}  limit      name"]
    for facts, memory in found:
        unit = unit_for(memory.total_bytes)
        figures = "".join(f"{number(bytes_, unit):>7} {unit}" for bytes_ in (memory.total_bytes, memory.free_bytes, memory.ours_bytes))
        lines.append(f"{facts.label:8}{figures}  {memory.binding_limit:9}  {facts.name}")
        lines += [f"{'':8}process {process.pid}, {process.name}: {in_words(process.bytes) if process.bytes else 'holds memory'}" for process in memory.others]
    return "\n".join(lines)


def devices_document(found: Sequence[tuple[Facts, Memory]]) -> dict[str, Any]:
    """The document of `devices`, schema autoaccum.devices/1."""
    return {
        "schema": "autoaccum.devices/1",
        "devices": [
            {
                "kind": facts.kind,
                "index": facts.index,
                "name": facts.name,
                "uuid": facts.uuid,
                "total_bytes": memory.total_bytes,
                "free_bytes": memory.free_bytes,
                "ours_bytes": memory.ours_bytes,
                "others": [{"pid": process.pid, "bytes": process.bytes, "name": process.name} for process in memory.others],
                "binding_limit": memory.binding_limit,
            }
            for facts, memory in found
        ],
    }
