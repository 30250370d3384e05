"""The `Rehearser` of a command: each trial runs an unmodified script with the numbers filled in.

The command runs under a memory cap that is set from outside. The outcome of a trial comes from the command's exit code, its output, the
resident bytes of its processes, and what they wrote down of their training.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

from autoaccum import devices, oom
from autoaccum.command.run import Evidence, Run, UsedDevice, run, trial_folder
from autoaccum.command.template import Template
from autoaccum.command.written_files import WrittenFiles
from autoaccum.devices import LINUX, STEADY_MALLOC, Budget, Cpu, Facts, Memory, make_budget, steady_wanted
from autoaccum.errors import DeviceError, JobFailed, NoSuchDevice, UsageError, signal_name
from autoaccum.probe import Equivalence, Limits, Outcome, Reading, Subject, own_program

_LESS = 0.97  # a peak below this part of that of a smaller size is no noise


class RanksFound(Exception):
    """The command runs on another number of ranks than was assumed."""

    def __init__(self, world: int) -> None:
        super().__init__(world)
        self.world = world


class Command:
    """A `Rehearser` whose trials are runs of a command. Between two runs nothing is left to put back.

    world: the ranks that it runs on, which share the device's memory on a CPU. on_output: called with the text that the command prints.
    Raises `JobFailed` if the command fails for another reason than memory.
    """

    def __init__(self, template: Template, device: str, limits: Limits, *, world: int = 1, on_output: Callable[[str], None]) -> None:
        self._template, self._limits, self._on_output, self.world = template, limits, on_output, world
        self._facts, self._memory = _device(device)
        self._peaks: dict[int, int] = {}
        self._steps: dict[int, int] = {}
        self._written: list[str] | None = None
        self.enforces = LINUX or self._facts.kind == "cuda"

    def subject(self) -> Subject:
        remarks = []
        if not self._template.accumulates:
            remarks.append("the command has no {accumulation_steps}: the effective batch is the target only if the script works out the steps itself")
        if self.ignores_size():
            remarks.append(self.ignored_words())
        elif dropped := next(((low, high) for low, high in pairwise(sorted(self._peaks)) if self._peaks[high] < _LESS * self._peaks[low]), None):
            remarks.append(
                f"the command took less memory at a micro-batch of {dropped[1]} than at {dropped[0]}: it may have made its batch smaller by itself, or trained less"
            )
        if self._steps and not any(self._steps.values()):
            remarks.append("no optimizer of torch made a step in any trial: let the command train for a step or two, or its memory is not that of training")
        if self._written:
            remarks.append(
                f"the first trial wrote into your folders{self._wrote()}: write {{scratch}} or {{micro_batch}} into the path of what the command writes, and "
                "remove what is there if it would resume from it"
            )
        allocator = ("steady malloc" if steady_wanted() else "default malloc") if self._facts.kind == "cpu" and LINUX else ""
        fingerprint = hashlib.sha256("\0".join(self._template.words).encode()).hexdigest()[:16]
        return Subject(self._facts, 0, fingerprint, (), 0, allocator, tuple(remarks))

    def runs_on(self, world: int) -> None:
        """Forgets the runs so far, whose numbers were for another number of ranks."""
        self.world = world
        self._peaks.clear()
        self._steps.clear()

    def ignored_words(self) -> str:
        """A sentence for a command whose memory does not depend on the micro-batch."""
        low, high = min(self._peaks), max(self._peaks)
        return (
            f"the command takes as much at a micro-batch of {high} as at {low}: check that it reads the flags given, that memory depends on them, "
            "and that it does not make its batch smaller by itself"
        )

    def budget(self, *, limited: bool = True) -> Budget:
        limit = self._limits.memory_bytes if limited else None
        return make_budget(self._memory, kind=self._facts.kind, limit_bytes=limit, headroom=self._limits.headroom)

    def measure(self, micro_batches: Sequence[int], *, full: bool = False, limited: bool = True, windows: int = 2) -> Reading:
        """Runs the command once. Raises `RanksFound` if it runs on another number of ranks than was assumed."""
        size, steps = micro_batches[0], len(micro_batches)
        allowed = self.budget(limited=limited)
        written = WrittenFiles(self._template.words) if self._written is None else None
        started = time.monotonic()
        with trial_folder() as folder:
            words = self._template.filled(size, steps, str(folder / "scratch"), folder / "configs", world=self.world)
            found = self._run(words, folder, allowed.budget_bytes)
        seconds = time.monotonic() - started
        if written is not None:
            self._written = written.since()
        if found.world and found.world != self.world:
            raise RanksFound(found.world)
        peak = found.peak_bytes if self._facts.kind == "cpu" else self._peak_on_device(found.evidence)
        outcome, remarks = self._outcome(found, words, size)
        if self._facts.kind != "cpu" and outcome == "fits":
            remarks += _on_the_cap(found.evidence)
        if outcome == "fits" and peak is not None and peak > allowed.budget_bytes:
            outcome = "over-budget"
        if outcome in ("fits", "over-budget"):
            self._check_steps(size, found)
            if peak is not None and self._facts.kind == "cpu":
                self._peaks[size] = peak
        # The peak of a command that was ended is not whole.
        return Reading(size, steps, outcome, "command", peak if outcome in ("fits", "over-budget") else None, seconds, remarks=remarks)

    def _peak_on_device(self, evidence: Evidence) -> int | None:
        """The most that a process reserved on the device. Raises `UsageError` if the command trained on another one."""
        if not evidence.used:
            return None
        here = [each for each in evidence.used if _is(self._facts, each)]
        if not here and self.world == 1:
            other = evidence.used[0]
            raise UsageError(
                f"the command trained on cuda:{other.index} and the memory that counts is that of {self._facts.label}: take --device cuda:{other.index}, or let the "
                f"command train on {self._facts.label}"
            )
        return max(each.peak_bytes for each in here or evidence.used)

    def _outcome(self, found: Run, words: Sequence[str], size: int) -> tuple[Outcome, tuple[str, ...]]:
        """The outcome as far as the run alone tells it, and remarks. Raises `JobFailed` if the command failed for another reason than memory."""
        code, output = found.code, found.output
        if found.ended_for == "timeout":
            return "timeout", ()
        if found.ended_for == "memory":
            return "oom", ()
        oom_message = oom.in_output(output, on_cpu=self._facts.kind == "cpu")
        if code == 127 and not oom_message:
            raise UsageError(f"the command cannot be started: {output.strip().splitlines()[-1] if output.strip() else words[0]}")
        if found.evidence.shrunk:
            return "oom", (
                f"the command ran out of memory at a micro-batch of {size} and went on with a smaller one by itself ({found.evidence.shrunk}): taken as not "
                "fitting; it has no reason to at the size planned",
            )
        if oom_message and code not in (-signal.SIGKILL, 137):
            said = (
                f"the command printed an out-of-memory message at {size} and ended with exit code 0: taken as not fitting ({oom_message[:120]!r}; if that is "
                "but a text of its data, let it not be printed)"
            )
            return "oom", (said,) if code == 0 or found.ended_for else ()
        if found.ended_for == "trained":
            return "fits", ()
        if code is None or oom.was_killed(code, output):
            return "killed", ()
        if code != 0 and "per_process_memory_fraction" in output:
            raise DeviceError(
                "the command's torch cannot be capped from outside (it does not know per_process_memory_fraction in PYTORCH_CUDA_ALLOC_CONF): "
                "use a newer torch there, or a JOB file"
            )
        if code != 0:
            how = f"was ended by {signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
            last = "\n".join(output.strip().splitlines()[-8:])
            raise JobFailed(f"the command {how}, which is not an out-of-memory: {shlex.join(words)}", text=last, whole=output)
        if found.evidence.refused:
            return "fits", (
                f"the command's torch was refused memory {found.evidence.refused} times at a micro-batch of {size} and went on: check that the script does not "
                "make its batch smaller by itself",
            )
        return "fits", ()

    def _check_steps(self, size: int, found: Run) -> None:
        """Raises `UsageError` if the command trained in one trial and not in another: then it resumed and had nothing to do."""
        if not found.evidence.shows_steps:
            return
        self._steps[size] = found.evidence.steps
        trained, idle = [each for each, steps in self._steps.items() if steps], [each for each, steps in self._steps.items() if not steps]
        if trained and idle:
            raise UsageError(
                f"the command made {self._steps[trained[0]]} optimizer steps at a micro-batch of {trained[0]} and none at {idle[0]}, so its trials tell nothing: "
                f"it resumes from what an earlier one wrote{self._wrote()}, or ends before a step; let it write into {{scratch}}, "
                "which is another folder in each trial, and start anew"
            )

    def _wrote(self) -> str:
        if not self._written:
            return ""
        more = f" and {len(self._written) - 2} more" if len(self._written) > 2 else ""
        return f" ({', '.join(self._written[:2])}{more})"

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

    def ignores_size(self) -> bool:
        """True if the peak is the same at two sizes that differ by a factor of 4 or more. A difference of more than 1 % is not noise."""
        if len(self._peaks) < 2 or max(self._peaks) < 4 * min(self._peaks):
            return False
        low, high = self._peaks[min(self._peaks)], self._peaks[max(self._peaks)]
        return low * _LESS <= high <= low * 1.01

    def _run(self, words: list[str], folder: Path, cap_bytes: int) -> Run:
        environment: dict[str, str] = {}
        data_bytes = most_bytes = None
        if self._facts.kind == "cpu" and LINUX:
            environment |= {name: str(value) for name, value in STEADY_MALLOC.items()} if steady_wanted() else {}
            # All processes together are held to the budget. One that meets a limit of its own could go on with a smaller batch by itself, so
            # each is stopped only where the machine has no more.
            data_bytes, most_bytes = max(self.budget(limited=False).budget_bytes, cap_bytes), cap_bytes
        elif self._facts.kind != "cpu":
            environment |= _capping(cap_bytes, self._memory.total_bytes)
        return run(
            words,
            folder,
            environment=environment,
            data_bytes=data_bytes,
            most_bytes=most_bytes,
            timeout_s=self._limits.timeout_s,
            trial_s=self._limits.trial_s,
            on_output=self._on_output,
        )


_FRACTION = re.compile(r"per_process_memory_fraction:\s*([0-9.]+)")


def _capping(cap_bytes: int, total_bytes: int) -> dict[str, str]:
    """The environment under which torch reserves no more than the cap: the user's settings of the allocator with ours, under both of its names."""
    settings = os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or os.environ.get("PYTORCH_ALLOC_CONF") or ""
    fraction = min(cap_bytes / total_bytes, *map(float, _FRACTION.findall(settings)), 1.0)
    merged = ",".join(
        [*(word for word in re.split(r",(?![^\[]*\])", settings) if word and not _FRACTION.match(word.strip())), f"per_process_memory_fraction:{fraction:.6f}"]
    )
    return {"PYTORCH_CUDA_ALLOC_CONF": merged, "PYTORCH_ALLOC_CONF": merged, "AUTOACCUM_CAP_BYTES": str(int(fraction * total_bytes))}


