"""The log of trials: it runs trials, reports their progress, and keeps their readings."""

from __future__ import annotations

from dataclasses import replace

from autoaccum.errors import AutoaccumError, JobError, noted
from autoaccum.probe import Progress, Reading, Rehearser, Trying


class TrialLog:
    """Runs trials, calls the progress callback, and keeps the readings."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self.readings: list[Reading] = []
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
            self.readings.append(reading)
            if not full:
                self.known[(sizes[0], len(sizes) > 1)] = reading
        else:
            reading = replace(reading, limited=False)
        if self._progress is not None:
            self._progress(reading)
        return reading
