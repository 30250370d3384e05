"""Trials of a script nobody edited: each one is the command itself, with the numbers filled in.

It runs under a cap that is set from outside, and its exit code, its output and its resident bytes tell
how it went.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from autoaccum import devices, oom
from autoaccum.devices import LINUX, STEADY_MALLOC, Budget, Cpu, Facts, Memory, make_budget, steady_wanted
from autoaccum.errors import DeviceError, JobFailed, NoSuchDevice, UsageError
from autoaccum.probe.readings import Equivalence, Limits, Outcome, Reading, Subject
from autoaccum.units import KIB

_KEPT_OUTPUT = 64 * KIB
_UNDER_LIMIT = str(Path(__file__).with_name("under_limit.py"))


@dataclass(frozen=True)
class Template:
    """A command with `{micro_batch}` and, if it accumulates, `{accumulation_steps}` in it."""

    words: tuple[str, ...]

    def __post_init__(self) -> None:
        if not any("{micro_batch}" in word for word in self.words):
            raise UsageError(
                f"the command {shlex.join(self.words)!r} has no {{micro_batch}} in it: write it where the script takes its batch size, "
                "for instance -- python train.py --batch-size {micro_batch} --accum {accumulation_steps}"
            )

        for word in self.words:
            for name in re.findall(r"\{(\w*(?:batch|accum)\w*)\}", word):
                if name not in ("micro_batch", "accumulation_steps"):
                    raise UsageError(f"{{{name}}} in the command is not a placeholder of ours: write {{micro_batch}} or {{accumulation_steps}}")

    @property
    def accumulates(self) -> bool:
        """True if the command is told the accumulation steps."""
        return any("{accumulation_steps}" in word for word in self.words)

    def filled(self, micro_batch: int, accumulation_steps: int) -> list[str]:
        """The command for these numbers; other braces stay as they are."""
        numbers = {"{micro_batch}": str(micro_batch), "{accumulation_steps}": str(accumulation_steps)}
        filled = list(self.words)
        for name, number in numbers.items():
            filled = [word.replace(name, number) for word in filled]
        return filled

    def __str__(self) -> str:
        return shlex.join(self.words)


class Command:
    """A `reading.Rehearser` whose trials are runs of a command. A context manager.

    said: called with what the command prints. Raises `JobFailed` where it fails for another reason than memory.
    """

    def __init__(self, template: Template, device: str, limits: Limits, *, on_output: Callable[[str], None]) -> None:
        self._template, self._limits, self._on_output = template, limits, on_output
        self._facts, self._memory = _device(device)
        self._peaks: dict[int, int] = {}
        self.enforces = LINUX or self._facts.kind == "cuda"

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        """Every run has ended by itself or was ended; there is nothing to put back."""

    def subject(self) -> Subject:
        remarks = []
        if not self._template.accumulates:
            remarks.append("the command has no {accumulation_steps}: the effective batch is the target only if the script works out the steps itself")
        if self._ignored():
            low, high = min(self._peaks), max(self._peaks)
            remarks.append(
                f"the command takes as much at a micro-batch of {high} as at {low}: check that it reads the flags given, and that memory depends on them"
            )
        allocator = ("steady malloc" if steady_wanted() else "default malloc") if self._facts.kind == "cpu" and LINUX else ""
        fingerprint = hashlib.sha256("\0".join(self._template.words).encode()).hexdigest()[:16]
        return Subject(self._facts, 0, fingerprint, (), 0, allocator, tuple(remarks))

    def budget(self, *, limited: bool = True) -> Budget:
        limit = self._limits.memory_bytes if limited else None
        return make_budget(self._memory, kind=self._facts.kind, limit_bytes=limit, headroom=self._limits.headroom)

    def measure(self, micro_batches: Sequence[int], *, full: bool = False, limited: bool = True, windows: int = 2) -> Reading:
        size, steps = micro_batches[0], len(micro_batches)
        words = self._template.filled(size, steps)
        allowed = self.budget(limited=limited)
        started = time.monotonic()
        code, output, resident = self._run(words, allowed.budget_bytes)
        seconds = time.monotonic() - started
        peak = resident if self._facts.kind == "cpu" else None
        told = oom.in_output(output)
        outcome: Outcome
        remarks: tuple[str, ...] = ()
        if code == 127 and not told:
            raise UsageError(f"the command cannot be started: {output.strip().splitlines()[-1] if output.strip() else words[0]}")
        if code is None:
            outcome = "timeout"
        elif code == -signal.SIGKILL:
            outcome = "killed"
        elif told:
            outcome = "oom"
            if code == 0:
                remarks = (f"the command printed an out-of-memory message at {size} and ended with exit code 0: taken as not fitting",)
        elif code != 0 and "per_process_memory_fraction" in output:
            raise DeviceError(
                "the command's torch cannot be capped from outside (it does not know per_process_memory_fraction in PYTORCH_CUDA_ALLOC_CONF): "
                "use a newer torch there, or a JOB file"
            )
        elif code != 0:
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            last = "\n".join(output.strip().splitlines()[-8:])
            raise JobFailed(f"the command {how}, which is not an out-of-memory: {shlex.join(words)}", text=last, whole=output)
        elif peak is not None and peak > allowed.budget_bytes:
            outcome = "over-budget"
        else:
            outcome = "fits"
        if outcome == "fits" and peak is not None:
            self._peaks[size] = peak
        # What a command takes on a GPU cannot be seen from outside.
        return Reading(size, steps, outcome, "command", peak, seconds, remarks=remarks)

    def compare(self, samples: int) -> Equivalence | None:
        return None  # its loss is out of reach

    def conditions(self) -> None:
        """What a command's trials depend on (its files, their imports, its data) is not known."""

    def fresh(self) -> None:
        """Every run has a process of its own."""

    def _ignored(self) -> bool:
        """True if memory did not move between sizes far apart; a hundredth of it is more than noise."""
        if len(self._peaks) < 2 or max(self._peaks) < 4 * min(self._peaks):
            return False
        low, high = self._peaks[min(self._peaks)], self._peaks[max(self._peaks)]
        return high <= low * 1.01

    def _run(self, words: list[str], cap_bytes: int) -> tuple[int | None, str, int]:
        """Exit code (None: ended for taking too long), output, and the largest resident bytes of any process of it."""
        environment, cap = dict(os.environ), "none"
        if self._facts.kind == "cpu" and LINUX:
            environment |= {name: str(value) for name, value in STEADY_MALLOC.items()} if steady_wanted() else {}
            cap = str(cap_bytes)
        elif self._facts.kind != "cpu":
            fraction = min(cap_bytes / self._memory.total_bytes, 1.0)
            known = environment.get("PYTORCH_CUDA_ALLOC_CONF", "")
            environment["PYTORCH_CUDA_ALLOC_CONF"] = ",".join(filter(None, [known, f"per_process_memory_fraction:{fraction:.6f}"]))
        told, tell = os.pipe()
        process = subprocess.Popen(
            [sys.executable, _UNDER_LIMIT, str(tell), cap, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=(tell,),
            start_new_session=True,
        )
        os.close(tell)
        kept: list[str] = []
        listener = threading.Thread(target=self._listen, args=(process, kept), daemon=True)
        listener.start()
        try:
            ended = select.select([told], [], [], self._limits.timeout_s)[0]
            answer = os.read(told, 1000) if ended else b""
        finally:
            os.close(told)
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            listener.join(timeout=1)  # a process that left the group may hold the pipe open
        output = "".join(kept)[-_KEPT_OUTPUT:]
        if not ended:
            return None, output, 0
        if not answer:  # whoever kills in want of memory may take the small process in between, too
            return -signal.SIGKILL, output, 0
        figures = json.loads(answer)
        return figures["code"], output, figures["ru_maxrss"] * (1 if sys.platform == "darwin" else KIB)

    def _listen(self, process: subprocess.Popen[bytes], kept: list[str]) -> None:
        assert process.stdout is not None  # asked for as a pipe
        with process.stdout as output:
            while chunk := os.read(output.fileno(), 65536):
                text = chunk.decode(errors="replace")
                kept.append(text)
                if sum(map(len, kept)) > 4 * _KEPT_OUTPUT:
                    kept[:] = ["".join(kept)[-_KEPT_OUTPUT:]]
                self._on_output(text)


def _device(label: str) -> tuple[Facts, Memory]:
    """Which device, and its memory, without this process touching it: a CUDA context here would be counted."""
    if label == "cpu" or (label == "auto" and not devices.accelerator_driver()):
        cpu = Cpu()
        memory = cpu.memory()
        # The command is a process of its own: none of its memory is ours.
        return cpu.facts, Memory(memory.total_bytes, memory.free_bytes, 0, 0, memory.others, memory.binding_limit)
    asked = subprocess.run([sys.executable, "-m", "autoaccum", "devices", "--json"], capture_output=True, text=True, check=False)
    if asked.returncode != 0:
        raise DeviceError(f"the devices could not be asked: {asked.stderr.strip() or asked.stdout.strip()}")
    found = json.loads(asked.stdout)["devices"]
    kind, _, index = label.partition(":")
    for each in found:
        if label == "auto" and each["kind"] == "cpu":
            return _device("cpu")
        if label == "auto" or (each["kind"] == kind and (each["index"] or 0) == int(index or 0)):
            if each["kind"] not in ("cpu", "cuda"):
                raise NoSuchDevice(f"a command's memory on {each['kind']} cannot be capped from outside: use a JOB file, or --device cpu")
            facts = Facts(each["kind"], each["index"], each["name"], each["uuid"])
            return facts, Memory(each["total_bytes"], each["free_bytes"], 0, None, (), each["binding_limit"])
    raise NoSuchDevice(f"there is no {label} here; devices: {', '.join(each['kind'] for each in found)}")
