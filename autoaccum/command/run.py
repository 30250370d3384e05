"""`run`: one run of a command under a cap, and the `Run` that tells what was seen of it.

Between this process and the command stands `capped_process`, which counts the memory of all the command's processes and leaves none behind.
In the command's Python processes, `startup_hook` writes down what training did.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from autoaccum.units import KIB

_OUTPUT_CHARS = 64 * KIB
_PACKAGE = Path(__file__).parent.parent
_IMPORT_SECONDS = 20.0  # after which a Python process that has not imported torch is taken to train without it
_ENDING_SECONDS = 10.0  # within which capped_process has ended everything


@dataclass(frozen=True)
class UsedDevice:
    """A CUDA device that a process used. index: in that process. uuid: None if its torch does not tell it. peak_bytes: the most it reserved."""

    index: int
    uuid: str | None
    peak_bytes: int

    @classmethod
    def read(cls, words: str) -> UsedDevice:
        index, uuid, peak = words.split()
        return cls(int(index), None if uuid == "-" else uuid, int(peak))


@dataclass(frozen=True)
class Evidence:
    """What a command's Python processes wrote down (see `startup_hook`).

    is_python: True if a process is Python. shows_steps: True if one imported torch, so that steps of an optimizer would be seen. stepped_at: when the first was made, on the
    monotonic clock. steps: the most in one process. world: ranks of a process group. shrunk: what goes on with a smaller batch after an
    out-of-memory, and did. refused: allocations that torch's CUDA allocator refused. used: the CUDA devices on which memory was reserved.
    uncapped: True if the cap was not in force at the end on one of them.
    """

    is_python: bool = False
    shows_steps: bool = False
    stepped_at: float | None = None
    steps: int = 0
    world: int = 0
    shrunk: str = ""
    refused: int = 0
    used: tuple[UsedDevice, ...] = ()
    uncapped: bool = False

    @classmethod
    def read(cls, path: Path) -> Evidence:
        found: dict[str, list[str]] = {}
        for line in path.read_text(errors="replace").splitlines():
            kind, _, value = line.partition(" ")
            found.setdefault(kind, []).append(value)
        times = [float(value) for value in found.get("step", ())]
        return cls(
            "python" in found,
            "torch" in found,
            min(times, default=None),
            max(map(int, found.get("steps", ())), default=1 if times else 0),
            max(map(int, found.get("world", ())), default=0),
            next(iter(found.get("shrunk", ())), ""),
            sum(map(int, found.get("refused", ()))),
            tuple(UsedDevice.read(value) for value in found.get("used", ())),
            "uncapped" in found,
        )


@dataclass(frozen=True)
class Run:
    """How a command ended.

    code: its exit code, negative for a signal; None if it was ended by us. ended_for: why: "timeout", "trained" (it trained for as long
    as was asked), "memory" (its processes held more than they may), or "".
    peak_bytes: the most resident bytes of all its processes together, what they share counted once. That sum is taken 50 times a
    second; the largest process alone is known exactly.
    """

    code: int | None
    ended_for: str
    output: str
    peak_bytes: int
    world: int
    evidence: Evidence


@contextmanager
def trial_folder() -> Iterator[Path]:
    """A folder of a trial's own: `scratch` is the command's, `hook` is in front on its PYTHONPATH. It is removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="autoaccum-"))
    try:
        for name in ("scratch", "hook", "configs"):
            (folder / name).mkdir()
        (folder / "evidence").touch()
        shutil.copyfile(_PACKAGE / "startup_hook.py", folder / "hook" / "sitecustomize.py")
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run(
    words: Sequence[str],
    folder: Path,
    *,
    environment: Mapping[str, str],
    data_bytes: int | None,
    most_bytes: int | None,
    timeout_s: float | None,
    trial_s: float | None,
    on_output: Callable[[str], None],
) -> Run:
    """Runs the command once, and ends all its processes.

    folder: of `trial_folder`. environment: added to this process's own. data_bytes: RLIMIT_DATA of each process, or None.
    most_bytes: what all its processes together may hold, or None. timeout_s: seconds until it is ended. trial_s: seconds of training
    until it is ended, from the first optimizer step if that can be seen, else from the start, or 20 seconds later for Python without torch.
    """
    pythonpath = os.pathsep.join(filter(None, [str(folder / "hook"), os.environ.get("PYTHONPATH")]))
    own = {"PYTHONPATH": pythonpath, "AUTOACCUM_EVIDENCE": str(folder / "evidence"), "TMPDIR": str(folder / "scratch")}
    report_in, report_out = os.pipe()
    options = json.dumps({"data_bytes": data_bytes, "most_bytes": most_bytes, "parent": os.getpid(), "folder": str(folder)})
    process = subprocess.Popen(
        [sys.executable, "-I", str(_PACKAGE / "capped_process.py"), str(report_out), options, *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **own, **environment},
        pass_fds=(report_out,),
        start_new_session=True,
    )
    os.close(report_out)
    listener = _Listener(process, on_output)
    listener.start()
    started, ended_for = time.monotonic(), ""
    try:
        while not ended_for and not select.select([report_in], [], [], 0.2)[0]:
            now = time.monotonic()
            if timeout_s is not None and now - started >= timeout_s:
                ended_for = "timeout"
            elif trial_s is not None:
                began = _training_since(Evidence.read(folder / "evidence"), started)
                if began is not None and now - began >= trial_s:
                    ended_for = "trained"
        if ended_for:
            process.send_signal(signal.SIGINT)
        answered = select.select([report_in], [], [], _ENDING_SECONDS)[0]
        answer = os.read(report_in, 4096) if answered else b""
    finally:
        os.close(report_in)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)  # it ends what it started
            with suppress(subprocess.TimeoutExpired):
                process.wait(_ENDING_SECONDS)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        listener.join(timeout=1)
    evidence = Evidence.read(folder / "evidence")
    if not answer:  # the out-of-memory killer may also kill the small process in between
        return Run(None if ended_for else -signal.SIGKILL, ended_for, listener.output, 0, evidence.world, evidence)
    told = json.loads(answer)
    peak_bytes = max(told["ru_maxrss"] * (1 if sys.platform == "darwin" else KIB), told["together_bytes"])
    return Run(told["code"], "memory" if told["over"] else ended_for, listener.output, peak_bytes, max(told["world"], evidence.world), evidence)


def _training_since(evidence: Evidence, started: float) -> float | None:
    """When training began; None if it has not begun. Without torch that is not seen, and Python may still be importing it."""
    if evidence.shows_steps:
        return evidence.stepped_at
    return started + _IMPORT_SECONDS if evidence.is_python else started


class _Listener(threading.Thread):
    """Reads what a process prints, hands it on, and keeps the end of it."""

    def __init__(self, process: subprocess.Popen[bytes], on_output: Callable[[str], None]) -> None:
        super().__init__(name="autoaccum-command-output", daemon=True)
        self._process, self._on_output, self._pieces = process, on_output, [""]

    def run(self) -> None:
        assert self._process.stdout is not None  # Popen was called with stdout=PIPE
        with self._process.stdout as output:
            while chunk := os.read(output.fileno(), 65536):
                text = chunk.decode(errors="replace")
                self._pieces.append(text)
                if sum(map(len, self._pieces)) > 4 * _OUTPUT_CHARS:
                    self._pieces[:] = [self.output]
                self._on_output(text)

    @property
    def output(self) -> str:
        return "".join(self._pieces)[-_OUTPUT_CHARS:]
