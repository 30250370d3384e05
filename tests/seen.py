"""`Seen`: what a job's own functions saw, also in the copies of the process in which trials run."""

import json
import os
import tempfile


class Seen:
    """A list of plain values that several processes append to."""

    def __init__(self):
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 # open as long as the object lives

    def append(self, value):
        os.write(self._file.fileno(), json.dumps(value).encode() + b"\n")  # one descriptor, whose position all processes share

    def clear(self):
        os.ftruncate(self._file.fileno(), 0)
        os.lseek(self._file.fileno(), 0, os.SEEK_SET)

    def __iter__(self):
        size = os.fstat(self._file.fileno()).st_size
        return iter([json.loads(line) for line in os.pread(self._file.fileno(), size, 0).splitlines()])

    def __len__(self):
        return sum(1 for _ in self)

    def __eq__(self, other):
        return list(self) == list(other)