def _on_the_cap(evidence: Evidence) -> tuple[str, ...]:
    """A remark if it is not certain that the cap held inside the command."""
    if evidence.uncapped:
        return ("the command lifted the limit on its CUDA memory while it ran, so that it fits is not certain: let it not set a memory fraction",)
    if not evidence.used:
        return (
            "nothing was seen of CUDA memory inside the command (no Python with torch that ended by itself), so it is not certain that the limit held: leave headroom",
        )
    return ()


def _is(facts: Facts, used: UsedDevice) -> bool:
    """True if a process of the command used this device. Numbers differ where it set CUDA_VISIBLE_DEVICES itself."""
    return used.uuid == facts.uuid if used.uuid is not None and facts.uuid is not None else used.index == facts.index


def _device(label: str) -> tuple[Facts, Memory]:
    """The facts of the device and its memory. This process does not touch the device, because its CUDA context would be counted."""
    if label == "cpu" or (label == "auto" and not devices.accelerator_driver()):
        cpu = Cpu()
        memory = cpu.memory()
        # The command is another process: none of its memory is held by this one.
        return cpu.facts, Memory(memory.total_bytes, memory.free_bytes, 0, 0, memory.others, memory.binding_limit)
    listing = subprocess.run(own_program("from autoaccum.cli import main; main(['devices', '--json'])"), capture_output=True, text=True, check=False)
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
