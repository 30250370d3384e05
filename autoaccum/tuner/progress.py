"""A live line per trial: on a terminal it moves, elsewhere each trial leaves one plain line. All on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from autoaccum.probe import Reading, Trying
from autoaccum.units import in_words, seconds_in_words


@contextmanager
def shown(*, quiet: bool = False) -> Iterator[Callable[[Trying | Reading], None] | None]:
    """A callback for `tune(progress=...)` that draws while inside; None if `quiet`."""
    if quiet:
        yield None
    elif sys.stderr.isatty():
        yield from _live()
    else:
        yield plain


def plain(event: Trying | Reading) -> None:
    """A line on stderr for every trial that has ended: what `tune(progress=True)` calls, also in a notebook."""
    if isinstance(event, Reading):
        print(finished(event), file=sys.stderr, flush=True)


def finished(reading: Reading) -> str:
    """One trial that ended, in a line."""
    command = reading.phase == "command"  # each run is the whole command: there is no shorter trial to confirm
    what = f"{reading.micro_batch} x {reading.accumulation_steps}" if reading.full or command else str(reading.micro_batch)
    went = {
        "fits": "fits",
        "over-budget": "fits the device but not the budget",
        "oom": f"ran out of memory in {reading.phase}",
        "killed": f"was killed by the system in {reading.phase}",
        "timeout": f"did not finish in time, it was in {reading.phase}",
    }[reading.outcome]
    if not reading.limited:
        return f"without the limit {what} {f'peaks at {in_words(reading.peak_bytes)}' if reading.fits and reading.peak_bytes else went}"
    peak = f", peak {in_words(reading.peak_bytes)}" if reading.peak_bytes and reading.outcome in ("fits", "over-budget") else ""
    return f"{'confirmed' if reading.full and reading.fits else 'tried'} {what}: {went}{peak}, {seconds_in_words(reading.seconds)}"


def _live() -> Iterator[Callable[[Trying | Reading], None]]:
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    with console.status("building the job") as status:

        def show(event: Trying | Reading) -> None:
            if isinstance(event, Reading):
                console.print(finished(event))
                status.update("searching")
            else:
                what = f"the whole window, {event.micro_batch} x {event.accumulation_steps}, twice" if event.full else f"a micro-batch of {event.micro_batch}"
                where = "" if event.phase == "batch" else f": {event.phase} {event.index + 1}"
                status.update(f"trying {what}{where}")

        yield show
