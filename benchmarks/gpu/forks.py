"""Many measurements side by side on one card, each in a process of its own, forked from one that has imported everything and touched no card.

Time on a card is dear, and most of a small measurement is importing torch: a fork has that behind it. What takes memory runs beside
others as long as all together fit; what takes time runs alone.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GIB = 2**30
CONTEXT_BYTES = 2**30  # of each process, beside what its case takes


@dataclass(frozen=True)
class Case:
    """name: its row's. words: what is to be done, for whoever does it. taken_bytes: about what it takes of the card."""

    name: str
    words: tuple[str, ...]
    taken_bytes: int = 2 * GIB
    timeout_s: float = 60.0
    alone: bool = False


@dataclass
class _Running:
    case: Case
    process: int
    began: float
    answer: Path
    said: Path


def run(
    cases: Iterable[Case],
    do: Callable[[tuple[str, ...]], dict[str, Any]],
    done: Callable[[Case, dict[str, Any]], None],
    *,
    ends: float,
    room_bytes: int,
    workers: int,
) -> list[Case]:
    """Does every case, and tells of each as it ends. Returns those that were not begun, or were cut off, when time was over.

    do: called in the fork, with the case's words; what it returns is the row. ends: as `time.monotonic()`.
    Cases that run alone wait until the others before them have ended; the order is kept otherwise where there is room.
    """
    waiting, running, left = list(cases), [], []
    with tempfile.TemporaryDirectory() as folder:
        number = 0
        while waiting or running:
            now = time.monotonic()
            for each in list(running):
                ended, status = os.waitpid(each.process, os.WNOHANG)
                late = now - each.began > each.case.timeout_s
                if not ended and not late and now < ends:
                    continue
                if not ended:
                    os.killpg(each.process, signal.SIGKILL)
                    _, status = os.waitpid(each.process, 0)
                running.remove(each)
                if not ended and not late:
                    left.append(each.case)
                    continue
                row = _row(each, status) if ended else {"failed": [f"took longer than {each.case.timeout_s:.0f} s", *_tail(each.said)]}
                done(each.case, {**row, "took_s": round(now - each.began, 2)})
            if now >= ends:
                left += waiting
                waiting = []
                continue
            taken = sum(each.case.taken_bytes + CONTEXT_BYTES for each in running)
            for case in list(waiting):
                if len(running) >= workers or any(each.case.alone for each in running) or (case.alone and running):
                    break
                if running and taken + case.taken_bytes + CONTEXT_BYTES > room_bytes:
                    continue
                waiting.remove(case)
                number += 1
                running.append(_begun(case, do, Path(folder) / f"{number}.json", Path(folder) / f"{number}.txt"))
                taken += case.taken_bytes + CONTEXT_BYTES
                if case.alone:
                    break
            time.sleep(0.01)
    return left


def _begun(case: Case, do: Callable[[tuple[str, ...]], dict[str, Any]], answer: Path, said: Path) -> _Running:
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return _Running(case, process, time.monotonic(), answer, said)
    code = 1
    try:
        os.setsid()
        output = os.open(said, os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        answer.write_text(json.dumps(do(case.words)))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # nothing of the parent's is to be torn down here


def _row(each: _Running, status: int) -> dict[str, Any]:
    if status == 0 and each.answer.exists():
        found: dict[str, Any] = json.loads(each.answer.read_text())
        return found
    return {"failed": _tail(each.said), "status": status}


def _tail(said: Path) -> list[str]:
    lines = said.read_text(errors="replace").strip().splitlines() if said.exists() else []
    return [line[:300] for line in lines[-12:]]
