"""Doors of rooms: what a room hands on is imported when it is first asked for, so that torch is loaded only where it is needed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any


def lazily(room: str, **files: str) -> Callable[[str], Any]:
    """The `__getattr__` of a room's `__init__`. files: for each file of the room, the names that it hands on, separated by blanks.

    A room's own modules need no entry: Python imports them by itself.
    """
    file_of = {name: file for file, names in files.items() for name in names.split()}

    def look_up(name: str) -> Any:
        if name not in file_of:
            raise AttributeError(f"module {room!r} has no attribute {name!r}")
        value = getattr(import_module(f"{room}.{file_of[name]}"), name)
        setattr(sys.modules[room], name, value)
        return value

    return look_up
