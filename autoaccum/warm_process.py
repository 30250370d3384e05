"""A process that has imported torch and forks the children that simulate, so that each of them starts at once.

Importing torch takes one to three seconds, and one question may need ten children: simulating a job changes torch for good, so each
changed job has a process of its own. Only simulations start so. Where memory is measured, the pages that a fork shares with its
parent would count differently from run to run.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress

# Read while Python and torch start. All other variables are set in each child.
_READ_AT_START = ("PYTHON", "TORCH", "PYTORCH", "LD_", "OMP_", "MKL_", "CUDA_", "NVIDIA_")


class ForkedProcess:
    """As much of `subprocess.Popen` as a `Child` uses.

    pid: the process, which leads a session of its own. status: a descriptor from which its exit code can be read once it has ended.
    origin: the warm process, which ends with its children when nobody refers to it any more.
    """

    def __init__(self, pid: int, status: int, origin: WarmProcess) -> None:
        self.pid, self._status, self._origin = pid, status, origin
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self) -> int:
        """The exit code, negative for a signal, as in `Popen.returncode`."""
        if self.returncode is None:
            text = os.read(self._status, 32)
            os.close(self._status)
            self.returncode = int(text) if text else -signal.SIGKILL  # without a text the warm process has ended, and its children with it
        return self.returncode


class WarmProcess:
    """Starts the warm process. program: the words that run `serve` with a socket's descriptor and this process's id."""

    def __init__(self, program: Callable[[int], list[str]], environment: dict[str, str]) -> None:
        self._socket, theirs = socket.socketpair()
        self._lock = threading.Lock()
        self._owner, self._environment = os.getpid(), _read_at_start(environment)
        with theirs:
            self._process = subprocess.Popen(
                program(theirs.fileno()),
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )
        weakref.finalize(self, _end, self._socket, self._process, self._owner)

    def serves(self, environment: dict[str, str]) -> bool:
        """True if a child with this environment can be forked from it, by this process."""
        return self._owner == os.getpid() and self._environment == _read_at_start(environment) and self._process.poll() is None

    def fork(self, environment: dict[str, str], receive: int, send: int, output: int) -> ForkedProcess | None:
        """A child that answers requests on `receive` and `send` and prints to `output`; None if the warm process has ended."""
        status, theirs = os.pipe()
        request = json.dumps({"environment": environment, "folder": os.getcwd()}).encode()
        try:
            with self._lock:
                socket.send_fds(self._socket, [len(request).to_bytes(8, "big")], [receive, send, output, theirs])
                self._socket.sendall(request)
                pid = int.from_bytes(_exactly(self._socket, 8), "big")
        except (OSError, EOFError):
            os.close(status)
            return None
        finally:
            os.close(theirs)
        return ForkedProcess(pid, status, self)


def _end(ours: socket.socket, process: subprocess.Popen[bytes], owner: int) -> None:
    ours.close()
    if os.getpid() == owner:  # and not a fork of it, which ends earlier
        process.kill()
        process.wait()


def serve(modules: Sequence[str], main: Callable[[int, int, int], None], descriptor: int, parent: int, idle_seconds: float = 60.0) -> None:
    """Imports `modules`, and forks a child for each request until the parent ends or closes the socket, or has had no child for `idle_seconds`.

    In the child it calls `main(receive, send, process that forked it)`.
    """
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # a warning of torch; simulations do not need NumPy
    for name in modules:
        importlib.import_module(name)

    with socket.socket(fileno=descriptor) as requests:
        statuses: dict[int, int] = {}
        woken, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake)
        used = time.monotonic()
        while os.getppid() == parent:
            ready = select.select([requests.fileno(), woken], [], [], min(1.0, idle_seconds))[0]
            if ready or statuses:
                used = time.monotonic()
            elif time.monotonic() - used > idle_seconds:  # it holds as much memory as torch takes
                break
            if woken in ready:
                os.read(woken, 512)
            for pid in list(statuses):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    with suppress(BrokenPipeError):  # the parent waits no more
                        os.write(statuses[pid], str(os.waitstatus_to_exitcode(status)).encode())
                    os.close(statuses.pop(pid))
            if requests.fileno() not in ready:
                continue
            head, descriptors, _, _ = socket.recv_fds(requests, 8, 4)
            if not head:
                break
            request = json.loads(_exactly(requests, int.from_bytes(head, "big")))
            server = os.getpid()
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for kept in (woken, wake, *statuses.values()):
                    os.close(kept)
                requests.close()
                _become(main, request, descriptors, server)
            statuses[pid] = descriptors.pop()
            for passed in descriptors:
                os.close(passed)
            requests.sendall(pid.to_bytes(8, "big"))
    for pid in statuses:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def _become(main: Callable[[int, int, int], None], request: dict[str, object], descriptors: list[int], server: int) -> None:
    """Makes the forked process one child, and ends it."""
    code = 1
    try:
        receive, send, output, status = descriptors
        os.setsid()
        os.close(status)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        environment, folder = request["environment"], request["folder"]
        assert isinstance(environment, dict) and isinstance(folder, str)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        main(receive, send, server)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        os._exit(code)


def _exactly(stream: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        part = stream.recv(count - len(found))
        if not part:
            raise EOFError
        found += part
    return found


def _read_at_start(environment: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(_READ_AT_START)}
