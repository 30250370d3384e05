"""Remembers readings, by everything that changes them, and by neither target nor budget: those differ in every run.

One JSON file for each job and device. A file is written beside and then renamed, so that readers, other processes and a kill
at any moment see a whole one; of two that write at once the later one wins, and what the other had read is measured again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from autoaccum.probe.readings import Conditions, Reading
from autoaccum.units import MIB, number, unit_for

SCHEMA = "autoaccum.readings/1"
FOLDER = "AUTOACCUM_CACHE_DIR"
_BESIDE = ".autoaccum-"  # how files begin that are being written
_MOST = 64  # readings of one job
_TOLD = ("fits", "over-budget", "oom", "killed")  # a timeout says nothing of memory
_NOISE_BYTES = 4 * MIB  # by which processes that do the same differ on a CPU
_STALE_S = 3600.0  # a file half-written that long ago is nobody's any more


def folder() -> Path:
    """Where readings are kept: AUTOACCUM_CACHE_DIR, or the system's folder for caches."""
    told = os.environ.get(FOLDER)
    if told:
        return Path(told)
    import platformdirs

    return Path(platformdirs.user_cache_dir("autoaccum")) / "readings"


@dataclass(frozen=True)
class _Kept:
    """A reading and what it was read under, in bytes: what the process held before, and what it was allowed.

    Where whole windows lie in the measured memory, target: how many samples that was.
    """

    reading: Reading
    budget_bytes: int
    floor_bytes: int
    target: int


