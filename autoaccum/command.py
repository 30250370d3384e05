"""Trials of a script nobody edited: each one is the command itself, with the numbers filled in.

It runs under a cap that is set from outside, and its exit code, its output and its resident bytes tell
how it went.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from autoaccum import devices, oom
from autoaccum.devices.base import Budget, Facts, Memory, budget
from autoaccum.devices.cpu import LINUX, STEADY_MALLOC, Cpu
from autoaccum.errors import DeviceError, JobFailed, NoSuchDevice, UsageError
from autoaccum.reading import Limits, Outcome, Reading, Subject
from autoaccum.units import KIB

# Sets the soft limit and becomes the command. In a process of its own, because a function between fork
# and exec is not safe in a parent with threads.
_UNDER_LIMIT = "import os,resource as r,sys; r.setrlimit(r.RLIMIT_DATA,(int(sys.argv[1]),r.getrlimit(r.RLIMIT_DATA)[1])); os.execvp(sys.argv[2],sys.argv[2:])"
_KEPT_OUTPUT = 64 * KIB


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

    def __init__(self, template: Template, device: str, limits: Limits, *, said: Callable[[str], None]) -> None:
        self._template, self._limits, self._said = template, limits, said
        self._facts, self._memory = _device(device)
        self._peaks: dict[int, int] = {}
        self.enforces = LINUX or self._facts.kind == "cuda"

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        """Every run has ended by itself or was ended; there is nothing to put back."""

    def subject(self) -> Subject:
        remarks = []
        if self._ignored():
            low, high = min(self._peaks), max(self._peaks)
            remarks.append(
                f"the command takes as much at a micro-batch of {high} as at {low}: check that it reads the flags given, and that memory depends on them"
            )
        if self._facts.kind == "cpu" and LINUX:
            settings = " ".join(f"{name}={value}" for name, value in STEADY_MALLOC.items())
            remarks.append(f"measured with {settings} in the environment: set them for training too (--format env prints them)")
        fingerprint = hashlib.sha256("\0".join(self._template.words).encode()).hexdigest()[:16]
        return Subject(self._facts, 0, fingerprint, (), 0, tuple(remarks))

    def budget(self, *, limited: bool = True) -> Budget:
        limit = self._limits.memory_bytes if limited else None
        return budget(self._memory, kind=self._facts.kind, limit_bytes=limit, headroom=self._limits.headroom)

    def measure(self, micro_batches: Sequence[int], *, full: bool = False, limited: bool = True) -> Reading:
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
        if code is None:
            outcome = "timeout"
        elif code == -signal.SIGKILL:
            outcome = "killed"
        elif told:
            outcome = "oom"
            if code == 0:
                remarks = (f"the command printed an out-of-memory message at {size} and ended with exit code 0: taken as not fitting",)
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
        # The process tells of itself only by its largest figure; a GPU's is inside it.
        shown = peak if peak is not None else 0
        return Reading(size, steps, outcome, "command", shown, seconds, remarks=remarks)

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
        environment = dict(os.environ)
        if self._facts.kind == "cpu":
            environment |= {name: str(value) for name, value in STEADY_MALLOC.items()} if LINUX else {}
            started = [sys.executable, "-c", _UNDER_LIMIT, str(cap_bytes), *words] if LINUX else words
        else:
            fraction = min(cap_bytes / self._memory.total_bytes, 1.0)
            known = environment.get("PYTORCH_CUDA_ALLOC_CONF", "")
            environment["PYTORCH_CUDA_ALLOC_CONF"] = ",".join(filter(None, [known, f"per_process_memory_fraction:{fraction:.6f}"]))
            started = words
        try:
            process = subprocess.Popen(
                started, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        except OSError as error:
            raise UsageError(f"the command {words[0]!r} cannot be started: {error.strerror}") from None
        kept: list[str] = []
        listener = threading.Thread(target=self._listen, args=(process, kept), daemon=True)
        listener.start()
        try:
            code, resident = _waited(process, self._limits.timeout_s)
        finally:
            _end_group(process)
            listener.join(timeout=1)
        return code, "".join(kept)[-_KEPT_OUTPUT:], resident

    def _listen(self, process: subprocess.Popen[bytes], kept: list[str]) -> None:
        assert process.stdout is not None  # asked for as a pipe
        with process.stdout as output:
            while chunk := os.read(output.fileno(), 65536):
                text = chunk.decode(errors="replace")
                kept.append(text)
                if sum(map(len, kept)) > 4 * _KEPT_OUTPUT:
                    kept[:] = ["".join(kept)[-_KEPT_OUTPUT:]]
                self._said(text)


def _waited(process: subprocess.Popen[bytes], timeout_s: float | None) -> tuple[int | None, int]:
    """Waits for the process with its accounting, which `Popen.wait` throws away."""
    over = threading.Event()

    def end() -> None:
        over.set()
        _end_group(process)

    clock = threading.Timer(timeout_s, end) if timeout_s is not None else None
    if clock is not None:
        clock.start()
    try:
        _, status, usage = os.wait4(process.pid, 0)
    finally:
        if clock is not None:
            clock.cancel()
    process.returncode = os.waitstatus_to_exitcode(status)
    resident = usage.ru_maxrss * (1 if platform.system() == "Darwin" else KIB)
    return (None if over.is_set() else process.returncode), resident


def _end_group(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


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
        if label == "auto" or (each["kind"] == kind and (each["index"] or 0) == int(index or 0)):
            if each["kind"] not in ("cpu", "cuda"):
                raise NoSuchDevice(f"a command's memory on {each['kind']} cannot be capped from outside: use a JOB file, or --device cpu")
            facts = Facts(each["kind"], each["index"], each["name"], each["uuid"])
            return facts, Memory(each["total_bytes"], each["free_bytes"], 0, None, (), each["binding_limit"])
    raise NoSuchDevice(f"there is no {label} here; devices: {', '.join(each['kind'] for each in found)}")
