"""All exceptions of autoaccum, with the exit code of the command line for each.

AutoaccumError                    base of all; its `exit_code` is the number in this table
├── UsageError                2   an argument or option has a wrong value: a size, a flag, a path
├── JobError                  5   the job could not be loaded, built or understood
│   └── JobFailed             5   the job's own code failed in another process
├── NothingFits               3   not even the smallest micro-batch fits the budget
├── OutOfMemory               3   a micro-batch of a size that the user set ran out of memory
├── DeviceError               4   the device failed
│   ├── NoSuchDevice          4   the requested device does not exist here
│   └── MemoryUnknown         4   no source gave the amount of memory; the message names the sources
├── RanksDisagree             4   the ranks of one job came to different results
├── ProfileError              2   a GPU data file is wrong
├── PlanError                 2   a plan, a size or a batch cannot be used in this way
└── MissingExtra              2   an optional dependency is not installed

An exception from the user's own code in this process is never wrapped in one of these: the same exception is
raised again, with a note (see `noted`). The message of each error contains the value and the remedy.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

_MOST_CHARACTERS = 40_000


def without_middle(text: str, most: int = _MOST_CHARACTERS) -> str:
    """A text without its middle if it is very long: some messages hold a whole dataset."""
    return text if len(text) <= most else f"{text[: most // 2]}\n... {len(text) - most} characters ...\n{text[-most // 2 :]}"


def in_brief(value: object, most: int = 200) -> str:
    """`repr` of a value from the user, cut if it is long."""
    text = repr(os.fspath(value) if isinstance(value, os.PathLike) else value)
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-20:]} ({len(text)} characters)"


def signal_name(number: int) -> str:
    """The name of a signal, such as SIGSEGV; of a real-time signal, its number."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class AutoaccumError(Exception):
    """Base of all errors of autoaccum. `exit_code` is the exit code of the command line."""

    exit_code = 2


class AutoaccumWarning(UserWarning):
    """The category of all warnings of autoaccum, for `warnings.filterwarnings`."""


class JobError(AutoaccumError):
    """The job could not be loaded, or what it returned has the wrong shape."""

    exit_code = 5


class JobFailed(JobError):
    """The job's own code failed in a child process. The exception itself cannot be sent to this process.

    kind: the name of the exception's class, or "" if the process ended without an exception.
    text: the part to show: the user's frames, or the last lines that the process printed.
    whole: the full traceback; by default `text`.
    """

    def __init__(self, message: str, *, kind: str = "", text: str = "", whole: str = "") -> None:
        super().__init__(message)
        self.kind, self.text, self.whole = kind, text, whole or text


class UsageError(AutoaccumError, ValueError):
    """An argument or option has a wrong value: a size, a flag, a path."""


class NothingFits(AutoaccumError):
    """Not even the smallest micro-batch fits. `budget_bytes` is the memory budget; `trials` are the trials that ran. `needs_bytes` is what the smallest one
    takes; None if it was not measured.

    what_if: the documents of changed jobs, where `tune --what-if` asked for them.
    """

    exit_code = 3

    def __init__(self, message: str, *, budget_bytes: int = 0, trials: Sequence[Any] = (), needs_bytes: int | None = None) -> None:
        super().__init__(message)
        self.budget_bytes, self.needs_bytes = budget_bytes, needs_bytes
        self.trials = tuple(trials)
        self.what_if: list[dict[str, Any]] = []


class OutOfMemory(AutoaccumError):
    """A micro-batch of a size that the user set does not fit. `trials` are the trials that ran."""

    exit_code = 3

    def __init__(self, message: str, *, trials: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.trials = tuple(trials)


class DeviceError(AutoaccumError):
    """The device failed. The cause is neither the job nor the micro-batch size."""

    exit_code = 4


class NoSuchDevice(DeviceError):
    """The requested device does not exist on this machine."""


class MemoryUnknown(DeviceError):
    """No source gave the amount of memory. The message names the sources."""


class RanksDisagree(AutoaccumError):
    """The ranks of one job came to different results, or a rank failed or is missing."""

    exit_code = 4


class ProfileError(AutoaccumError):
    """A GPU data file is wrong."""


class PlanError(AutoaccumError):
    """A plan, a size or a batch cannot be used in this way."""


class MissingExtra(AutoaccumError):
    """A required optional dependency is not installed."""


def in_short(error: BaseException) -> str:
    """The user's frames of a traceback as text, without the frames of autoaccum, of libraries and of Python; "" if there are none."""
    package_folder = str(Path(__file__).parent) + os.sep
    library_folder = os.path.join(sys.base_prefix, "lib") + os.sep
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((package_folder, library_folder, "<frozen")) and "site-packages" not in frame.filename
    ]
    header = ["Traceback (your frames; --traceback shows all):\n"] if frames else []
    return "".join([*header, *traceback.format_list(frames)])


Raised = TypeVar("Raised", bound=BaseException)


def noted(error: Raised, note: str) -> Raised:
    """Adds a note to `error` and returns it. Tracebacks print the note below the error.

    `BaseException.add_note` exists from Python 3.11. On Python 3.10 this function sets the attribute `__notes__` itself: newer tools
    and our command line read it, and the traceback printer of 3.10 ignores it.
    """
    if hasattr(error, "add_note"):
        error.add_note(note)
    else:
        error.__notes__ = [*getattr(error, "__notes__", ()), note]  # type: ignore[attr-defined]
    return error


def from_document(document: dict[str, Any]) -> AutoaccumError:
    """The error that another process sent with `as_document`. An autoaccum error keeps its class; any other becomes a `JobFailed`."""
    error_class = globals().get(document["type"])
    if document["ours"] and isinstance(error_class, type) and issubclass(error_class, AutoaccumError):
        return error_class(document["message"])
    return JobFailed(document["message"], kind=document["type"], text=document["short"], whole=document["whole"])


def as_document(error: Exception) -> dict[str, Any]:
    """An error as a dict of JSON values, from which another process makes an error again with `from_document`."""
    notes = [str(note) for note in getattr(error, "__notes__", ())]
    return {
        "type": type(error).__name__,
        "ours": isinstance(error, AutoaccumError),
        "message": without_middle("\n".join([str(error), *notes]) if not isinstance(error, AutoaccumError) else str(error)),
        "short": in_short(error),
        "whole": without_middle("".join(traceback.format_exception(error))),
    }
