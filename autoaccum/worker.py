"""The program that a child process runs: it serves trials of one job to the parent, real ones or simulated ones.

Started by `probe.child.Child`. Like `__main__` it stands above all rooms, because it needs both the rehearsal on a device
and the simulated one; nothing imports it.
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


def main(receive: int, send: int, parent: int) -> None:
    """Serves one parent until it closes the pipe."""
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # torch's; nobody here needs NumPy
    die_with_parent(parent)
    requests, lock = os.fdopen(receive, "rb"), threading.Lock()
    # The user's own children must not hold the pipes open.
    os.set_inheritable(receive, False)
    os.set_inheritable(send, False)

    def reply(message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        with lock:
            while data:
                data = data[os.write(send, data) :]

    opened = json.loads(requests.readline())
    try:
        _serve(opened, requests, reply)
    except Exception as error:
        reply({"error": as_document(error)})


def _serve(opened: dict[str, Any], requests: Any, reply: Callable[[dict[str, Any]], None]) -> None:
    sys.path[:] = [*sys.path, *(each for each in opened["path"] if each not in sys.path)]
    source = Source(**{**opened["source"], "argv": tuple(opened["source"]["argv"])})
    sys.argv = [source.parts[0], *source.argv]
    from autoaccum import devices
    from autoaccum.probe import rehearsing  # torch, and here alone: the parent never needs it

    limits = Limits(**{**opened["limits"], "timeout_s": None})  # the parent holds the clock, also over a hung kernel

    def on_phase(phase: str, index: int) -> None:
        reply({"phase": phase, "index": index})

    if opened["device"].startswith("virtual:"):
        _answer(_simulation(source, opened, limits, on_phase), requests, reply, lambda: 0)
        return
    device = devices.get(opened["device"])
    jobs = load(source, device=device.facts.label)
    # Nobody needs this process's weights afterwards, so trials may train them.
    with rehearsing(jobs, device, limits, parameters=False, on_phase=on_phase) as rehearsal:
        _answer(rehearsal, requests, reply, device.live_bytes)


def _simulation(source: Source, opened: dict[str, Any], limits: Limits, on_phase: PhaseCallback) -> Any:
    from autoaccum.simulate import fake_cuda, profiles, quieten_torch
    from autoaccum.virtual import simulation, without_memory

    card = profiles.load(opened["device"].removeprefix("virtual:"))
    quieten_torch()
    with without_memory():
        jobs = as_jobs(load(source, device="cpu"))
    approximate = opened["approximate"]
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
        asked = json.loads(line)
        verb = asked.pop("do")
        if verb == "budget":
            reply({"answer": asdict(rehearsal.budget(**asked))})
        elif verb == "compare":
            found = rehearsal.compare(**asked)
            reply({"answer": found and found.as_dict()})
        elif verb == "conditions":
            reply({"answer": asdict(rehearsal.conditions())})
        elif verb in ("estimate", "tape"):
            reply({"answer": getattr(rehearsal, verb + "d")(**asked)})
        else:
            held_before = live_bytes()
            reading = rehearsal.measure(**asked)
            # After an out-of-memory, proof that it all came back; the parent replaces a process that kept some.
            clean = reading.fits or (live_bytes() <= held_before + 64 * MIB and not reading.doubtful)
            reply({"answer": {**reading.as_dict(), "clean": clean}})


if __name__ == "__main__":
    main(*(int(number) for number in sys.argv[1:4]))
