"""Files that users name: read within bounds, and written where they are, completely or not at all."""

from __future__ import annotations

import os
import platform
import stat
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from autoaccum.units import MIB

MOST_BYTES = 64 * MIB  # of a plan, a profile or remembered readings; none comes near


class Unreadable(Exception):
    """A file cannot be read. Its text says why, without the file's name."""


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a regular file of at most `MOST_BYTES`. Raises `Unreadable`; never waits, as a FIFO or a device would make it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise Unreadable("it is a folder" if stat.S_ISDIR(status.st_mode) else "it is no regular file")
            content = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise Unreadable(getattr(error, "strerror", None) or str(error)) from None
    if len(content) > MOST_BYTES:
        raise Unreadable(f"it is larger than {MOST_BYTES // MIB} MiB")
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise Unreadable("it is no text") from None


def write_text(path: str | os.PathLike[str], text: str, *, mode: int = 0o666) -> None:
    """Writes a file completely or not at all. Raises `OSError`.

    A file that is there keeps its permissions, and a link its place: the file that it leads to is written. What is no regular file, such as
    /dev/stdout or a FIFO, is written to and never replaced. mode: the permissions of a new file, less the umask.
    """
    target = os.path.realpath(path)
    try:
        status = os.stat(path)
    except FileNotFoundError:
        permissions = None
    else:
        if not stat.S_ISREG(status.st_mode):
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
            return
        permissions = stat.S_IMODE(status.st_mode)
    # The name is unique, also in a folder that several machines share.
    temporary = os.path.join(os.path.dirname(target), f".autoaccum-{platform.node()}.{os.getpid()}.{time.monotonic_ns()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # without it, the rename may reach the disk before the content
        if permissions is not None:
            os.chmod(temporary, permissions)
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def why_not_writable(path: str | os.PathLike[str]) -> str:
    """Why a file cannot be written, or "" if it can be. Leaves nothing behind."""
    try:
        if os.path.isdir(path):
            return "it is a folder"
        if os.path.exists(path) and not os.path.isfile(path):
            return "" if os.access(path, os.W_OK) else "permission denied"
        target = os.path.realpath(path)
        folder = os.path.dirname(target)
        if not os.path.isdir(folder):
            return f"there is no folder {str(Path(path).parent)!r}"
        if len(os.path.basename(target).encode()) > 255:
            return "its name is too long"
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except (OSError, ValueError) as error:
        return (getattr(error, "strerror", None) or str(error)).lower()
