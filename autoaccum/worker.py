"""The program of a child process: it runs trials of one job for the parent process, on a device or simulated.

`probe.child.Child` starts it. Like `__main__`, it is outside the subpackages, because it needs both the rehearsal on a device
and the simulation. No other module imports it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from autoaccum.errors import as_document
from autoaccum.probe import Limits, die_with_parent
from autoaccum.units import MIB
from autoaccum.window import PhaseCallback, Source, as_jobs, load

# What a simulation imports; the first step of an optimizer imports torch._dynamo.
SIMULATING = ("torch._dynamo", "autoaccum.probe.rehearsal", "autoaccum.trace", "autoaccum.virtual.simulation")


def main(receive: int, send: int, parent: int) -> None:
    """Answers the requests of the parent until it closes the pipe.

    receive, send: file descriptors of the pipes. parent: the process id of the parent.
    """
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # a warning of torch; this process does not need NumPy
    die_with_parent(parent)
    requests, lock = os.fdopen(receive, "rb"), threading.Lock()
    # Child processes of the user's code must not keep the pipes open.
    os.set_inheritable(receive, False)
    os.set_inheritable(send, False)

    def reply(message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        with lock:
            while data:
                data = data[os.write(send, data) :]

    setup = json.loads(requests.readline())
    try:
        _serve(setup, requests, reply)
    except Exception as error:
        reply({"error": as_document(error)})


def _serve(setup: dict[str, Any], requests: Any, reply: Callable[[dict[str, Any]], None]) -> None:
    sys.path[:] = [*sys.path, *(folder for folder in setup["path"] if folder not in sys.path)]
    source = Source(**{**setup["source"], "argv": tuple(setup["source"]["argv"]), "changes": tuple(setup["source"]["changes"])})
    sys.argv = [source.parts[0], *source.argv]
    from autoaccum import devices
    from autoaccum.probe import rehearsing  # imports torch, which the parent does not need

    limits = Limits(**{**setup["limits"], "timeout_s": None})  # the parent watches the time, so that a hung kernel is ended too

    def on_phase(phase: str, index: int) -> None:
        reply({"phase": phase, "index": index})

    if setup["device"].startswith("virtual:"):
        _answer(_simulation(source, setup, limits, on_phase), requests, reply, lambda: 0)
        return
    if setup["forked"]:
        from autoaccum.probe import hold_pages_of

        hold_pages_of(os.getppid())
    device = devices.get(setup["device"])
    jobs = as_jobs(load(source, device=device.facts.label))
    if source.changes:
        from autoaccum.tuner import changes

        jobs = changes.changed(jobs, source.changes)
    # This process's weights are not used afterwards, so trials may change them.
    with rehearsing(jobs, device, limits, parameters=False, on_phase=on_phase) as rehearsal:
        _answer(rehearsal, requests, reply, device.live_bytes)


def _simulation(source: Source, setup: dict[str, Any], limits: Limits, on_phase: PhaseCallback) -> Any:
    from autoaccum.simulate import profiles
    from autoaccum.trace import fake_cuda, quieten_torch
    from autoaccum.tuner import changes
    from autoaccum.virtual import simulation, without_memory

    card = profiles.load(setup["device"].removeprefix("virtual:"))
    quieten_torch()
    with without_memory():
        jobs = changes.changed(as_jobs(load(source, device="cpu")), source.changes)
    approximate = setup["approximate"]
    if not approximate:
        on_phase("self-test", 0)
        approximate = fake_cuda()
        if "device.index()" in approximate:
            approximate = "the job runs backward while it is built, and then CUDA tensors cannot be faked any more: leave that out of its function"
        on_phase("build", 0)
    return simulation.Simulation(jobs, card, limits, approximate=approximate, on_phase=on_phase)


def _answer(rehearsal: Any, requests: Any, reply: Callable[[dict[str, Any]], None], live_bytes: Callable[[], int]) -> None:
    reply({"answer": {"subject": rehearsal.subject().as_dict(), "enforces": rehearsal.enforces}})
    for line in requests:
        request = json.loads(line)
        verb = request.pop("do")
        if verb == "budget":
            reply({"answer": asdict(rehearsal.budget(**request))})
        elif verb == "compare":
            equivalence = rehearsal.compare(**request)
            reply({"answer": equivalence and equivalence.as_dict()})
        elif verb == "sample_tokens":
            reply({"answer": rehearsal.sample_tokens()})
        elif verb == "conditions":
            reply({"answer": asdict(rehearsal.conditions())})
        elif verb in ("estimated", "taped", "timed"):
            reply({"answer": getattr(rehearsal, verb)(**request)})
        else:
            bytes_before = live_bytes()
            reading = getattr(rehearsal, verb)(**request)  # "measure" or "evaluate"
            # True if all memory was freed after an out-of-memory; otherwise the parent replaces this process.
            clean = reading.fits or (live_bytes() <= bytes_before + 64 * MIB and not reading.doubtful)
            reply({"answer": {**reading.as_dict(), "clean": clean}})


if __name__ == "__main__":
    main(*(int(number) for number in sys.argv[1:4]))
