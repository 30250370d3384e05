"""`WrittenFiles`: what a command wrote into the user's folders while it was tried."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

_MOST_FILES = 20_000  # a larger folder is not looked at whole
_SKIPPED = {"__pycache__", "node_modules"}


class WrittenFiles:
    """Looks at the folders that a command may write into: the one it runs in, and those that it names."""

    def __init__(self, words: Iterable[str]) -> None:
        named = [part for word in words for part in (word, word.partition("=")[2]) if part and os.path.isdir(part)]
        self._roots = list(dict.fromkeys(os.path.realpath(root) for root in [_here(), *named] if root))
        self._before = dict(self._listed())

    def since(self) -> list[str]:
        """The files that are new or changed since this object was made, as paths relative to where they were looked for."""
        changed = (path for path, mark in self._listed() if self._before.get(path) != mark)
        here = _here()
        return sorted(os.path.relpath(path, here) if here and path.startswith(here + os.sep) else path for path in changed)

    def _listed(self) -> Iterator[tuple[str, tuple[int, int]]]:
        left = _MOST_FILES
        unseen = list(self._roots)
        while unseen and left > 0:
            try:
                with os.scandir(unseen.pop()) as entries:
                    for entry in entries:
                        left -= 1
                        if entry.is_dir(follow_symlinks=False):
                            if not entry.name.startswith(".") and entry.name not in _SKIPPED and not Path(entry.path, "pyvenv.cfg").exists():
                                unseen.append(entry.path)
                        elif entry.is_file(follow_symlinks=False):
                            status = entry.stat(follow_symlinks=False)
                            yield entry.path, (status.st_mtime_ns, status.st_size)
            except OSError:
                continue  # not ours to read, or gone


def _here() -> str:
    try:
        return os.getcwd()
    except OSError:
        return ""  # the folder was deleted
