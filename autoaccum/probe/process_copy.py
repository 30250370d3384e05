"""A copy of this process, in which a trial may die: `in_copy` forks, runs a function there, and returns what it returned.

Libraries do not check every allocation: under a memory limit a trial may end its process, and some remember that they failed.
In a copy a death is an outcome, and this process stays as it was. Linux only.
"""

from __future__ import annotations

import contextvars
import ctypes
import faulthandler
import json
import mmap
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from autoaccum.devices import LINUX, fill_thread_pools
from autoaccum.window import PhaseCallback

_PAGE_BYTES = mmap.PAGESIZE
_HUNG_SECONDS = 30.0  # without any processor time
_MOST_PAGES = 2**22  # of one mapping
_POPULATE_READ = 22  # MADV_POPULATE_READ, https://man7.org/linux/man-pages/man2/madvise.2.html


class CopyDied(Exception):
    """The copy was ended by a signal, or ended itself. code: as in `Popen.returncode`. phase: the last one that was reached."""

    def __init__(self, code: int, phase: str) -> None:
        super().__init__(code, phase)
        self.code, self.phase = code, phase


class CopyRaised(Exception):
    """The function raised in the copy, or there was none. The exception itself cannot be handed over whole."""


class CopyHung(Exception):
    """The copy waits for something that was not copied, such as a lock that another thread held."""


def can_copy() -> bool:
    """True if a copy of this process can run what this process runs now."""
    if not LINUX or torch.cuda.is_initialized() or (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    return not torch._C._len_torch_dispatch_stack() and torch._C._len_torch_function_stack() <= (torch.get_default_device().type != "cpu")


def in_copy(work: Callable[[PhaseCallback], dict[str, Any]], on_phase: PhaseCallback | None) -> dict[str, Any]:
    """Runs `work` in a copy of this process and returns what it returned, which JSON can hold.

    work: gets a callback for phases, which calls `on_phase` here. Nothing that it changes is changed here.
    Raises `CopyDied`, `CopyRaised` and `CopyHung`.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()  # or the copy would print what waits in the buffer, too
    pages = _mapped_pages()
    receive, send = os.pipe()
    # What a signal's handler raises while Python forks is lost, and after the fork it would leave the copy behind.
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = os.fork()
    except OSError as error:  # no memory for its page tables, or no more processes
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
        os.close(receive)
        os.close(send)
        raise CopyRaised(f"no copy: {error.strerror}") from None
    if pid == 0:
        try:
            os.close(receive)
            _run(work, send, pages, unblocked)
        finally:
            os._exit(1)
    os.close(send)
    code: int | None = None
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
        answer, code, phase = _answer(pid, receive, on_phase)
    finally:
        os.close(receive)
        if code is None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if answer is None:
        raise CopyDied(code, phase)
    if "raised" in answer:
        raise CopyRaised(answer["raised"])
    result: dict[str, Any] = answer["result"]
    return result


def _answer(pid: int, receive: int, on_phase: PhaseCallback | None) -> tuple[dict[str, Any] | None, int | None, str]:
    """The copy's answer, its exit code if it has ended, and the last phase."""
    buffer, phase, code = b"", "batch", None
    moved, processor_time = time.monotonic(), -1
    while True:
        readable = select.select([receive], [], [], 0.2)[0]
        if readable:
            chunk = os.read(receive, 65536)
            buffer += chunk
            *lines, buffer = buffer.split(b"\n")
            for message in map(json.loads, lines):
                if "phase" not in message:
                    return message, code, phase
                phase = message["phase"]
                if on_phase is not None:
                    on_phase(phase, message["index"])
            if chunk:
                continue
        if code is not None:
            return None, code, phase
        # A process that the job forked may keep the pipe open after the copy has ended.
        ended, status = os.waitpid(pid, 0 if readable else os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            if readable:
                return None, code, phase
        elif (now_used := _processor_time(pid)) != processor_time:
            moved, processor_time = time.monotonic(), now_used
        elif time.monotonic() - moved > _HUNG_SECONDS:
            raise CopyHung


def _processor_time(pid: int) -> int:
    with open(f"/proc/{pid}/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    return int(fields[11]) + int(fields[12])


def _run(work: Callable[[PhaseCallback], dict[str, Any]], send: int, pages: list[tuple[int, int]], unblocked: set[Any]) -> None:
    """Runs `work` in the copy, and writes its result."""
    import resource

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the original, which ends the copy
    signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    faulthandler.disable()  # a death is an outcome here
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # if the system runs out, it is to end the copy and not the original
    _map(pages)
    lock = threading.Lock()

    def tell(message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        with lock:
            while data:
                data = data[os.write(send, data) :]

    # In a thread of its own: OpenMP's workers were not copied, and a new thread gets new ones. What torch keeps for each thread goes with it.
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
    autocast = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
    default, cached = torch.get_default_device(), torch.is_autocast_cache_enabled()

    def target() -> None:
        torch.set_num_threads(threads)
        torch.set_grad_enabled(grad)
        torch.set_autocast_cache_enabled(cached)
        for kind, enabled, dtype in autocast:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        if default.type != "cpu":
            torch.set_default_device(default)
        try:
            fill_thread_pools()
            tell({"result": work(lambda phase, index: tell({"phase": phase, "index": index}))})
        except BaseException as error:
            tell({"raised": type(error).__name__})

    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(target,))
    thread.start()
    thread.join()
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(0)


def hold_pages_of(process: int) -> None:
    """Maps the pages of files that `process` holds, of which this one is a fork, so that resident bytes count them here too."""
    _map(_mapped_pages(str(process)))


def _mapped_pages(process: str = "self") -> list[tuple[int, int]]:
    """(address, bytes) of the pages of files and of shared memory that this process, or another one, holds.

    A fork does not copy their entries, so they would be missing in the copy's resident bytes until it touches them.
    Bit 63 of an entry says that the page is there. https://docs.kernel.org/admin-guide/mm/pagemap.html
    """
    found = []
    try:
        with open(f"/proc/{process}/maps", encoding="utf-8", errors="replace") as maps, open(f"/proc/{process}/pagemap", "rb", buffering=0) as pagemap:
            for line in maps:
                span, permissions, _, _, inode = line.split(maxsplit=5)[:5]
                if permissions[0] != "r" or (inode == "0" and permissions[3] != "s"):
                    continue
                start, stop = (int(bound, 16) for bound in span.split("-"))
                pages = (stop - start) // _PAGE_BYTES
                if pages > _MOST_PAGES:
                    continue
                pagemap.seek(start // _PAGE_BYTES * 8)
                entries = bytearray(pagemap.read(pages * 8))
                if not entries:
                    continue
                held = torch.frombuffer(entries, dtype=torch.int64) < 0
                outside = torch.zeros(1, dtype=torch.int8, device="cpu")
                edges = torch.diff(held.to(torch.int8), prepend=outside, append=outside).nonzero().flatten()
                found += [(start + first * _PAGE_BYTES, (last - first) * _PAGE_BYTES) for first, last in edges.view(-1, 2).tolist()]
    except OSError:
        return []  # no /proc: then peaks in copies are some megabytes too low
    return found


def _map(pages: list[tuple[int, int]]) -> None:
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for address, size in pages:
        madvise(address, size, _POPULATE_READ)
