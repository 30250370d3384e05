"""The `Rehearser` that runs its trials in a child process.

The parent stays small and does not import torch. If the child hangs or is killed for memory, this is an outcome of the trial
and the parent goes on. Parent and child exchange JSON lines over two inherited descriptors. The job's own output goes to stderr.
`multiprocessing` is not used, because its spawn imports the caller's `__main__` again and pickles.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from autoaccum import errors, oom
from autoaccum.devices import LINUX, Budget, Cpu, Memory
from autoaccum.errors import from_document
from autoaccum.probe.readings import Conditions, Equivalence, Limits, Reading, Subject, after_death
from autoaccum.warm_process import ForkedProcess, WarmProcess
from autoaccum.window import PhaseCallback, Source

FORK_ALL = "AUTOACCUM_FORK_ALL"  # 1 forks measured children of a CPU too: for tests, which start hundreds of them
_START_SECONDS = 5.0  # of Python and torch, which are not the job's
_FOLDER = str(Path(__file__).parent.parent.parent)  # in which the package lies
_OWN = "import sys; folder = sys.argv.pop(1); sys.path[:] = [entry for entry in sys.path if entry]; folder in sys.path or sys.path.append(folder); "


class _Died(Exception):
    """The child ended without an answer. code: as in `Popen.returncode`; None if the parent ended the child after the timeout."""

    def __init__(self, code: int | None) -> None:
        super().__init__(code)
        self.code = code


class _Process:
    """One process of a `Child`: its pipes, and the end of what it printed. program: starts it with two descriptors for requests and answers, and one for its output."""

    def __init__(self, program: Callable[[int, int, int], subprocess.Popen[bytes] | ForkedProcess], on_output: Callable[[str], None]) -> None:
        self._in, theirs_out = os.pipe()
        theirs_in, self._out = os.pipe()
        output, theirs_output = os.pipe()
        self.process = program(theirs_in, theirs_out, theirs_output)
        for descriptor in (theirs_in, theirs_out, theirs_output):
            os.close(descriptor)
        self._on_output, self._buffer, self.tail = on_output, b"", ""
        self._listener = threading.Thread(target=self._listen, args=(output,), name="autoaccum-child-output", daemon=True)
        self._listener.start()

    def request(self, verb: str, arguments: dict[str, Any]) -> None:
        """Asks something; the answer comes in a `line`. Raises `_Died`."""
        try:
            os.write(self._out, json.dumps({"do": verb, **arguments}).encode() + b"\n")
        except BrokenPipeError:
            raise self._death() from None

    def line(self, deadline: float | None) -> Any:
        """The next message. Raises `_Died`, also after the deadline, at which the process is ended."""
        while b"\n" not in self._buffer:
            # Wait in slices: a process that the job forked may keep the pipe open after the child has ended.
            wait_s = 0.5 if deadline is None else min(max(deadline - time.monotonic(), 0), 0.5)
            if not select.select([self._in], [], [], wait_s)[0]:
                if self.process.poll() is not None and not select.select([self._in], [], [], 0)[0]:
                    raise self._death()
                if deadline is not None and time.monotonic() >= deadline:
                    self.end()
                    raise _Died(None)
                continue
            chunk = os.read(self._in, 65536)
            if not chunk:
                raise self._death()
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def end(self) -> None:
        if self._in < 0:
            return  # it has ended already
        self.kill()
        self.process.wait()
        self._listener.join(timeout=1)  # a grandchild that left the group may keep the pipe open
        for descriptor in (self._in, self._out):
            os.close(descriptor)
        self._in = self._out = -1

    def _death(self) -> _Died:
        code = self.process.wait()
        self.end()
        return _Died(code)

    def _listen(self, output: int) -> None:
        with open(output, "rb", buffering=0) as stream:
            while chunk := stream.read(65536):
                text = chunk.decode(errors="replace")
                self.tail = (self.tail + text)[-4000:]
                self._on_output(text)


class Child:
    """A `Rehearser` whose trials run in a child process. A context manager.

    on_phase: called with each phase, for live progress.
    on_output: called with the text that the job prints.
    Raises `JobFailed` if the job's own code raises, and the errors of loading the job.
    """

    def __init__(
        self, source: Source, device: str, limits: Limits, *, on_phase: PhaseCallback | None = None, on_output: Callable[[str], None] | None = None
    ) -> None:
        self._source, self._device, self._limits = source, device, limits
        self._on_phase, self._on_output = on_phase, on_output or _to_stderr
        self._phase = "build"
        self._approximate = ""
        self._spare: _Process | None = None  # started ahead, for the run that confirms
        self.enforces = True

    def __enter__(self) -> Child:
        self._start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.end()
        if self._spare is not None:
            self._spare.end()

    def subject(self) -> Subject:
        return Subject.from_dict(self._subject)

    def budget(self, *, limited: bool = True) -> Budget:
        try:
            answer = self._ask("budget", limited=limited)
        except _Died as death:
            raise errors.JobFailed(f"the job's process ended between two trials (exit code {death.code})", text=self._process.tail.strip()) from None
        return Budget(**{**answer, "memory": Memory.from_dict(answer["memory"])})

    def measure(self, micro_batches: Sequence[int], *, full: bool = False, limited: bool = True, windows: int = 2) -> Reading:
        timeout_s = self._limits.timeout_of(len(micro_batches), full=full, windows=windows)
        sizes = list(micro_batches)
        if not full and self._spare is None and self._may_start_ahead():
            self._spare = self._launched()
        return self._trial("measure", sizes[0], len(sizes), full, timeout_s, micro_batches=sizes, full=full, limited=limited, windows=windows)

    def evaluate(self, samples: int, trained: int) -> Reading:
        return self._trial("evaluate", samples, 1, False, self._limits.timeout_s, samples=samples, trained=trained)

    def _trial(self, verb: str, size: int, steps: int, whole: bool, timeout_s: float | None, **arguments: Any) -> Reading:
        started = time.monotonic()
        self._phase, self._has_run = "batch", True
        try:
            answer = self._ask(verb, timeout_s=timeout_s, **arguments)
        except _Died as death:
            reading = self._reading_after_death(death, size, steps, time.monotonic() - started, whole)
            self._start()
            return reading
        if not answer.pop("clean"):
            self._process.end()
            self._start()
        return Reading.from_dict(answer)

    def sample_tokens(self) -> int:
        try:
            return int(self._ask("sample_tokens"))
        except _Died as death:
            raise errors.JobFailed(f"the job's process ended while it made a batch (exit code {death.code})", text=self._process.tail.strip()) from None

    def compare(self, samples: int) -> Equivalence | None:
        self._phase, self._has_run = "compare", True
        try:
            answer = self._ask("compare", timeout_s=self._limits.timeout_s, samples=samples)
        except _Died:
            self._start()
            return None
        return None if answer is None else Equivalence.from_dict(answer)

    def conditions(self) -> Conditions | None:
        if self._subject["predicted"]:
            return None
        try:
            return Conditions(**self._ask("conditions"))
        except _Died:
            self._start()
            return None

    def fresh(self) -> None:
        if self._has_run and not self._subject["predicted"]:
            self._process.end()
            self._start()

    def simulated(self, verb: str, **arguments: Any) -> Any:
        """The answer of a simulating child to its verb "estimated", "taped" or "timed", as plain values.

        Raises `JobFailed` if the child's process ends.
        """
        try:
            return self._ask(verb, **arguments)
        except _Died as death:
            raise errors.JobFailed(f"the job's process ended while it was simulated (exit code {death.code})", text=self._process.tail.strip()) from None

    def kill(self) -> None:
        """Kills the child, from another thread. The thread that waits for the child gets `JobFailed`."""
        self._process.kill()

    def _reading_after_death(self, death: _Died, micro_batch: int, steps: int, seconds: float, full: bool) -> Reading:
        def reading(outcome: Any) -> Reading:
            return Reading(micro_batch, steps, outcome, self._phase, None, seconds, full=full)

        if death.code is None:
            return reading("timeout")
        # libgomp and C++ end the process when memory runs out; Python cannot catch this.
        if oom.in_output(self._process.tail) and death.code != -signal.SIGKILL:
            return reading("oom")
        try:
            return after_death(reading("oom"), death.code, enforced=self.enforces)
        except errors.JobFailed as failure:
            failure.text = failure.whole = self._process.tail.strip()
            raise

    def _may_start_ahead(self) -> bool:
        """True if the next process may be started while this one runs trials: beside a core for it, memory for twice the user's limit is free.

        Without a limit the budget follows from what is free, and a second process would take of that.
        """
        limit, forks = self._limits.memory_bytes, self._device.startswith("virtual:") or os.environ.get(FORK_ALL) == "1"
        if not LINUX or limit is None or forks or self._subject["device"]["kind"] != "cpu":
            return False
        return len(os.sched_getaffinity(0)) > 1 and Cpu().memory(who=False).free_bytes > 2 * limit

    def _launched(self) -> _Process:
        """A process that has been asked to build the job."""
        process = _Process(self._started, self._on_output)
        with suppress(_Died):  # who waits for the answer sees it
            process.request(
                "open",
                {
                    "source": asdict(self._source),
                    "device": self._device,
                    "limits": asdict(self._limits),
                    "path": sys.path,
                    "approximate": self._approximate,
                    "forked": isinstance(process.process, ForkedProcess),
                },
            )
        return process

    def _start(self) -> None:
        """Goes on with the process that was started ahead, or with a new one."""
        was_ahead = self._spare is not None
        self._process, self._spare = self._spare or self._launched(), None
        self._has_run, self._phase = False, "build"
        try:
            answer = self._answer(None if self._limits.timeout_s is None else self._limits.timeout_s + _START_SECONDS)
        except BaseException as error:
            self._process.end()
            if was_ahead and isinstance(error, Exception):  # the job may not stand another one beside it
                self._start()
                return
            if not isinstance(error, _Died):
                raise
            death = error
            if self._phase == "self-test" and not self._approximate:
                # An unexpected build of torch may end the process in the self-test. Then start again without torch's internals.
                self._approximate = f"this torch ended the process when CUDA tensors were faked (exit code {death.code})"
                self._start()
                return
            if death.code is None:
                raise errors.JobFailed(
                    f"importing and building the job took more than --timeout {self._limits.timeout_s:g} s: raise it, or look for a hang there",
                    text=self._process.tail.strip(),
                ) from None
            if death.code == -signal.SIGKILL or oom.in_output(self._process.tail):
                raise errors.NothingFits("the job ran out of memory while it was built, before any sample: give it more memory, or a smaller model") from None
            raise errors.JobFailed(f"the job ended the process while it was built (exit code {death.code})", text=self._process.tail.strip()) from None
        self._subject = answer["subject"]
        self.enforces = answer["enforces"]

    def _started(self, receive: int, send: int, output: int) -> subprocess.Popen[bytes] | ForkedProcess:
        environment = self._environment()
        if self._device.startswith("virtual:") or os.environ.get(FORK_ALL) == "1":
            forked = forked_process(environment, receive, send, output)
            if forked is not None:
                return forked
        return subprocess.Popen(
            own_program("from autoaccum.worker import main; main(*map(int, sys.argv[1:]))", receive, send, os.getpid()),
            pass_fds=(receive, send),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches only the parent, and the parent ends the child's whole group
            env=environment,
        )

    def _environment(self) -> dict[str, str]:
        # The parent is the rank. If the job in the child joined the process group, it would wait for the other ranks forever.
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
        if self._device.startswith("virtual:"):
            environment["CUDA_VISIBLE_DEVICES"] = ""  # a job that picks a card by itself must not use the real card
        return environment

    def _ask(self, verb: str, *, timeout_s: float | None = None, **arguments: Any) -> Any:
        self._process.request(verb, arguments)
        return self._answer(timeout_s)

    def _answer(self, timeout_s: float | None) -> Any:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            message = self._process.line(deadline)
            if "phase" in message:
                self._phase = message["phase"]
                if self._on_phase is not None:
                    self._on_phase(message["phase"], message["index"])
            elif "error" in message:
                raise from_document(message["error"])
            else:
                return message["answer"]


def forked_process(environment: dict[str, str], receive: int, send: int, output: int) -> ForkedProcess | None:
    """A child of the warm process, which is started where there is none; None where processes cannot be forked so."""
    if not sys.platform.startswith("linux"):
        return None
    with _starting:
        if not _warm or not _warm[0].serves(environment):
            _warm[:] = [WarmProcess(_warm_program, environment)]
    return _warm[0].fork(environment, receive, send, output)


_warm: list[WarmProcess] = []  # the newest, kept for as long as this process runs
_starting = threading.Lock()


def _warm_program(descriptor: int) -> list[str]:
    code = "from autoaccum.warm_process import serve; from autoaccum.worker import SIMULATING, main; serve(SIMULATING, main, *map(int, sys.argv[1:]))"
    return own_program(code, descriptor, os.getpid())


def own_program(code: str, *arguments: int) -> list[str]:
    """The words that run code of ours in a process of its own. `sys` is imported in it, and `arguments` are in `sys.argv[1:]`.

    The current folder is not on its path, in which a json.py of the user's may lie.
    """
    return [sys.executable, "-c", _OWN + code, _FOLDER, *map(str, arguments)]


def _to_stderr(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def die_with_parent(parent: int) -> None:
    """Makes this process end when its parent ends, for any reason. parent: the parent's process id. https://man7.org/linux/man-pages/man2/prctl.2.html"""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)
