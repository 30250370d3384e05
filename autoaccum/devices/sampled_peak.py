"""The sampled peak, for systems that record none: a thread reads the memory every two milliseconds."""

from __future__ import annotations

import threading
from collections.abc import Callable


class SampledPeak:
    """A `Watch` for systems that record no peak. A thread reads the held bytes and the live bytes every 2 ms."""

    def __init__(self, held: Callable[[], int], live: Callable[[], int] | None = None, every_s: float = 0.002) -> None:
        self._held, self._live, self._every_s = held, live or held, every_s
        self._stopped, self._lock = threading.Event(), threading.Lock()
        self._most = self._lap = 0
        self._thread = threading.Thread(target=self._sample, name="autoaccum-peak", daemon=True)

    def __enter__(self) -> SampledPeak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def peak_bytes(self) -> int:
        self._read()
        return self._most

    def lap_bytes(self) -> int:
        self._read()
        with self._lock:
            lap, self._lap = self._lap, 0
        return lap

    def restart(self) -> None:
        with self._lock:
            self._most = self._lap = 0

    def retries(self) -> int:
        return 0

    def _read(self) -> None:
        with self._lock:
            self._most, self._lap = max(self._most, self._held()), max(self._lap, self._live())

    def _sample(self) -> None:
        while not self._stopped.wait(self._every_s):
            self._read()
