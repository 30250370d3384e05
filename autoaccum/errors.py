"""Every way autoaccum can fail.

AutoaccumError                    everything below; carries the exit code of the command line
├── UsageError                2   a value that was given cannot be used: a size, a flag, a path
├── JobError                  5   the job could not be loaded, built or understood
│   └── JobFailed             5   the job's own code failed in another process
├── NothingFits               3   not even the smallest micro-batch fits the budget
├── OutOfMemory               3   a size that was asked for by name ran out of memory
├── DeviceError               4   the device itself is the trouble
│   ├── NoSuchDevice          4
│   └── MemoryUnknown         4   nobody could say how much memory there is; names who was asked
├── RanksDisagree             4   ranks of one job came to different answers
├── ProfileError              2   a GPU data file is wrong
├── PlanError                 2   a plan, a size or a batch that cannot be used as asked
└── MissingExtra              2   an optional dependency is not installed

An exception that the user's own code raises in this process is never wrapped in one of these: it is
raised again itself, with a note (see `noted`). The message of each error has the value and the remedy.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar


class AutoaccumError(Exception):
    """Base of all errors of autoaccum. `exit_code` is what the command line ends with."""

    exit_code = 2


class JobError(AutoaccumError):
    """The job could not be loaded, or what it returned has the wrong shape."""

    exit_code = 5


class JobFailed(JobError):
    """The job's own code failed in a child process, from which its exception cannot come over.

    kind: the exception's class, or "" where the process ended without one. text: what to show of it (the
    user's frames, or the last lines that were printed); whole: the full traceback.
    """

    def __init__(self, message: str, *, kind: str = "", text: str = "", whole: str = "") -> None:
        super().__init__(message)
        self.kind, self.text, self.whole = kind, text, whole or text


class UsageError(AutoaccumError, ValueError):
    """A value that was given cannot be used: a size, a flag, a path."""


class NothingFits(AutoaccumError):
    """Not even the smallest micro-batch fits. `budget_bytes` is what there was, `trials` what ran."""

    exit_code = 3

    def __init__(self, message: str, *, budget_bytes: int = 0, trials: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.budget_bytes = budget_bytes
        self.trials = tuple(trials)


class OutOfMemory(AutoaccumError):
    """A micro-batch that was asked for by name does not fit. `trials` is what ran."""

    exit_code = 3

    def __init__(self, message: str, *, trials: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.trials = tuple(trials)


class DeviceError(AutoaccumError):
    """The device is the trouble, not the job and not the size."""

    exit_code = 4


class NoSuchDevice(DeviceError):
    """The device that was asked for is not here."""


class MemoryUnknown(DeviceError):
    """Nobody who was asked could say how much memory there is."""


class RanksDisagree(AutoaccumError):
    """Ranks of one job came to different answers."""

    exit_code = 4


class ProfileError(AutoaccumError):
    """A GPU data file is wrong."""


class PlanError(AutoaccumError):
    """A plan or a batch cannot be used as asked."""


class MissingExtra(AutoaccumError):
    """An optional dependency is needed and not installed."""


def in_short(error: BaseException) -> str:
    """The user's frames of a traceback: neither ours, nor the libraries', nor Python's own; "" without any."""
    own = str(Path(__file__).parent) + os.sep
    library = os.path.join(sys.base_prefix, "lib") + os.sep
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((own, library, "<frozen")) and "site-packages" not in frame.filename
    ]
    header = ["Traceback (your frames; --traceback shows all):\n"] if frames else []
    return "".join([*header, *traceback.format_list(frames)])


Raised = TypeVar("Raised", bound=BaseException)


def noted(error: Raised, note: str) -> Raised:
    """`error` with a note that tracebacks print below it.

    `BaseException.add_note` exists from Python 3.11; on 3.10 the attribute it fills is set by hand,
    which newer tools (and our command line) read, and the old traceback printer ignores.
    """
    if hasattr(error, "add_note"):
        error.add_note(note)
    else:
        error.__notes__ = [*getattr(error, "__notes__", ()), note]  # type: ignore[attr-defined]
    return error


def from_document(document: dict[str, Any]) -> AutoaccumError:
    """The error that another process sent with `as_document`: ours by its class, the user's as `JobFailed`."""
    ours = globals().get(document["type"])
    if document["ours"] and isinstance(ours, type) and issubclass(ours, AutoaccumError):
        return ours(document["message"])
    return JobFailed(document["message"], kind=document["type"], text=document["short"], whole=document["whole"])


def as_document(error: Exception) -> dict[str, Any]:
    """An error in plain values, so that another process can raise it again with `from_document`."""
    notes = [str(note) for note in getattr(error, "__notes__", ())]
    return {
        "type": type(error).__name__,
        "ours": isinstance(error, AutoaccumError),
        "message": "\n".join([str(error), *notes]) if not isinstance(error, AutoaccumError) else str(error),
        "short": in_short(error),
        "whole": "".join(traceback.format_exception(error)),
    }
