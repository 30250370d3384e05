"""The reading cache: a file of readings for each job and device.

The key holds everything that changes a reading. It does not hold the target batch or the budget, because these differ in every run.
A file is written under a temporary name and then renamed, so a reader sees a complete file, also after a kill.
If two processes write at the same time, the later one wins. The readings of the earlier one are measured again.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from autoaccum import files
from autoaccum.errors import AutoaccumWarning, in_brief
from autoaccum.probe.readings import Conditions, Reading
from autoaccum.units import MIB, number, unit_for

SCHEMA = "autoaccum.readings/1"
FOLDER = "AUTOACCUM_CACHE_DIR"
_TEMPORARY_PREFIX = ".autoaccum-"  # of a file that is not yet complete
_MAX_READINGS = 64  # of one job
_STORED_OUTCOMES = ("fits", "over-budget", "oom", "killed", "kernel-limit")  # a timeout says nothing about memory
_NOISE_BYTES = 4 * MIB  # on a CPU, the peaks of two processes that do the same differ by up to this much
_STALE_S = 3600.0  # no process still writes a temporary file of this age


def folder() -> Path:
    """The folder of the cache files: AUTOACCUM_CACHE_DIR, or a folder in the system's cache folder."""
    configured = os.environ.get(FOLDER)
    if configured:
        return Path(configured)
    import platformdirs

    return Path(platformdirs.user_cache_dir("autoaccum")) / "readings"


@dataclass(frozen=True)
class _StoredReading:
    """A reading and the conditions of its trial.

    budget_bytes: the budget of the trial. floor_bytes: what the process held before the first trial.
    target: the target batch. It counts if the whole window lies in the measured memory.
    """

    reading: Reading
    budget_bytes: int
    floor_bytes: int
    target: int


