"""Ctrl-C (SIGINT) while a job's state is changed: it is held back until the state is restored."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupts:
    """Holds SIGINT back, except inside `allowed`.

    raises: True while a SIGINT may interrupt. waiting: True if a SIGINT was held back.
    """

    def __init__(self) -> None:
        self.raises = False
        self.waiting = False

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Context in which Ctrl-C interrupts, once. A Ctrl-C that was held back before raises `KeyboardInterrupt` on entry."""
        self.raises = True
        try:
            if self.waiting:
                self.raises = self.waiting = False
                raise KeyboardInterrupt
            yield
        finally:
            self.raises = False


@contextmanager
def deferred_interrupts() -> Iterator[Interrupts]:
    """Context that holds SIGINT back, except where the yielded `Interrupts` allows it. Does nothing outside the main thread."""
    interrupts = Interrupts()
    before = signal.getsignal(signal.SIGINT)
    # Python cannot restore a handler that was installed outside Python (None), so such a handler is not replaced.
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield interrupts
        return

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        if not interrupts.raises:
            interrupts.waiting = True
            return
        interrupts.raises = False  # the next SIGINT waits until the state is restored
        _pass_on(before, number, frame)

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)
        if interrupts.waiting:
            _pass_on(before, signal.SIGINT, None)


def _pass_on(handler: Any, number: int, frame: FrameType | None) -> None:
    if callable(handler):
        handler(number, frame)
    elif handler == signal.SIG_DFL:
        raise KeyboardInterrupt
