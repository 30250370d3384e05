"""Progress lines on stderr: a live line on a terminal, and one plain line per trial elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from autoaccum.probe import Reading, Trying
from autoaccum.units import in_words, seconds_in_words


@contextmanager
def shown(*, quiet: bool = False) -> Iterator[Callable[[Trying | Reading], None] | None]:
    """A context manager that yields a callback for `tune(progress=...)`, which draws until the block ends; None if `quiet`."""
    if quiet:
        yield None
    elif sys.stderr.isatty():
        yield from _live()
    else:
        yield plain


@contextmanager
def stages(*, quiet: bool) -> Iterator[Callable[[str], None]]:
    """A context manager that yields a function, which shows what is done now in a live line on a terminal, and nothing elsewhere."""
    if quiet or not sys.stderr.isatty():
        yield lambda words: None
        return
    from rich.console import Console

    with Console(stderr=True, highlight=False).status("building the job") as status:
        yield status.update


def plain(event: Trying | Reading) -> None:
    """Prints one line on stderr for every trial that has ended. `tune(progress=True)` uses it, also in a notebook."""
    if isinstance(event, Reading):
        print(finished(event), file=sys.stderr, flush=True)


def finished(reading: Reading) -> str:
    """The line for one trial that has ended."""
    command = reading.phase == "command"  # each run is the whole command, so there is no shorter trial
    size = f"{reading.micro_batch} x {reading.accumulation_steps}" if reading.full or command else str(reading.micro_batch)
    outcome = {
        "fits": "fits",
        "over-budget": "fits the device but not the budget",
        "oom": f"ran out of memory in {reading.phase}",
        "killed": f"was killed by the system in {reading.phase}",
        "kernel-limit": "is more than a kernel can take",
        "timeout": f"did not finish in time, it was in {reading.phase}",
    }[reading.outcome]
    if not reading.limited:
        return f"without the limit {size} {f'peaks at {in_words(reading.peak_bytes)}' if reading.fits and reading.peak_bytes else outcome}"
    peak = f", peak {in_words(reading.peak_bytes)}" if reading.peak_bytes and reading.outcome in ("fits", "over-budget") else ""
    if reading.phase == "evaluate":
        return f"tried an evaluation of {reading.micro_batch}: {outcome.removesuffix(' in evaluate')}{peak}, {seconds_in_words(reading.seconds)}"
    return f"{'confirmed' if reading.full and reading.fits else 'tried'} {size}: {outcome}{peak}, {seconds_in_words(reading.seconds)}"


def _live() -> Iterator[Callable[[Trying | Reading], None]]:
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    with console.status("building the job") as status:

        def show(event: Trying | Reading) -> None:
            if isinstance(event, Reading):
                console.print(finished(event))
                status.update("searching")
            else:
                trial = f"the whole window, {event.micro_batch} x {event.accumulation_steps}" if event.full else f"a micro-batch of {event.micro_batch}"
                phase = "" if event.phase == "batch" else f": {event.phase} {event.index + 1}"
                status.update(f"trying {trial}{phase}")

        yield show
