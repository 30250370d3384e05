"""Why it does not fit: what it needs, what there is, who holds the rest, and what would help."""

from __future__ import annotations

from collections.abc import Sequence

from autoaccum.devices import Budget
from autoaccum.errors import AutoaccumError, NothingFits, OutOfMemory, PlanError
from autoaccum.plan import window_notation
from autoaccum.probe.readings import Reading
from autoaccum.units import in_words


def enough(budget: Budget) -> Budget:
    """The same budget. Raises `NothingFits` where nothing is left to try with."""
    if budget.budget_bytes > 0:
        return budget
    memory = budget.memory
    limit = f"of the limit of {in_words(budget.cap_bytes)} " if budget.cap_bytes else ""
    raise NothingFits(
        f"{limit}nothing is left to train with: {in_words(memory.free_bytes)} of {in_words(memory.total_bytes)} are free{_held(budget)}; "
        f"headroom keeps {in_words(budget.headroom_bytes)}. Free memory, raise --memory-limit, or lower --headroom",
        budget_bytes=budget.budget_bytes,
    )


def nothing_allowed(target: int, most: int | None, batch_norms: Sequence[str]) -> AutoaccumError:
    """No size is left to try: layers forbid a micro-batch of one sample."""
    if not batch_norms:
        return PlanError(f"no micro-batch is allowed for a target batch of {target}")
    at_most = f" in micro-batches of at most {most}" if most else ""
    return NothingFits(
        f"BatchNorm layer {batch_norms[0]!r} needs micro-batches of at least 2 samples, and a target batch of {target}{at_most} cannot be cut so: "
        "choose another target, or replace BatchNorm (GroupNorm does not mix samples)"
    )


def nothing_fits(micro_batch: int, tried: Sequence[Reading], unlimited: Reading | None, budget: Budget) -> NothingFits:
    """Not even `micro_batch` fits. unlimited: the same size run without the user's limit, where that was safe."""
    unit = "one sample" if micro_batch == 1 else f"a micro-batch of {micro_batch}"
    refused = next((each for each in tried if each.micro_batch == micro_batch and not each.fits), None)
    if refused is not None and refused.outcome == "timeout":
        message = f"{unit} did not finish in time (in {refused.phase}): raise --timeout, or look for a hang in the job"
        return NothingFits(message, budget_bytes=budget.budget_bytes, trials=tried)
    how = "was killed by the system" if refused is not None and refused.outcome == "killed" else "does not fit"
    where = f" (in {refused.phase})" if refused is not None and refused.phase != "command" else ""
    words, needs = _needs(micro_batch, tried, unlimited, budget)
    wide = f"raise --memory-limit (now {in_words(budget.cap_bytes)})" if budget.cap_bytes else "free memory, or use a larger device"
    if needs is not None and needs <= budget.budget_bytes + budget.headroom_bytes:
        wide = f"lower --headroom (now {in_words(budget.headroom_bytes)}), {wide}"
    return NothingFits(
        f"{unit} {how}{where}: it needs {words} and the budget is {in_words(budget.budget_bytes)}{_held(budget)}. "
        f"What would help: {wide}, autocast to bfloat16, activation checkpointing, an optimizer with less state, shorter samples",
        budget_bytes=budget.budget_bytes,
        trials=tried,
    )


def too_big(reading: Reading, sizes: Sequence[int], unlimited: Reading | None, budget: Budget) -> OutOfMemory:
    """A size that was asked for by name does not fit; by how much, where it could be measured."""
    if reading.outcome == "timeout":
        return OutOfMemory(f"{window_notation(sizes)} did not finish in time: raise --timeout, or look for a hang in the job", trials=[reading])
    words, needs = _needs(sizes[0], [reading], unlimited, budget)
    over = f", {in_words(needs - budget.budget_bytes)} over" if needs is not None and needs > budget.budget_bytes else ""
    how = {"oom": f"ran out in {reading.phase}", "killed": f"was killed by the system in {reading.phase}", "over-budget": "is over budget"}[reading.outcome]
    return OutOfMemory(
        f"{window_notation(sizes)} does not fit: {sizes[0]} {how}; it needs {words} and the budget is {in_words(budget.budget_bytes)}{over}. "
        "`autoaccum tune` finds what fits",
        trials=[reading],
    )


def _needs(micro_batch: int, tried: Sequence[Reading], unlimited: Reading | None, budget: Budget) -> tuple[str, int | None]:
    """What the size peaks at, in words and bytes: measured, or only that it is more than was seen."""
    measured = [each for each in (*tried, unlimited) if each is not None and each.micro_batch == micro_batch and each.outcome in ("fits", "over-budget")]
    peak = max((each.peak_bytes or 0 for each in measured), default=0)
    if peak:
        return in_words(peak), peak
    seen = max((each.peak_bytes or 0 for each in tried if each.micro_batch == micro_batch), default=0)
    return f"more than {in_words(max(seen, budget.budget_bytes))} (predicted)", None


def _held(budget: Budget) -> str:
    """Who else holds memory, where that and not the user's own limit is what binds."""
    memory = budget.memory
    if budget.cap_bytes is not None and budget.cap_bytes < memory.ours_bytes + memory.free_bytes:
        return ""
    return "".join(f"; {other.name} (process {other.pid}) holds {in_words(other.bytes)}" for other in memory.others if other.bytes)
