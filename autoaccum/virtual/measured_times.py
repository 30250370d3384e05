"""Seconds that a user has measured on cards, for `fleet`: from plans of `tune -o`, or from a table."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autoaccum.distributed import AffineCurve, Timing, fitted
from autoaccum.errors import UsageError, in_brief
from autoaccum.files import Unreadable, read_text
from autoaccum.simulate import profiles

_COLUMNS = ("gpu", "micro_batch", "seconds")
_HOW = "give a plan that `autoaccum tune -o` wrote, or a table with the columns gpu,micro_batch,seconds and, if you like, window_seconds"


def read(paths: Sequence[str | Path]) -> dict[str, tuple[list[Timing], list[float]]]:
    """By the name of the card: timings of windows, and seconds of the optimizer's step (as many as were given).

    A plan is one timing: its micro-batches, its target, and the seconds of a window. A row of a table is one micro-step: seconds of forward and
    backward, and in window_seconds those of the optimizer's step.
    Raises `UsageError` for a file or a line that is neither, and for a card that is not known.
    """
    found: dict[str, tuple[list[Timing], list[float]]] = {}
    for path in paths:
        try:
            text = read_text(path)
        except Unreadable as error:
            raise UsageError(f"--times {in_brief(path)} cannot be read: {error}; {_HOW}") from None
        for gpu, timing, step_seconds in _of_plan(path, text) if text.lstrip().startswith("{") else _of_table(path, text):
            timings, steps = found.setdefault(gpu, ([], []))
            timings.append(timing)
            steps += [] if step_seconds is None else [step_seconds]
    return found


def curve(most: int, timings: Sequence[Timing], step_seconds: Sequence[float], gpu: str) -> AffineCurve:
    """The straight line through the timings. step_seconds: of the optimizer; none if windows were timed whole."""
    window, step, sample = fitted(timings)
    return AffineCurve(most, step, sample, sum(step_seconds) / len(step_seconds) if step_seconds else window, gpu)


def _of_plan(path: str | Path, text: str) -> list[tuple[str, Timing, float | None]]:
    try:
        told: dict[str, Any] = json.loads(text)
        if told["schema"] != "autoaccum.plan/1":
            raise ValueError
        steps, samples, rate, name = int(told["accumulation_steps"]), sum(told["micro_batches"]), told["samples_per_second"], str(told["device"]["name"])
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"--times {in_brief(path)} is no plan: {_HOW}") from None
    if told.get("predicted") or told.get("world_size", 1) != 1 or not isinstance(rate, float | int) or not rate > 0 or not steps:
        raise UsageError(f"--times {in_brief(path)} has no measured seconds of one device: {_HOW}")
    return [(_card(name, path), (steps, samples, samples / rate), None)]


def _of_table(path: str | Path, text: str) -> list[tuple[str, Timing, float | None]]:
    rows = csv.DictReader(io.StringIO(text))
    if not set(_COLUMNS) <= set(rows.fieldnames or ()):
        raise UsageError(f"--times {in_brief(path)} begins with {in_brief(text.splitlines()[0]) if text.strip() else 'nothing'}: {_HOW}")
    found = []
    for row in rows:
        try:
            size, seconds = int(row["micro_batch"]), float(row["seconds"])
            step_seconds = float(row["window_seconds"]) if row.get("window_seconds") else None
        except (ValueError, TypeError):
            size, seconds, step_seconds = 0, 0.0, None
        if size < 1 or not (math.isfinite(seconds) and seconds > 0) or (step_seconds is not None and not (math.isfinite(step_seconds) and step_seconds >= 0)):
            raise UsageError(f"--times {in_brief(path)}, line {rows.line_num}: micro_batch must be a whole number from 1 on, and seconds a number above 0")
        found.append((_card(row["gpu"], path), (1, size, seconds), step_seconds))
    if not found:
        raise UsageError(f"--times {in_brief(path)} has no rows: {_HOW}")
    return found


def _card(name: str, path: str | Path) -> str:
    try:
        return profiles.load(name).label
    except UsageError as error:
        raise UsageError(f"--times {in_brief(path)}: {str(error).partition('; or give a size')[0]}") from None
