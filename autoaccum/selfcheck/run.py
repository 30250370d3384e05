"""`run_selfcheck`: the measurements of the self-check in order, each in a process of its own, written down as soon as it is there."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from autoaccum import files
from autoaccum.devices import driver_version, here
from autoaccum.errors import NoSuchDevice, UsageError
from autoaccum.probe import own_program
from autoaccum.selfcheck.verdict import Measured, SelfCheck
from autoaccum.version import __version__

NAMES = ("profile", "exact", "windows", "rescue", "plans", "peaks", "loop", "copies")  # of `measurements.MEASUREMENTS`
_TIMEOUT_S = 400.0
_CODE = """
import json, torch
from autoaccum.selfcheck.measurements import MEASUREMENTS
found = MEASUREMENTS[{name!r}]({label!r}, {tiny})
print("\\nfound:" + json.dumps(found, default=str))
"""


def run_selfcheck(label: str, output: Path, *, tiny: bool = False, minutes: float | None = None, on_measured: Callable[[str, Measured], None]) -> SelfCheck:
    """Measures what `output` does not have yet, and returns all of it.

    label: a CUDA device. output: the JSON file; a run that was cut short goes on from what is in it, if the machine is the same.
    tiny: small jobs on any device, to try the self-check out. minutes: begin no measurement later than that.
    Raises `NoSuchDevice` without a CUDA card, and `UsageError` for a file that is no self-check of this machine.
    """
    if not tiny and not label.startswith("cuda"):
        raise NoSuchDevice(f"selfcheck looks at a CUDA card, and {label} is none; devices here: {', '.join(here())}")
    if not tiny and not any(each.startswith("cuda") for each in here()):
        raise NoSuchDevice(f"selfcheck looks at a CUDA card, and none is here; devices here: {', '.join(here())}")
    found = _so_far(output, SelfCheck(_machine(label), tiny, {}, NAMES))
    started = time.monotonic()
    for name in NAMES:
        if name in found.measurements and found.measurements[name].outcome != "failed":
            continue
        if minutes is not None and time.monotonic() - started > 60 * minutes:
            break
        measured = _measured(name, label, tiny)
        kept = {**found.measurements, name: measured}
        found = replace(found, measurements={each: kept[each] for each in NAMES if each in kept}, missing=tuple(each for each in NAMES if each not in kept))
        files.write_text(output, json.dumps(found.as_dict(), indent=1) + "\n")
        on_measured(name, measured)
    return found


def _so_far(output: Path, fresh: SelfCheck) -> SelfCheck:
    if not output.exists():
        return fresh
    try:
        document = json.loads(files.read_text(output))
    except (files.Unreadable, ValueError) as error:
        raise UsageError(f"{output} cannot be read ({error}): name another file with --output, or remove it") from None
    before = SelfCheck.from_dict(document, where=str(output))
    if (before.machine, before.tried_out) != (fresh.machine, fresh.tried_out):
        raise UsageError(f"{output} is of another machine or of other versions: name another file with --output, or remove it")
    return before


def _measured(name: str, label: str, tiny: bool) -> Measured:
    started = time.monotonic()
    words = own_program(_CODE.format(name=name, label=label, tiny=tiny))
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        stdout, stderr = process.communicate(timeout=_TIMEOUT_S)
    except BaseException as error:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it started holds the card, too
        process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        return Measured("failed", f"did not end within {_TIMEOUT_S:.0f} s", _TIMEOUT_S, {})
    seconds = round(time.monotonic() - started, 2)
    answers = [line.removeprefix("found:") for line in stdout.splitlines() if line.startswith("found:")]
    if process.returncode != 0 or not answers:
        last = (stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        return Measured("failed", last[:200], seconds, {"stderr": stderr[-4000:]})
    figures = json.loads(answers[-1])
    return Measured(figures.pop("outcome"), figures.pop("said"), seconds, figures)


def _machine(label: str) -> dict[str, str]:
    """The card, the driver and the versions. The card's own process answers for it, so that no context of ours is left on it."""
    code = "import json, torch; d = json.dumps; label = {label!r}\n" + (
        "name = torch.cuda.get_device_name(torch.device(label)) if label.startswith('cuda') else 'no card'\n"
        "print(d({{'card': name, 'torch': torch.__version__, 'cuda': str(torch.version.cuda)}}))"
    )
    done = subprocess.run(own_program(code.format(label=label)), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NoSuchDevice(f"{label} could not be asked for its name: {(done.stderr.strip().splitlines() or ['no answer'])[-1]}")
    told: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return {**told, "driver": driver_version(), "python": platform.python_version(), "autoaccum": __version__}