class ReadingCache:
    """The stored readings of one job on one device.

    label: the job's name in the file. conditions: what the readings depend on. about: more of the key, such as the device.
    If a file or folder cannot be used, the methods warn and do not raise. The readings are then measured again.
    """

    def __init__(self, label: str, conditions: Conditions, about: dict[str, Any]) -> None:
        self._label, self._now = label, conditions
        self._key = {**about, **conditions.key}
        self._path = folder() / f"{hashlib.sha256(json.dumps(self._key, sort_keys=True).encode()).hexdigest()[:32]}.json"

    def known(self, target: int, budget_bytes: int) -> list[Reading]:
        """The stored readings, converted to a window of `target` samples and to this process.

        The outcome is the one under this budget. A reading that does not decide the outcome is left out,
        for example an out-of-memory under a smaller budget.
        """
        readings = []
        for stored in self._read():
            shift_bytes = self._now.floor_bytes - stored.floor_bytes + self._now.sample_bytes * (target - stored.target)
            reading = stored.reading
            shifted = replace(
                reading,
                peak_bytes=reading.peak_bytes and reading.peak_bytes + shift_bytes,
                base_bytes=reading.base_bytes and reading.base_bytes + shift_bytes,
                activation_bytes=reading.activation_bytes and reading.activation_bytes + shift_bytes,
                cached=True,
            )
            stored_budget = stored.budget_bytes + shift_bytes
            same_budget = abs(budget_bytes - stored_budget) <= _NOISE_BYTES  # then the outcome is the same
            if reading.outcome in ("fits", "over-budget"):
                if shifted.peak_bytes is not None:
                    fits = reading.outcome == "fits" if same_budget else shifted.peak_bytes <= budget_bytes
                    # An allocator reserves more if it may. Under a smaller budget it may reserve less, but never less than the live tensors take.
                    if fits or same_budget or reading.outcome != "fits" or (shifted.activation_bytes or shifted.peak_bytes) > budget_bytes:
                        readings.append(replace(shifted, outcome="fits" if fits else "over-budget"))
            elif same_budget or budget_bytes <= stored_budget:
                readings.append(replace(shifted, peak_bytes=None, activation_bytes=None))  # the trial ended before its peak
        return readings

    def keep(self, readings: Iterable[Reading], target: int, budget_bytes: int) -> None:
        """Adds the new readings to the file. For one size, the newest reading stays."""
        new = [
            _StoredReading(entry, entry.budget_bytes if entry.budget_bytes is not None else budget_bytes, self._now.floor_bytes, target)
            for entry in readings
            # A doubtful out-of-memory is not entry: the library uses the same message for other failures.
            if not entry.cached
            and entry.limited
            and not entry.doubtful
            and entry.outcome in _STORED_OUTCOMES
            and (entry.peak_bytes is not None or entry.outcome != "fits")
        ]
        if not new:
            return
        of_size: dict[tuple[int, bool, bool], _StoredReading] = {}
        for entry in (*self._read(), *new):
            size = (entry.reading.micro_batch, entry.reading.accumulation_steps > 1, entry.reading.fits)
            of_size.pop(size, None)
            of_size[size] = entry
        self._write(list(of_size.values())[-_MAX_READINGS:])

    def forget(self) -> None:
        """Removes the file, because its readings proved wrong."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _read(self) -> list[_StoredReading]:
        try:
            if not self._path.exists():
                return []
            document = json.loads(files.read_text(self._path))
        except (files.Unreadable, OSError, ValueError, RecursionError) as error:
            return self._ignored(str(error))
        try:
            if document["schema"] != SCHEMA or document["key"] != self._key:
                return self._ignored("it is of another program, or of another job")
            return [_checked(fields) for fields in document["kept"]]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            return self._ignored(f"{type(error).__name__}: {error}")

    def _ignored(self, why: str) -> list[_StoredReading]:
        warnings.warn(f"the remembered readings in {self._path} cannot be used and are replaced: {why}", AutoaccumWarning, stacklevel=2)
        return []

    def _write(self, stored: Sequence[_StoredReading]) -> None:
        document = {
            "schema": SCHEMA,
            "job": self._label,
            "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "key": self._key,
            "kept": [asdict(reading) for reading in stored],
        }
        place = self._path.parent
        try:
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            if why := _not_safe(place) or _not_safe(self._path):
                raise OSError(0, why)
            files.write_text(self._path, json.dumps(document), mode=0o600)
            _sweep(place)
        except OSError as error:
            warnings.warn(
                f"readings cannot be remembered in {in_brief(place)}: {error.strerror or error}; set {FOLDER}, or --no-cache", AutoaccumWarning, stacklevel=2
            )


def _not_safe(path: Path) -> str:
    """Why nothing is kept there: a link may lead anywhere, and what everybody may write, others may replace."""
    if path.is_symlink():
        return "it is a link, and links are not followed here"
    try:
        status = path.stat()
    except FileNotFoundError:
        return ""
    return "everybody may write there" if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX else ""


def _checked(fields: dict[str, Any]) -> _StoredReading:
    """A stored reading from its JSON object. Raises `TypeError` if a value has the wrong type."""
    stored = _StoredReading(Reading.from_dict(fields["reading"]), fields["budget_bytes"], fields["floor_bytes"], fields["target"])
    reading = stored.reading
    integers = (reading.micro_batch, reading.accumulation_steps, stored.budget_bytes, stored.floor_bytes, stored.target)
    if not all(isinstance(value, int) for value in integers) or reading.outcome not in _STORED_OUTCOMES:
        raise TypeError("its readings are not whole")
    if not all(value is None or isinstance(value, int) for value in (reading.peak_bytes, reading.base_bytes, reading.activation_bytes)):
        raise TypeError("its peaks are not bytes")
    return stored


def _sweep(place: Path) -> None:
    """Removes old temporary files of processes that were killed while they wrote. Other files stay."""
    for path in place.glob(f"{_TEMPORARY_PREFIX}*.tmp"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE_S:
                path.unlink()


def documents() -> list[dict[str, Any]]:
    """The jobs in the cache. For each job: its file, name, device, time of writing, and readings. Files of other programs are skipped."""
    jobs = []
    for path in sorted(folder().glob("*.json")):
        with suppress(files.Unreadable, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            document = json.loads(files.read_text(path))
            if document["schema"] == SCHEMA and all(isinstance(text, str) for text in (document["job"], document["key"]["device"], document["written"])):
                readings = [
                    {name: stored["reading"][name] for name in ("micro_batch", "accumulation_steps", "outcome", "peak_bytes")} for stored in document["kept"]
                ]
                job = {"file": str(path), "job": document["job"], "device": document["key"]["device"], "written": document["written"], "readings": readings}
                jobs.append(job)
    return jobs


def clear() -> int:
    """Removes the cache files and returns how many jobs they held. Other files in the folder stay."""
    removed = 0
    for document in documents():
        with suppress(OSError):
            os.unlink(document["file"])
            removed += 1
    _sweep(folder())
    return removed


def listed() -> str:
    """The cache as a text table, one line for each job."""
    rows = []
    for job in documents():
        measured = [reading for reading in job["readings"] if reading["outcome"] in ("fits", "over-budget") and reading["peak_bytes"]]
        largest = max(measured, key=lambda reading: reading["micro_batch"], default=None)
        unit = unit_for(largest["peak_bytes"]) if largest else ""
        cell = f"{largest['micro_batch']} at {number(largest['peak_bytes'], unit)} {unit}" if largest else ""
        row = f"{job['written'][:16].replace('T', ' ')}  {len(job['readings']):>8}  {cell:22}{job['device']:28}{job['job']}"
        rows.append("".join(letter if letter.isprintable() else "?" for letter in row))  # a file of somebody else may hold control characters
    head = f"{'written':16}  {'readings':>8}  {'largest':22}{'device':28}job"
    return "\n".join([head, *rows]) if rows else f"nothing is remembered in {folder()}"
