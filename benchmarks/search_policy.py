"""Counts trials and out-of-memory events of the search on simulated devices of known truth.

    python benchmarks/search_policy.py [--output benchmarks/results/search_policy.json]

Every true maximum 1..1024, targets 120, 127, 512, 1000 and 4096, three kinds of memory, three shares of
the budget that parameters and the like take. The confirming run is not counted. Beside ours, on the same
devices, double-then-bisect (it searches sizes up to the target) and Accelerate's times 0.9.
"""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import click

from autoaccum.plan import arithmetic
from autoaccum.probe import search

TARGETS = (120, 127, 512, 1000, 4096)
BUDGET = 16 * 2**30


@dataclass(frozen=True)
class Shown:
    micro_batch: int
    accumulation_steps: int
    fits: bool
    peak_bytes: int | None
    base_bytes: int | None
    activation_bytes: int | None = None


@dataclass
class Device:
    """Memory that fits exactly `maximum` samples: fixed + per_sample x n, perhaps with a step or noise."""

    maximum: int
    fixed_share: float
    kind: str
    tells_base: bool
    trials: int = 0
    ooms: int = 0
    tried: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(f"{self.maximum} {self.fixed_share} {self.kind}")
        self._jump_at = self._random.randint(1, 2 * self.maximum) if self.kind == "jump" else 0
        jump = 0.15 * BUDGET if 0 < self._jump_at <= self.maximum else 0.0
        self.fixed = self.fixed_share * BUDGET
        # A little less than the budget at the maximum, more than the budget one sample above it.
        self.per_sample = (BUDGET - self.fixed - jump) / (self.maximum + 0.5)
        self.gradients = 0.25 * self.fixed

    def peak(self, size: int, steps: int) -> float:
        jump = 0.15 * BUDGET if 0 < self._jump_at <= size else 0.0
        return self.fixed + self.per_sample * size + jump - (self.gradients if steps == 1 else 0.0)

    def fits(self, size: int, steps: int) -> Shown:
        self.trials += 1
        self.tried.append(size)
        peak = self.peak(size, steps)
        if peak > BUDGET:
            self.ooms += 1
            return Shown(size, steps, False, None, None)
        if self.kind == "noise":
            peak = min(peak * self._random.uniform(0.97, 1.03), BUDGET)
        return Shown(size, steps, True, int(peak), int(self.fixed) if self.tells_base else None)

    def truth(self, target: int) -> int:
        return next((steps for steps in range(1, target + 1) if self.peak(math.ceil(target / steps), steps) <= BUDGET), 0)


def ours(device: Device, target: int) -> int:
    found = search.largest(device.fits, target, arithmetic.candidate_sizes(target), budget_bytes=lambda: BUDGET, gradient_bytes=int(device.gradients))
    return found.accumulation_steps


def double_then_bisect(device: Device, target: int) -> int:
    low, high = 0, 1
    while high <= target and device.fits(high, math.ceil(target / high)).fits:
        low, high = high, high * 2
    high = min(high, target + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if device.fits(middle, math.ceil(target / middle)).fits else (low, middle)
    return math.ceil(target / low) if low else 0


def times_nine_tenths(device: Device, target: int) -> int:
    size = target
    while size and not device.fits(size, math.ceil(target / size)).fits:
        size = int(size * 0.9)
    return math.ceil(target / size) if size else 0


POLICIES: dict[str, Callable[[Device, int], int]] = {"autoaccum": ours, "double, then bisect": double_then_bisect, "times 0.9": times_nine_tenths}


@click.command()
@click.option("--output", type=click.Path(path_type=Path), help="Write the figures as JSON.")
@click.option("--without-base", is_flag=True, help="Devices that do not tell what is held between micro-batches.")
def main(output: Path | None, without_base: bool) -> None:
    rows = []
    for kind in ("affine", "jump", "noise"):
        for name, policy in POLICIES.items():
            for target in TARGETS:
                trials, ooms, wrong = [], [], 0
                for maximum in range(1, 1025):
                    for share in (0.1, 0.4, 0.7):
                        device = Device(maximum, share, kind, not without_base)
                        steps = policy(device, target)
                        trials.append(device.trials)
                        ooms.append(device.ooms)
                        wrong += steps != device.truth(target)
                rows.append(
                    {
                        "memory": kind, "policy": name, "target": target, "trials_mean": statistics.mean(trials), "trials_most": max(trials),
                        "ooms_mean": statistics.mean(ooms), "ooms_most": max(ooms), "wrong": wrong, "runs": len(trials),
                    }
                )  # fmt: skip
    click.echo(f"{'memory':8}{'policy':22}{'target':>7}{'trials':>8}{'most':>6}{'OOMs':>7}{'most':>6}{'more steps than needed':>24}")
    for row in rows:
        click.echo(
            f"{row['memory']:8}{row['policy']:22}{row['target']:>7}{row['trials_mean']:>8.2f}{row['trials_most']:>6}{row['ooms_mean']:>7.2f}{row['ooms_most']:>6}{row['wrong']:>17} of {row['runs']}"
        )
    for kind in ("affine", "jump", "noise"):
        for name in POLICIES:
            mine = [row for row in rows if row["memory"] == kind and row["policy"] == name]
            click.echo(
                f"{kind:8}{name:22}{'all':>7}{statistics.mean(r['trials_mean'] for r in mine):>8.2f}{'':6}{statistics.mean(r['ooms_mean'] for r in mine):>7.2f}"
            )
    if output:
        output.write_text(json.dumps({"schema": "autoaccum.search_policy/1", "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