class ReadingCache:
    """The readings of one job on one device. Nothing here raises for a file or a folder that cannot be used: it warns, and forgets."""

    def __init__(self, label: str, conditions: Conditions, about: dict[str, Any]) -> None:
        self._label, self._now = label, conditions
        self._key = {**about, **conditions.key}
        self._path = folder() / f"{hashlib.sha256(json.dumps(self._key, sort_keys=True).encode()).hexdigest()[:32]}.json"

    def known(self, target: int, budget_bytes: int) -> list[Reading]:
        """What was read, as it would be in a window of `target` under this budget; without refusals that had less to spend."""
        found = []
        for each in self._read():
            more = self._now.floor_bytes - each.floor_bytes + self._now.sample_bytes * (target - each.target)
            told = each.reading
            shifted = replace(
                told,
                peak_bytes=told.peak_bytes and told.peak_bytes + more,
                base_bytes=told.base_bytes and told.base_bytes + more,
                activation_bytes=told.activation_bytes and told.activation_bytes + more,
                cached=True,
            )
            then = each.budget_bytes + more
            alike = abs(budget_bytes - then) <= _NOISE_BYTES  # with as much to spend, it went as it went
            if told.outcome in ("fits", "over-budget"):
                if shifted.peak_bytes is not None:
                    fits = told.outcome == "fits" if alike else shifted.peak_bytes <= budget_bytes
                    # What an allocator reserves grows with what it may: under less it may do with less, but not with less than tensors take.
                    if fits or alike or told.outcome != "fits" or (shifted.activation_bytes or shifted.peak_bytes) > budget_bytes:
                        found.append(replace(shifted, outcome="fits" if fits else "over-budget"))
            elif alike or budget_bytes <= then:
                found.append(replace(shifted, peak_bytes=None, activation_bytes=None))  # it saw but a part of its peak
        return found

    def keep(self, readings: Iterable[Reading], target: int, budget_bytes: int) -> None:
        """Adds what was read just now; of one size, the newest is kept."""
        new = [
            _Kept(each, each.budget_bytes if each.budget_bytes is not None else budget_bytes, self._now.floor_bytes, target)
            for each in readings
            # Of libraries that say "out of memory" for other failures, too, nothing is learnt.
            if not each.cached and each.limited and not each.doubtful and each.outcome in _TOLD and (each.peak_bytes is not None or each.outcome != "fits")
        ]
        if not new:
            return
        of_size: dict[tuple[int, bool, bool], _Kept] = {}
        for each in (*self._read(), *new):
            size = (each.reading.micro_batch, each.reading.accumulation_steps > 1, each.reading.fits)
            of_size.pop(size, None)
            of_size[size] = each
        self._write(list(of_size.values())[-_MOST:])

    def forget(self) -> None:
        """The readings proved wrong."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _read(self) -> list[_Kept]:
        try:
            document = json.loads(self._path.read_text())
        except FileNotFoundError:
            return []
        except (OSError, ValueError, RecursionError) as error:
            return self._ignored(str(error))
        try:
            if document["schema"] != SCHEMA or document["key"] != self._key:
                return self._ignored("it is of another program, or of another job")
            return [_whole(each) for each in document["kept"]]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            return self._ignored(f"{type(error).__name__}: {error}")

    def _ignored(self, why: str) -> list[_Kept]:
        warnings.warn(f"the remembered readings in {self._path} cannot be used and are replaced: {why}", stacklevel=2)
        return []

    def _write(self, kept: Sequence[_Kept]) -> None:
        document = {
            "schema": SCHEMA,
            "job": self._label,
            "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "key": self._key,
            "kept": [asdict(each) for each in kept],
        }
        # The name is nobody else's, also on a folder that several machines share.
        beside = self._path.with_name(f"{_BESIDE}{self._path.stem}.{os.uname().nodename}.{os.getpid()}.{time.monotonic_ns()}.tmp")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(beside, "w") as file:
                json.dump(document, file)
                file.flush()
                os.fsync(file.fileno())  # else a rename may reach the disk before what it names
            os.replace(beside, self._path)
            _sweep(self._path.parent)
        except OSError as error:
            warnings.warn(f"readings cannot be remembered in {str(self._path.parent)!r}: {error.strerror}; set {FOLDER}, or --no-cache", stacklevel=2)
            with suppress(OSError):
                beside.unlink(missing_ok=True)


def _whole(told: dict[str, Any]) -> _Kept:
    """Raises `TypeError` for figures that are none."""
    kept = _Kept(Reading.from_dict(told["reading"]), told["budget_bytes"], told["floor_bytes"], told["target"])
    reading = kept.reading
    whole = (reading.micro_batch, reading.accumulation_steps, kept.budget_bytes, kept.floor_bytes, kept.target)
    if not all(isinstance(each, int) for each in whole) or reading.outcome not in _TOLD:
        raise TypeError("its readings are not whole")
    if not all(each is None or isinstance(each, int) for each in (reading.peak_bytes, reading.base_bytes, reading.activation_bytes)):
        raise TypeError("its peaks are not bytes")
    return kept


def _sweep(place: Path) -> None:
    """What processes that were killed while writing have left, once they cannot be at it any more; nothing else that lies there."""
    for left in place.glob(f"{_BESIDE}*.tmp"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _STALE_S:
                left.unlink()


def documents() -> list[dict[str, Any]]:
    """Every job that is remembered: its file, job, device, when it was written, and its readings. Files that are not ours are left out."""
    found = []
    for path in sorted(folder().glob("*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            document = json.loads(path.read_text())
            if document["schema"] == SCHEMA:
                readings = [
                    {name: each["reading"][name] for name in ("micro_batch", "accumulation_steps", "outcome", "peak_bytes")} for each in document["kept"]
                ]
                told = {"file": str(path), "job": document["job"], "device": document["key"]["device"], "written": document["written"], "readings": readings}
                found.append(told)
    return found


def clear() -> int:
    """Removes what is remembered, and nothing else that lies there. Returns how many jobs that was."""
    removed = 0
    for document in documents():
        with suppress(OSError):
            os.unlink(document["file"])
            removed += 1
    _sweep(folder())
    return removed


def listed() -> str:
    """A table, a line for each job."""
    rows = []
    for each in documents():
        fits = [reading for reading in each["readings"] if reading["outcome"] in ("fits", "over-budget") and reading["peak_bytes"]]
        most = max(fits, key=lambda reading: reading["micro_batch"], default=None)
        unit = unit_for(most["peak_bytes"]) if most else ""
        seen = f"{most['micro_batch']} at {number(most['peak_bytes'], unit)} {unit}" if most else ""
        rows.append(f"{each['written'][:16].replace('T', ' ')}  {len(each['readings']):>8}  {seen:22}{each['device']:28}{each['job']}")
    head = f"{'written':16}  {'readings':>8}  {'largest':22}{'device':28}job"
    return "\n".join([head, *rows]) if rows else f"nothing is remembered in {folder()}"
