"""One system at work, in its own environment: `python contestant.py ADAPTER SYSTEM CONTEST`, told over stdin what is asked, answers as JSON lines.

`policy`: every scenario of `simulated.py`, every question. `real`: one network under an enforced limit. `plain`: the loop by hand at one
size, for the oracle. `gradients`: the cases of `gradients.py`, by the adapter's `accumulate`. Lines of stdin: one JSON document. Each answer is a line that begins with "told:".
"""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import importlib.util
import json
import os
import resource
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

HERE = Path(__file__).resolve().parent
MIB = 2**20


def adapter(name: str) -> Any:
    """By path, and under a name of its own: its file is called like the package that it drives."""
    spec = importlib.util.spec_from_file_location(f"peer_{name}", HERE / "peers" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def tell(**fields: Any) -> None:
    print("told:" + json.dumps(fields), flush=True)


def outcome(run: Any, system: str, work: Any) -> dict[str, Any]:
    """What came of it. A size is the answer if training began with it, `windows` steps were made, and none raised."""
    error, answer = None, 0
    try:
        answer = run(system, work)
    except Exception as raised:
        error = f"{type(raised).__name__}: {(str(raised).splitlines() or [''])[0][:160]}"
    sizes = list(work.sizes)
    return {
        "micro_batch": answer or max(sizes, default=0), "sizes": sizes if len(sizes) < 50 else [sizes[0], "...", sizes[-1]], "steps": len(sizes), "effective": sum(sizes),
        "survives": error is None and work.stepped == work.windows, "exact": error is None and work.whole_windows == work.windows, "error": error,
        "handed_over": work.handed_over, "fed": work.fed, "samples_per_second": rate(work), "seconds": work.seconds, "state_unchanged": work.state_unchanged, "random_unchanged": work.random_unchanged,
        **({"first_windows": work.steps_of_windows[:8]} if work.steps_of_windows else {}),
    }  # fmt: skip


def rate(work: Any) -> float | None:
    """Samples per second of the windows after the first."""
    ended = work.ended[-work.stepped :] if work.stepped else []
    return sum(work.sizes) * (len(ended) - 1) / (ended[-1] - ended[0]) if len(ended) > 1 and ended[-1] > ended[0] else None


def policy(run: Any, system: str, only: list[str] | None = None) -> None:
    """Every scenario (or those named): the most of what is asked there, and each target. Trained are 30 windows, fewer where the best plan takes many steps."""
    import torch
    from simulated import BUDGET, SCENARIOS, TARGETS, Device
    from work import Samples, Work

    def inputs(n: int) -> dict[str, torch.Tensor]:
        return {"inputs": torch.ones(n, 1), "targets": torch.ones(n, 1)}

    device = Device(SCENARIOS[1])
    outcome(run, system, Work(2, 1, Samples(8, inputs), device.build, limit_bytes=BUDGET, device=device))  # imports what it needs
    gc.freeze()  # systems collect garbage at every attempt, 0.2 s each; the clock that counts here is the device's
    for scenario in SCENARIOS:
        if only is not None and scenario.name not in only:
            continue
        samples = Samples(scenario.samples or 8 * max(scenario.asked, *TARGETS), inputs)
        for target in dict.fromkeys((scenario.asked, *TARGETS)):
            if target > len(samples):
                continue
            device = Device(scenario)
            windows = max(3, min(30, 240 // (scenario.fewest(target) or 1)))
            work = Work(target, windows, samples, device.build, limit_bytes=BUDGET, device=device)
            told = outcome(run, system, work)
            counted = work.searched or device.counted()
            counted["trials"] = work.trials or counted["trials"]
            tell(scenario=scenario.name, target=target, later_ooms=device.ooms - counted["ooms"], **counted, **told)


def held(what: str) -> int:
    """Bytes of `VmData` or `VmRSS`."""
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what + ":"))


def limited(room_mib: int) -> int:
    """From now on the process may take so much more; returns what that is in resident bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # of the way once through nothing is left in either figure
    resource.setrlimit(resource.RLIMIT_DATA, (held("VmData") + room_mib * MIB, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    return held("VmRSS") + room_mib * MIB


def warmed(run: Any, system: str, network: str) -> None:
    """The whole way once, with a target of two samples: what libraries import and start by then is no part of the limit."""
    from networks import NETWORKS
    from work import Samples, Work

    build, samples = NETWORKS[network]
    run(system, Work(2, 1, Samples(8, samples.make), build, limit_bytes=held("VmRSS") + 4096 * MIB))


def real(run: Any, system: str, network: str, target: int, windows: int, room_mib: int) -> None:
    """One search and the training that follows, in memory that the system enforces."""
    from networks import NETWORKS
    from work import Work

    try:
        warmed(run, system, network)
    except Exception as error:
        tell(network=network, refused=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}")
        return
    build, samples = NETWORKS[network]
    limit = limited(room_mib)
    tell(network=network, **outcome(run, system, Work(target, windows, samples, build, limit_bytes=limit)))


def plain(network: str, size: int, windows: int, room_mib: int) -> None:
    """Whether two micro-batches of one size train by hand, in a fresh process under the same limit."""
    from networks import NETWORKS
    from work import Work

    def run(system: str, work: Any) -> int:
        work.train((min(size, work.target),) * 2)
        return size

    warmed(run, "plain", network)
    build, samples = NETWORKS[network]
    limit = limited(room_mib)
    tell(network=network, size=size, **outcome(run, "plain", Work(2 * size, windows, samples, build, limit_bytes=limit)))


def main() -> None:
    name, system, contest = sys.argv[1:]
    asked = json.loads(sys.stdin.read())
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)
    if contest == "plain":
        plain(**asked)
        return
    if contest == "gradients":
        import gradients

        tell(version=importlib.metadata.version(name), **gradients.errors(adapter(name).accumulate))
        return
    run = adapter(name).run
    {"policy": policy, "real": real}[contest](run, system, **asked)


if __name__ == "__main__":
    main()
