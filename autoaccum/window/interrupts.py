"""Ctrl-C while a job's state is changed: held back until the state is put back."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupts:
    """SIGINT, held back except inside `allowed`."""

    def __init__(self) -> None:
        self.raises = False
        self.waiting = False

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """A Ctrl-C interrupts what is inside, once; one that came before does so at once."""
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
    """Holds SIGINT back inside, except where the `Interrupts` it yields allows it. Does nothing outside the main thread."""
    interrupts = Interrupts()
    before = signal.getsignal(signal.SIGINT)
    # A handler that was installed from outside Python (None) cannot be put back, so it is left alone.
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield interrupts
        return

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        if not interrupts.raises:
            interrupts.waiting = True
            return
        interrupts.raises = False  # a further one waits until the state is back
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
