"""The errors for jobs that do not fit. They say what the job needs, what is free, which processes hold the rest, and what helps."""

from __future__ import annotations

from collections.abc import Sequence

from autoaccum.devices import Budget
from autoaccum.errors import AutoaccumError, NothingFits, OutOfMemory, PlanError
from autoaccum.plan import window_notation
from autoaccum.probe.readings import Reading
from autoaccum.units import in_words


def enough(budget: Budget) -> Budget:
    """Returns the same budget. Raises `NothingFits` if it is zero or less."""
    if budget.budget_bytes > 0:
        return budget
    memory = budget.memory
    limit = f"of the limit of {in_words(budget.cap_bytes)} " if budget.cap_bytes else ""
    raise NothingFits(
        f"{limit}nothing is left to train with: {in_words(memory.free_bytes)} of {in_words(memory.total_bytes)} are free{_held_by_others(budget)}; "
        f"headroom keeps {in_words(budget.headroom_bytes)}. Free memory, raise --memory-limit, or lower --headroom",
        budget_bytes=budget.budget_bytes,
    )


def norms_in_words(names: Sequence[str]) -> str:
    """`"BatchNorm (layers 1, 3.norm, 5.norm and more)"`: the layers of these names, of which there is at least one."""
    return f"BatchNorm (layer{'s' if len(names) > 1 else ''} {', '.join(names[:3])}{' and more' if len(names) > 3 else ''})"


def norms_see_parts(names: Sequence[str], micro_batch: int, target: int) -> str:
    """The warning that these layers see micro-batches, in samples, and not the whole batch."""
    return f"{norms_in_words(names)} sees micro-batches of {micro_batch}, not the whole batch of {target}: its statistics differ from one big batch"


def nothing_allowed(target: int, most: int | None, batch_norms: Sequence[str]) -> AutoaccumError:
    """The error for a target batch without an allowed micro-batch size, for example because BatchNorm needs two samples."""
    if not batch_norms:
        return PlanError(f"no micro-batch is allowed for a target batch of {target}")
    at_most = f" in micro-batches of at most {most}" if most else ""
    return NothingFits(
        f"BatchNorm layer {batch_norms[0]!r} needs micro-batches of at least 2 samples, and a target batch of {target}{at_most} cannot be cut so: "
        "choose another target, or replace BatchNorm (GroupNorm does not mix samples)"
    )


def nothing_fits(micro_batch: int, tried: Sequence[Reading], unlimited: Reading | None, budget: Budget, *, half: bool = False) -> NothingFits:
    """The error if `micro_batch`, the smallest size, does not fit.

    tried: the readings so far. unlimited: the reading of the same size without the user's limit, if it was safe to run.
    half: True if the job computes in half precision already.
    """
    unit = "one sample" if micro_batch == 1 else f"a micro-batch of {micro_batch}"
    refused = next((reading for reading in tried if reading.micro_batch == micro_batch and not reading.fits), None)
    if refused is not None and refused.outcome == "timeout":
        message = f"{unit} did not finish in time (in {refused.phase}): {_in_time(refused)}"
        return NothingFits(message, budget_bytes=budget.budget_bytes, trials=tried)
    how = "was killed by the system" if refused is not None and refused.outcome == "killed" else "does not fit"
    where = f" (in {refused.phase})" if refused is not None and refused.phase != "command" else ""
    words, needs = _needs(micro_batch, tried, unlimited, budget)
    wide = f"raise --memory-limit (now {in_words(budget.cap_bytes)})" if budget.cap_bytes else "free memory, or use a larger device"
    if needs is not None and needs <= budget.budget_bytes + budget.headroom_bytes:
        wide = f"lower --headroom (now {in_words(budget.headroom_bytes)}), {wide}"
    ended = f" ({refused.remarks[0]})" if refused is not None and refused.remarks and refused.outcome == "oom" else ""
    return NothingFits(
        f"{unit} {how}{where}{ended}: it needs {words} and the budget is {in_words(budget.budget_bytes)}{_held_by_others(budget)}. "
        f"What would help: {wide}, {'' if half else 'autocast to bfloat16, '}activation checkpointing, an optimizer with less state, shorter samples",
        budget_bytes=budget.budget_bytes,
        trials=tried,
        needs_bytes=needs,
    )


def _in_time(reading: Reading) -> str:
    if reading.phase == "command":
        return "let the script end after a few steps (--max-steps 2 or the like), take --trial-seconds N, which ends it for you, or raise --timeout"
    return "raise --timeout, or look for a hang in the job"


def too_big(reading: Reading, sizes: Sequence[int], unlimited: Reading | None, budget: Budget) -> OutOfMemory:
    """The error if the micro-batch that the user asked for does not fit. It says by how much, if that was measured."""
    if reading.outcome == "timeout":
        return OutOfMemory(f"{window_notation(sizes)} did not finish in time: {_in_time(reading)}", trials=[reading])
    words, needs = _needs(sizes[0], [reading], unlimited, budget)
    over = f", {in_words(needs - budget.budget_bytes)} over" if needs is not None and needs > budget.budget_bytes else ""
    how = {"oom": f"ran out in {reading.phase}", "killed": f"was killed by the system in {reading.phase}", "over-budget": "is over budget"}[reading.outcome]
    return OutOfMemory(
        f"{window_notation(sizes)} does not fit: {sizes[0]} {how}; it needs {words} and the budget is {in_words(budget.budget_bytes)}{over}. "
        "`autoaccum tune` finds what fits",
        trials=[reading],
    )


def _needs(micro_batch: int, tried: Sequence[Reading], unlimited: Reading | None, budget: Budget) -> tuple[str, int | None]:
    """The peak of the size in words and in bytes. If it was not measured, the words give a lower bound and the bytes are None."""
    measured = [
        reading for reading in (*tried, unlimited) if reading is not None and reading.micro_batch == micro_batch and reading.outcome in ("fits", "over-budget")
    ]
    peak = max((reading.peak_bytes or 0 for reading in measured), default=0)
    if peak:
        return in_words(peak), peak
    lower_bound = max((reading.peak_bytes or 0 for reading in tried if reading.micro_batch == micro_batch), default=0)
    return f"more than {in_words(max(lower_bound, budget.budget_bytes))} (predicted)", None


def _held_by_others(budget: Budget) -> str:
    """The other processes that hold memory, as part of a message. "" if the user's own limit decides the budget."""
    memory = budget.memory
    if budget.cap_bytes is not None and budget.cap_bytes < memory.ours_bytes + memory.free_bytes:
        return ""
    return "".join(f"; {process.name} (process {process.pid}) holds {in_words(process.bytes)}" for process in memory.others if process.bytes)
