"""A small program that runs one command under a memory cap, watches what all its processes hold, and leaves none of them behind.

    python capped_process.py REPORT_DESCRIPTOR OPTIONS WORD...

OPTIONS is a JSON object: "data_bytes", RLIMIT_DATA of each process, or null; "most_bytes", what all processes together may hold, or
null; "parent", the process that waits for the report; "folder", the trial's own.
It writes one JSON object to the report descriptor: "code", the exit code (negative for a signal), null if it was stopped; "over", true
if the processes held more than they may; "ru_maxrss", the kernel's largest resident size of one process, in its unit;
"together_bytes", the most that all processes held at one time; "world", the ranks that their environments tell, 0 for none.

SIGINT stops the command. SIGTERM and the death of the parent stop it too, and remove the trial's folder, which nobody else may be there to do.
It is started by its path and imports nothing from autoaccum: a child
inherits the kernel's figure of largest resident bytes from the process that forks it, and a parent that holds torch would pass on its own.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator

_LINUX = sys.platform.startswith("linux")
_SECONDS, _TREE_SECONDS, _SHARE = 0.02, 0.2, 0.05  # how often memory and the tree are looked at, and at most this share of one core
_LAST_SECONDS = 5.0  # how long processes may take to die
_WAKING = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT}
_RANKS = (("WORLD_SIZE", "RANK"), ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), ("PMI_SIZE", "PMI_RANK"))
_PAGE_BYTES = resource.getpagesize()


def main() -> None:
    """Runs the command, and writes its report."""
    report, options, words = int(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:]
    if _LINUX:
        _prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: this process is told when its parent ends
        _prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: what a command leaves behind becomes our child, and is ended
        if os.getppid() != options["parent"]:  # it ended before it could be noticed
            return
    signal.pthread_sigmask(signal.SIG_BLOCK, _WAKING)
    pid = os.fork()
    if pid == 0:
        os.close(report)
        _become(words, options["data_bytes"])
    watch = _Watch(options["most_bytes"])
    status, figures, over, signalled = _waited(pid, watch)
    told = {
        "code": None if status is None else os.waitstatus_to_exitcode(status),
        "over": over,
        "ru_maxrss": figures,
        "together_bytes": watch.peak_bytes,
        "world": watch.world,
    }
    with contextlib.suppress(BrokenPipeError):  # the parent is gone
        os.write(report, json.dumps(told).encode())
    # Not asked by who the parent is now: while its threads die one by one, it still is.
    if signalled not in (None, signal.SIGINT):
        import shutil

        shutil.rmtree(options["folder"], ignore_errors=True)


def _become(words: list[str], data_bytes: int | None) -> None:
    """Replaces this process, which was forked, by the command."""
    if _LINUX:
        _prctl(1, signal.SIGKILL)
    if data_bytes is not None:
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (data_bytes if hard == resource.RLIM_INFINITY else min(data_bytes, hard), hard))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _WAKING)
    try:
        os.execvp(words[0], words)
    except OSError as error:
        os.write(2, f"{words[0]}: {error.strerror}\n".encode())
    finally:
        os._exit(127)


def _waited(pid: int, watch: "_Watch") -> tuple[int | None, int, bool, int | None]:
    """Waits for the command. Returns its status, None if it was stopped, its largest resident size, if it was over the limit, and the signal
    that stopped it.

    No process of the command is left afterwards.
    """
    status, largest, over, signalled = None, 0, False, None
    while status is None and not over and signalled is None:
        woken = _signal_within(_SECONDS)
        signalled = None if woken == signal.SIGCHLD else woken
        for ended, ended_status, ended_largest in _reaped():
            if ended == pid:
                status, largest = ended_status, ended_largest
        if status is None and signalled is None and _LINUX:
            over = watch.is_over()
    deadline = time.monotonic() + _LAST_SECONDS
    while time.monotonic() < deadline:
        for process in _tree(os.getpid()) if _LINUX else [pid] if status is None else []:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)
        try:
            ended, _, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            break
        if ended == pid:
            largest = usage.ru_maxrss
        if ended == 0:
            _signal_within(_SECONDS)
    return status, largest, over, signalled


def _signal_within(seconds: float) -> int | None:
    if hasattr(signal, "sigtimedwait"):
        found = signal.sigtimedwait(_WAKING, seconds)
        return None if found is None else found.si_signo
    time.sleep(seconds)
    pending = signal.sigpending() & _WAKING
    return next(iter(sorted(pending - {signal.SIGCHLD})), None)


def _reaped() -> Iterator[tuple[int, int, int]]:
    """Yields (process, status, largest resident size) of every child that has ended."""
    while True:
        try:
            ended, status, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if ended == 0:
            return
        yield ended, status, usage.ru_maxrss


class _Watch:
    """What all processes below this one hold together: memory that they share counts once (Pss).

    peak_bytes: the most so far. world: the largest number of ranks that one of them was told in its environment.
    """

    def __init__(self, most_bytes: int | None) -> None:
        self._most_bytes, self.peak_bytes, self.world = most_bytes, 0, 0
        self._processes: list[int] = []
        self._next_tree = self._next_sum = 0.0

    def is_over(self) -> bool:
        """Looks once. True if the processes hold more than they may."""
        started = time.monotonic()
        if started >= self._next_tree:
            self._processes = _tree(os.getpid())
            for process in self._processes if not self.world else ():
                self.world = max(self.world, _world_of(process))
            ended = time.monotonic()
            self._next_tree = ended + max(_TREE_SECONDS, (ended - started) / _SHARE)
        resident = [bytes_ for bytes_ in map(_resident_bytes, self._processes) if bytes_]
        together = sum(resident)  # what is shared counts several times, so this is an upper bound
        started = time.monotonic()
        if together <= self.peak_bytes or (len(resident) > 1 and started < self._next_sum):
            return False
        if len(resident) > 1:
            together = sum(map(_proportional_bytes, self._processes))
            ended = time.monotonic()
            self._next_sum = ended + (ended - started) / _SHARE  # the kernel walks all pages for it
        self.peak_bytes = max(self.peak_bytes, together)
        return self._most_bytes is not None and together > self._most_bytes


def _tree(root: int) -> list[int]:
    """All processes below `root`."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            text = _text(f"/proc/{name}/stat")
            if text:  # the name of the program is in brackets and may hold anything
                children.setdefault(int(text.rpartition(")")[2].split()[1]), []).append(int(name))
    found, unseen = [], [root]
    while unseen:
        below = children.get(unseen.pop(), [])
        found += below
        unseen += below
    return found


def _resident_bytes(process: int) -> int:
    text = _text(f"/proc/{process}/statm")
    return int(text.split()[1]) * _PAGE_BYTES if text else 0


def _proportional_bytes(process: int) -> int:
    """Pss: private memory, and of shared memory this process's part. https://man7.org/linux/man-pages/man5/proc_pid_smaps.5.html"""
    for line in _text(f"/proc/{process}/smaps_rollup").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return _resident_bytes(process)  # an old kernel, or a process that has just ended


def _world_of(process: int) -> int:
    """The world size in the environment of a rank, unless it is in ours, too."""
    environment = dict(entry.partition("=")[::2] for entry in _text(f"/proc/{process}/environ").split("\0"))
    for size, rank in _RANKS:
        if rank in environment and environment.get(size, "").isdigit() and size not in os.environ:
            return int(environment[size])
    return 0


def _text(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return file.read().decode(errors="replace")
    except OSError:
        return ""  # the process has ended, or is not ours


def _prctl(option: int, value: int) -> None:
    """https://man7.org/linux/man-pages/man2/prctl.2.html"""
    ctypes.CDLL(None).prctl(option, value)


if __name__ == "__main__":
    main()
