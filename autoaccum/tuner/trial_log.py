"""The log of trials: it runs trials, reports their progress, and keeps their readings."""

from __future__ import annotations

from dataclasses import replace

from autoaccum.errors import AutoaccumError, JobError, noted
from autoaccum.probe import Progress, Reading, Rehearser, Trying

# How much longer a sample takes where memory pages, and the least time of a window for which that is looked at: short windows vary by more.
_PAGING_FACTOR, _PAGING_SECONDS = 3.0, 0.2
_PAGING_PART = 0.8  # of what the device has, below which nothing pages


class TrialLog:
    """Runs trials, calls the progress callback, and keeps the readings."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self.readings: list[Reading] = []
        self.remarks: list[str] = []  # warnings for the plan that are of no reading
        self.known: dict[tuple[int, bool], Reading] = {}  # by micro-batch, and True if gradients were resident
        self.refused: dict[int, Reading] = {}  # confirming runs that did not fit, by micro-batch
        self._current = (0, 0, False)

    def again(self) -> TrialLog:
        """A new log without readings, with the same progress callback."""
        return TrialLog(self._progress)

    def phase(self, phase: str, index: int) -> None:
        if self._progress is not None:
            self._progress(Trying(*self._current, phase, index))

    def evaluate(self, rehearsal: Rehearser, samples: int, trained: int) -> Reading:
        """Runs a trial of an evaluation. Its reading is not one of training, so it is not kept."""
        self._current = (samples, 1, False)
        self.phase("batch", 0)
        reading = rehearsal.evaluate(samples, trained)
        if self._progress is not None:
            self._progress(reading)
        return reading

    def measure(self, rehearsal: Rehearser, sizes: tuple[int, ...], *, full: bool = False, limited: bool = True, windows: int = 2) -> Reading:
        self._current = (sizes[0], len(sizes), full)
        self.phase("batch", 0)
        try:
            reading = rehearsal.measure(sizes, full=full, limited=limited, windows=windows)
        except Exception as error:
            worked = sorted({earlier.micro_batch for earlier in self.readings if earlier.fits})
            if worked and not isinstance(error, AutoaccumError):
                noted(error, f"autoaccum: sizes that had worked: {', '.join(map(str, worked))}")
            if isinstance(error, JobError) and worked:
                error.args = (f"{error.args[0]} (sizes that had worked: {', '.join(map(str, worked))})", *error.args[1:])
            raise
        if limited:
            reading = self._if_not_paging(rehearsal, reading, sizes, full=full, windows=windows)
            self.readings.append(reading)
            if not full:
                self.known[(sizes[0], len(sizes) > 1)] = reading
        else:
            reading = replace(reading, limited=False)
        if self._progress is not None:
            self._progress(reading)
        return reading

    def _if_not_paging(self, rehearsal: Rehearser, reading: Reading, sizes: tuple[int, ...], *, full: bool, windows: int) -> Reading:
        """The reading, or one over budget if its samples take much longer than those of the next smaller size, twice.

        Where memory pages to the host or to a disk instead of running out (WSL2, Windows, swap), time is what runs out.
        """
        before = max((each for each in self.readings if each.fits and each.micro_batch < reading.micro_batch), key=lambda each: each.micro_batch, default=None)
        usual = None if before is None else _sample_seconds(before)
        if before is None or usual is None or not _is_slow(reading, usual) or 8 * before.micro_batch < reading.micro_batch:
            return reading
        if (reading.peak_bytes or 0) < _PAGING_PART * rehearsal.budget(limited=False).budget_bytes:
            return reading  # caches and thread pools make samples slow, too, and there is memory left
        again = rehearsal.measure(sizes, full=full, windows=windows)  # a neighbour may have taken the time once
        if not _is_slow(again, usual):
            return again
        times = (_sample_seconds(again) or 0.0) / usual
        said = (
            f"a sample takes {times:.0f} times as long at a micro-batch of {reading.micro_batch} as at {before.micro_batch}, probably because memory pages to the "
            "host or to a disk: taken as over budget"
        )
        return replace(again, outcome="over-budget", remarks=(*again.remarks, said))


def _sample_seconds(reading: Reading) -> float | None:
    """The seconds per sample of a window; None if they were not measured. A window that is not whole has at most two micro-batches."""
    if reading.window_seconds is None or reading.cached:
        return None
    micro_batches = reading.accumulation_steps if reading.full else min(reading.accumulation_steps, 2)
    return reading.window_seconds / (reading.micro_batch * micro_batches)


def _is_slow(reading: Reading, usual: float) -> bool:
    seconds = _sample_seconds(reading)
    return reading.fits and seconds is not None and (reading.window_seconds or 0.0) > _PAGING_SECONDS and seconds > _PAGING_FACTOR * usual
