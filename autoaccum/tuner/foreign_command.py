"""Tuning of a foreign command: an unmodified script that takes its micro-batch as an argument."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from autoaccum.command import Command, ConfigCopy, RanksFound, Template, launched_ranks
from autoaccum.devices import Budget
from autoaccum.errors import NothingFits, UsageError
from autoaccum.plan import Plan, arithmetic
from autoaccum.probe import Progress, Reading, Request, refusals, search
from autoaccum.tuner.assembly import assemble_plan
from autoaccum.tuner.one_device import nothing_fits, unlimited
from autoaccum.tuner.trial_log import TrialLog


def tune_command(
    words: Sequence[str],
    request: Request,
    *,
    device: str = "auto",
    world: int | None = None,
    copies: tuple[ConfigCopy, ...] = (),
    progress: Progress | None = None,
    on_output: Callable[[str], None],
) -> Plan:
    """Tunes a command that takes `{micro_batch}` and `{accumulation_steps}`: equal micro-batches, fewest steps.

    world: the ranks that the command runs on; None if that is to be seen. The numbers are of one rank, and the target is of all. On a CPU
    all ranks share the limit. copies: its configuration files with placeholders. on_output: called with the text that the command prints.
    Raises `JobFailed` if the command fails for another reason than memory.
    """
    if request.objective == "throughput":
        raise UsageError("--objective throughput times windows, and of a command only the whole run can be timed, its start included: leave it out")
    if request.target_tokens is not None:
        raise UsageError("--target-tokens needs a JOB, whose batches can be counted: a command gets its micro-batch in samples, so give --target-batch")
    template, trials, started = Template(tuple(words), copies), TrialLog(progress), time.monotonic()
    return _over_ranks(
        lambda command, of_rank: _searched(command, replace(of_rank, equal=True), template, trials, started),
        template,
        trials,
        request,
        device,
        world,
        on_output,
    )


def check_command(
    words: Sequence[str],
    micro_batch: int,
    request: Request,
    *,
    device: str = "auto",
    world: int | None = None,
    copies: tuple[ConfigCopy, ...] = (),
    progress: Progress | None = None,
    on_output: Callable[[str], None],
) -> Plan:
    """Runs the command once at the given micro-batch; arguments as in `tune_command`. Raises `OutOfMemory` if it does not fit."""
    template, trials, started = Template(tuple(words), copies), TrialLog(progress), time.monotonic()
    return _over_ranks(
        lambda command, of_rank: _checked(command, of_rank, micro_batch, template, trials, started), template, trials, request, device, world, on_output
    )


def _over_ranks(
    planned: Callable[[Command, Request], Plan],
    template: Template,
    trials: TrialLog,
    request: Request,
    device: str,
    world: int | None,
    on_output: Callable[[str], None],
) -> Plan:
    """The plan of a command over all its ranks. `planned` plans what one rank does; it runs again if there are other ranks than was assumed."""
    assumed, seen = world or launched_ranks(template.words) or 1, 0
    command = Command(template, device, request.limits, world=assumed, on_output=on_output)
    while True:
        if request.samples % assumed:
            near = sorted({request.samples // assumed * assumed, -(-request.samples // assumed) * assumed} - {0})
            raise UsageError(
                f"the command runs on {assumed} ranks, and a target batch of {request.samples} does not divide into {assumed} equal parts: "
                f"{' or '.join(map(str, near))} does"
            )
        try:
            plan = planned(command, replace(request, target_batch=request.samples // assumed))
            break
        except RanksFound as found:
            if world is not None:
                raise UsageError(f"--world says {world}, and the command runs on {found.world} ranks: leave --world out, or correct it") from None
            if seen:
                raise UsageError(f"the command ran on {seen} ranks, and then on {found.world}: let it run on the same number in every trial") from None
            assumed = seen = found.world
            command.runs_on(assumed)
            trials.readings.clear()  # of steps that are not those of the target
            trials.known.clear()
    if assumed == 1:
        return plan
    shared = ", and their memory is counted together" if plan.device.kind == "cpu" else ""
    return replace(
        plan,
        target_batch=request.samples,
        shares=(plan.share,) * assumed,
        world_size=assumed,
        hints=(f"the command runs on {assumed} ranks: the numbers are those of one rank{shared}", *plan.hints),
    )


def _searched(command: Command, request: Request, template: Template, trials: TrialLog, started: float) -> Plan:
    budget = refusals.enough(command.budget())
    target = request.samples
    candidates = arithmetic.candidate_sizes(target, most=request.max_micro_batch, equal=True)

    def fits(micro_batch: int, steps: int) -> Reading:
        return trials.measure(command, arithmetic.micro_batches(target, steps))

    # The search does not start at one sample: a run with micro-batches of one is the slowest.
    result = search.largest(fits, target, candidates, budget_bytes=lambda: budget.budget_bytes, daring=command.enforces, start=max(target // 16, 1))
    if not result.micro_batch:
        raise _with_hint(nothing_fits(command, trials, candidates[0], target, budget), command, trials, candidates, target, budget)
    sizes = arithmetic.micro_batches(target, result.accumulation_steps)
    confirmed = next(reading for reading in trials.readings if reading.micro_batch == result.micro_batch)
    return assemble_plan(command, request, trials, str(template), result, confirmed, sizes, budget, started, ())


def _with_hint(error: Exception, command: Command, trials: TrialLog, candidates: Sequence[int], target: int, budget: Budget) -> Exception:
    """The error, with a hint if the command takes as much at any size: then it does not read its flags, and no size could fit."""
    larger = next((size for size in candidates if size >= 4 * candidates[0]), None)
    if isinstance(error, NothingFits) and larger is not None and budget.cap_bytes is not None:
        trials.measure(command, arithmetic.micro_batches(target, target // larger), limited=False)
        if command.ignores_size():
            return NothingFits(f"{error}. But {command.ignored_words()}", budget_bytes=error.budget_bytes, trials=error.trials)
    return error


def _checked(command: Command, request: Request, micro_batch: int, template: Template, trials: TrialLog, started: float) -> Plan:
    if request.samples % micro_batch:
        of_rank = "a target batch" if command.world == 1 else f"the {command.world} ranks' share"
        raise UsageError(f"a command runs equal micro-batches: {micro_batch} does not divide {of_rank} of {request.samples}")
    budget = refusals.enough(command.budget())
    sizes = arithmetic.micro_batches(request.samples, request.samples // micro_batch)
    reading = trials.measure(command, sizes)
    if not reading.fits:
        raise refusals.too_big(reading, sizes, unlimited(command, trials, reading, sizes, budget), budget)
    found = search.SearchResult(micro_batch, len(sizes), micro_batch, None)
    return assemble_plan(command, request, trials, str(template), found, reading, sizes, budget, started, (), searched=False)
