"""`Progress`: how far a loop has come, so that a later run, with other ranks if need be, goes on behind the last finished window."""

from __future__ import annotations

import logging
import signal
import threading
from typing import Any

from autoaccum.data import Window, Windows
from autoaccum.errors import PlanError, UsageError

log = logging.getLogger("autoaccum")
SCHEMA = "autoaccum.loop/1"


class Progress:
    """The windows that a loop has finished, the place in the data behind the last one, and whether it ends after the window that runs.

    target: what a window holds, samples or tokens. alone: True on one rank, which need not ask others before it stops. The state knows neither
    ranks nor shares.
    """

    def __init__(self, target: int, *, alone: bool) -> None:
        self._target, self._alone = target, alone
        self.windows = 0
        self._place: dict[str, int] | None = None
        self._resumed: dict[str, int] | None = None  # a place that the next `Windows` begin at
        self._loader: Windows | None = None
        self.is_asked = False  # on this rank
        self.is_stopping = False  # on all ranks, after the same window
        self._asked_by = ""

    @property
    def epoch(self) -> int:
        """The epoch in which the last finished window lies."""
        return 0 if self._place is None else self._place["epoch"]

    def through(self, windows: Windows) -> Windows:
        """These windows, from the place of a loaded state on, until the loop is to stop."""
        if self._resumed is not None:
            windows.load_state_dict(self._resumed)
            self._resumed = None
        elif self._loader is not None:
            windows.after(self._loader)
        windows.ends = self._ends
        self._loader = windows
        return windows

    def finished(self, window: Window, *, stops: bool) -> None:
        """Called after each window. stops: a rank has been asked to stop."""
        self.windows += 1
        self._place = window.position
        if stops:
            self._stop()

    def state(self) -> dict[str, Any]:
        """The state after the last finished window. Raises `PlanError` if the place in the data cannot be found again."""
        if self.windows and self._place is None:
            if self._loader is not None:
                self._loader.state_dict()  # says why
            raise PlanError(
                "where the last window lies in the data is not known: loop over loop.windows(loader), and the state has the place behind the last finished window"
            )
        return {"schema": SCHEMA, "target": self._target, "windows": self.windows, "place": self._place}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from a state. Raises `PlanError` for a state of something else, or of another target."""
        if not isinstance(state, dict) or state.get("schema") != SCHEMA:
            raise PlanError("this is no state of an Accumulator: give what loop.state_dict() returned")
        if state["target"] != self._target:
            raise PlanError(f"the state is of windows of {state['target']}, and this loop's target is {self._target}: its windows would be others")
        self.windows, self._place = state["windows"], state["place"]
        self._resumed = None if self._place is None else dict(self._place)

    def stop_on(self, *signals: int) -> None:
        """Stops after the window that runs, now or when one of these signals comes. Raises `UsageError` outside the main thread."""
        if not signals:
            self._ask("")
            return
        if threading.current_thread() is not threading.main_thread():
            raise UsageError("stop_at_window_end(signal) sets a signal's handler, which Python allows in the main thread only: call it there")
        for number in signals:
            before = signal.getsignal(number)

            def asked(number: int, _: Any, before: Any = before) -> None:
                self._ask(f", as {signal.Signals(number).name} asked")
                signal.signal(number, before if before is not None else signal.SIG_DFL)  # a second one does what it did before

            signal.signal(number, asked)

    def _ask(self, by: str) -> None:
        self.is_asked, self._asked_by = True, by

    def _stop(self) -> None:
        if not self.is_stopping:
            self.is_stopping = True
            log.warning("stopped after window %d%s: its step is done, and loop.state_dict() says where to go on", self.windows, self._asked_by)

    def _ends(self) -> bool:
        if self._alone and self.is_asked:  # between two windows
            self._stop()
        return self.is_stopping
