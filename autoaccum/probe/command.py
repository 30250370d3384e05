"""The `Rehearser` of a command: each trial runs an unmodified script with the numbers filled in.

The command runs under a memory cap that is set from outside. The outcome of a trial comes from the command's exit code,
its output and its resident bytes.
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

_OUTPUT_CHARS = 64 * KIB
_CAPPED_PROCESS = str(Path(__file__).parent.with_name("capped_process.py"))


@dataclass(frozen=True)
class Template:
    """A command with the placeholder `{micro_batch}` and, if it accumulates, `{accumulation_steps}`.

    Raises `UsageError` if `{micro_batch}` is missing or a placeholder is unknown.
    """

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
        """True if the command has the placeholder `{accumulation_steps}`."""
        return any("{accumulation_steps}" in word for word in self.words)

    def filled(self, micro_batch: int, accumulation_steps: int) -> list[str]:
        """The words of the command with these numbers in place of the placeholders. Other braces do not change."""
        numbers = {"{micro_batch}": str(micro_batch), "{accumulation_steps}": str(accumulation_steps)}
        filled = list(self.words)
        for name, number in numbers.items():
            filled = [word.replace(name, number) for word in filled]
        return filled

    def __str__(self) -> str:
        return shlex.join(self.words)


class Command:
    """A `Rehearser` whose trials are runs of a command. A context manager.

    on_output: called with the text that the command prints.
    Raises `JobFailed` if the command fails for another reason than memory.
    """

    def __init__(self, template: Template, device: str, limits: Limits, *, on_output: Callable[[str], None]) -> None:
        self._template, self._limits, self._on_output = template, limits, on_output
        self._facts, self._memory = _device(device)
        self._peaks: dict[int, int] = {}
        self.enforces = LINUX or self._facts.kind == "cuda"

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        """Does nothing: every run has ended, and no state needs to be restored."""

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
        oom_message = oom.in_output(output)
        outcome: Outcome
        remarks: tuple[str, ...] = ()
        if code == 127 and not oom_message:
            raise UsageError(f"the command cannot be started: {output.strip().splitlines()[-1] if output.strip() else words[0]}")
        if code is None:
            outcome = "timeout"
        elif oom_message and code not in (-signal.SIGKILL, 137):
            outcome = "oom"
            if code == 0:
                remarks = (f"the command printed an out-of-memory message at {size} and ended with exit code 0: taken as not fitting",)
        elif oom.was_killed(code, output):
            outcome = "killed"
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
        # The peak of a command on a GPU cannot be measured from outside.
        return Reading(size, steps, outcome, "command", peak, seconds, remarks=remarks)

    def evaluate(self, samples: int, trained: int) -> Reading:
        """Raises `UsageError`: the command decides by itself what it runs."""
        raise UsageError("a command's evaluation cannot be run alone")

    def sample_tokens(self) -> int:
        """Raises `UsageError`: the command decides by itself what a sample is."""
        raise UsageError("a command's tokens cannot be counted")

    def compare(self, samples: int) -> Equivalence | None:
        return None  # the command's loss and gradients cannot be read

    def conditions(self) -> None:
        """None: it is not known what a command's trials depend on (its files, their imports, its data)."""

    def fresh(self) -> None:
        """Does nothing: every run has its own process."""

    def _ignored(self) -> bool:
        """True if the peak is the same at two sizes that differ by a factor of 4 or more. A difference of more than 1 % is not noise."""
        if len(self._peaks) < 2 or max(self._peaks) < 4 * min(self._peaks):
            return False
        low, high = self._peaks[min(self._peaks)], self._peaks[max(self._peaks)]
        return high <= low * 1.01

    def _run(self, words: list[str], cap_bytes: int) -> tuple[int | None, str, int]:
        """Runs the command once. Returns its exit code, its output, and the largest resident bytes of any of its processes.

        The exit code is None if the command did not finish in time.
        """
        environment, cap = dict(os.environ), "none"
        if self._facts.kind == "cpu" and LINUX:
            environment |= {name: str(value) for name, value in STEADY_MALLOC.items()} if steady_wanted() else {}
            cap = str(cap_bytes)
        elif self._facts.kind != "cpu":
            fraction = min(cap_bytes / self._memory.total_bytes, 1.0)
            settings = environment.get("PYTORCH_CUDA_ALLOC_CONF", "")
            environment["PYTORCH_CUDA_ALLOC_CONF"] = ",".join(filter(None, [settings, f"per_process_memory_fraction:{fraction:.6f}"]))
        report_in, report_out = os.pipe()
        process = subprocess.Popen(
            [sys.executable, _CAPPED_PROCESS, str(report_out), cap, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=(report_out,),
            start_new_session=True,
        )
        os.close(report_out)
        pieces: list[str] = []
        listener = threading.Thread(target=self._listen, args=(process, pieces), daemon=True)
        listener.start()
        try:
            ended = select.select([report_in], [], [], self._limits.timeout_s)[0]
            answer = os.read(report_in, 1000) if ended else b""
        finally:
            os.close(report_in)
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            listener.join(timeout=1)  # a process that left the group may keep the pipe open
        output = "".join(pieces)[-_OUTPUT_CHARS:]
        if not ended:
            return None, output, 0
        if not answer:  # the out-of-memory killer may also kill the small process in between
            return -signal.SIGKILL, output, 0
        figures = json.loads(answer)
        return figures["code"], output, figures["ru_maxrss"] * (1 if sys.platform == "darwin" else KIB)

    def _listen(self, process: subprocess.Popen[bytes], pieces: list[str]) -> None:
        assert process.stdout is not None  # Popen was called with stdout=PIPE
        with process.stdout as output:
            while chunk := os.read(output.fileno(), 65536):
                text = chunk.decode(errors="replace")
                pieces.append(text)
                if sum(map(len, pieces)) > 4 * _OUTPUT_CHARS:
                    pieces[:] = ["".join(pieces)[-_OUTPUT_CHARS:]]
                self._on_output(text)


def _device(label: str) -> tuple[Facts, Memory]:
    """The facts of the device and its memory. This process does not touch the device, because its CUDA context would be counted."""
    if label == "cpu" or (label == "auto" and not devices.accelerator_driver()):
        cpu = Cpu()
        memory = cpu.memory()
        # The command is another process: none of its memory is held by this one.
        return cpu.facts, Memory(memory.total_bytes, memory.free_bytes, 0, 0, memory.others, memory.binding_limit)
    listing = subprocess.run([sys.executable, "-m", "autoaccum", "devices", "--json"], capture_output=True, text=True, check=False)
    if listing.returncode != 0:
        raise DeviceError(f"the devices could not be asked: {listing.stderr.strip() or listing.stdout.strip()}")
    rows = json.loads(listing.stdout)["devices"]
    kind, _, index = label.partition(":")
    for row in rows:
        if label == "auto" and row["kind"] == "cpu":
            return _device("cpu")
        if label == "auto" or (row["kind"] == kind and (row["index"] or 0) == int(index or 0)):
            if row["kind"] not in ("cpu", "cuda"):
                raise NoSuchDevice(f"a command's memory on {row['kind']} cannot be capped from outside: use a JOB file, or --device cpu")
            facts = Facts(row["kind"], row["index"], row["name"], row["uuid"])
            return facts, Memory(row["total_bytes"], row["free_bytes"], 0, None, (), row["binding_limit"])
    raise NoSuchDevice(f"there is no {label} here; devices: {', '.join(row['kind'] for row in rows)}")
