"""`tune --device virtual:SIZE --largest` beside the truth: every size tried, one after the other.

    python benchmarks/simulated_largest.py --output benchmarks/results/simulated_largest.json

60 cases: five models, four sizes of card, three ways of training. The truth is the largest micro-batch up to the target
whose replay stays in the budget without a flush, all sizes replayed. A miss is shown with the sizes at which fitting turns.
Also the time that a tape of 10,000 events takes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

TARGET = 256
SIZES = ("320MiB", "448MiB", "700MiB", "1GiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    from autoaccum.trace import fake

    fake.enable()
    ways = {
        "fp32": {},
        "bf16": {"autocast": torch.bfloat16},
        "fp16": {"autocast": torch.float16, "scaler": torch.amp.GradScaler("cpu"), "max_grad_norm": 1.0},
    }
    rows = []
    for name, make in models().items():
        for way, options in ways.items():
            rows += cases(name, way, make(**options))
    hits = [row for row in rows if row["found"] == row["largest"]]
    result = {
        "schema": "autoaccum.simulated_largest/1",
        "torch": torch.__version__,
        "cases": len(rows),
        "exact": len(hits),
        "answer_fits": sum(row["answer_fits"] for row in rows),
        "replay_of_10000_events_ms": replay_ms(),
        "rows": rows,
    }
    if given.output:
        given.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "rows"}, indent=1))
    for row in rows:
        if row not in hits:
            print(row)


def models():
    from tests import simulated

    def wide(**given):
        return simulated.mlp(1024, **given)

    def checkpointed(**given):
        return simulated.decoder(again=True, **given)

    return {
        "mlp": wide,
        "conv": simulated.conv,
        "wide conv": lambda **given: simulated.conv(64, **given),
        "decoder": simulated.decoder,
        "checkpointed": checkpointed,
    }


def windows() -> list[tuple[int, ...]]:
    from autoaccum.plan import arithmetic

    return [arithmetic.micro_batches(TARGET, steps) for steps in range(1, TARGET // 2 + 1)]


def cases(name, way, job) -> list[dict]:
    from autoaccum.errors import AutoaccumError
    from autoaccum.probe import request
    from autoaccum.probe.readings import Limits
    from autoaccum.simulate import profiles
    from autoaccum.tuner import one_device, trial_log
    from autoaccum.virtual import simulation

    simulated = simulation.Simulation([job], profiles.load(SIZES[0]), Limits())
    rows = []
    for size in SIZES:
        simulated.use(profiles.load(size))
        started = time.perf_counter()
        try:
            plan = one_device.tune_one_device(simulated, request.Request(TARGET, largest=True), trial_log.TrialLog(None), name, ())
            found, trials, steps = plan.micro_batch, len(plan.trials), plan.accumulation_steps
            largest_fit = plan.largest_fit
        except AutoaccumError:
            found, trials, steps, largest_fit = 0, 0, 0, 0
        seconds = time.perf_counter() - started
        fits = {n: simulated.measure((n,) * min(-(-TARGET // n), 3) if n < TARGET else (n,)).fits for n in range(2, TARGET + 1)}
        largest = max((n for n, good in fits.items() if good), default=0)
        rows.append(
            {
                "model": name,
                "way": way,
                "card": size,
                "found": max(found, largest_fit),
                "largest": largest,
                # That nothing fits is right where no window of the target does, cut evenly as plans are.
                "answer_fits": simulated.measure((found,) * steps).fits if found else not any(simulated.measure(each).fits for each in windows()),
                "monotone": sorted(fits.values(), reverse=True) == list(fits.values()),
                # Of a miss: from which sizes on it is otherwise than just below.
                "turns": [] if found == largest else [f"{n} {'fits' if fits[n] else 'does not'}" for n in fits if n == 2 or fits[n] != fits[n - 1]],
                "trials": trials,
                "seconds": round(seconds, 2),
            }
        )
    return rows


def replay_ms() -> float:
    """Median of 15 replays of 10,000 events: sizes from 32 B to 128 MiB, half of what lives dies at random."""
    from autoaccum.simulate.allocator import Allocator
    from autoaccum.simulate.tape import Tape, replay

    chance, tape, alive = random.Random(1), Tape(), []
    for _ in range(10_000):
        if alive and chance.random() < 0.5:
            tape.died(alive.pop(chance.randrange(len(alive))))
        else:
            alive.append(tape.born(int(2 ** chance.uniform(5, 27)), "activations", "x"))
    times = []
    for _ in range(15):
        started = time.perf_counter()
        replay(tape, Allocator())
        times.append(time.perf_counter() - started)
    return round(sorted(times)[7] * 1000, 1)


if __name__ == "__main__":
    main()
