"""Tuning of a foreign command: an unmodified script that takes its micro-batch as an argument."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from autoaccum.errors import UsageError
from autoaccum.plan import Plan, arithmetic
from autoaccum.probe import Command, Progress, Reading, Request, Template, refusals, search
from autoaccum.tuner.assembly import assemble_plan
from autoaccum.tuner.one_device import nothing_fits, unlimited
from autoaccum.tuner.trial_log import TrialLog


def tune_command(words: Sequence[str], request: Request, *, device: str = "auto", progress: Progress | None = None, on_output: Callable[[str], None]) -> Plan:
    """Tunes a command that takes `{micro_batch}` and `{accumulation_steps}`: equal micro-batches, fewest steps.

    on_output: called with the text that the command prints.
    Raises `JobFailed` if the command fails for another reason than memory.
    """
    if request.objective == "throughput":
        raise UsageError("--objective throughput times windows, and of a command only the whole run can be timed, its start included: leave it out")
    if request.target_tokens is not None:
        raise UsageError("--target-tokens needs a JOB, whose batches can be counted: a command gets its micro-batch in samples, so give --target-batch")
    template, trials, started = Template(tuple(words)), TrialLog(progress), time.monotonic()
    request = replace(request, equal=True)
    with Command(template, device, request.limits, on_output=on_output) as command:
        budget = refusals.enough(command.budget())
        target = request.samples
        candidates = arithmetic.candidate_sizes(target, most=request.max_micro_batch, equal=True)

        def fits(micro_batch: int, steps: int) -> Reading:
            return trials.measure(command, arithmetic.micro_batches(target, steps))

        # The search does not start at one sample: a run with micro-batches of one is the slowest.
        result = search.largest(fits, target, candidates, budget_bytes=lambda: budget.budget_bytes, daring=command.enforces, start=max(target // 16, 1))
        if not result.micro_batch:
            raise nothing_fits(command, trials, candidates[0], target, budget)
        sizes = arithmetic.micro_batches(target, result.accumulation_steps)
        confirmed = next(reading for reading in trials.readings if reading.micro_batch == result.micro_batch)
        return assemble_plan(command, request, trials, str(template), result, confirmed, sizes, budget, started, ())


def check_command(
    words: Sequence[str], micro_batch: int, request: Request, *, device: str = "auto", progress: Progress | None = None, on_output: Callable[[str], None]
) -> Plan:
    """Runs the command once at the given micro-batch. Raises `OutOfMemory` if it does not fit."""
    if request.samples % micro_batch:
        raise UsageError(f"a command runs equal micro-batches: {micro_batch} does not divide a target batch of {request.samples}")
    template, trials, started = Template(tuple(words)), TrialLog(progress), time.monotonic()
    with Command(template, device, request.limits, on_output=on_output) as command:
        budget = refusals.enough(command.budget())
        sizes = arithmetic.micro_batches(request.samples, request.samples // micro_batch)
        reading = trials.measure(command, sizes)
        if not reading.fits:
            raise refusals.too_big(reading, sizes, unlimited(command, trials, reading, sizes, budget), budget)
        return assemble_plan(
            command,
            request,
            trials,
            str(template),
            search.SearchResult(micro_batch, len(sizes), micro_batch, None),
            reading,
            sizes,
            budget,
            started,
            (),
            searched=False,
        )
