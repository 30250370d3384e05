"""The report of a plan: its arithmetic and its reasons, as plain text without colours."""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape

from autoaccum.distributed import Fleet
from autoaccum.plan.notation import runs, window_notation
from autoaccum.plan.record import PlanRecord, TrialRecord
from autoaccum.units import duration_in_words, in_words, number, seconds_in_words, unit_for, unit_of_all

_OUTCOMES = {
    "oom": "ran out in {phase}",
    "over-budget": "took {peak}",
    "killed": "was killed by the system in {phase}",
    "timeout": "did not finish in time",
    "kernel-limit": "is more than a kernel can take",
}


def lines(plan: PlanRecord) -> Iterator[str]:
    """The report, line by line."""
    yield headline(plan)
    if plan.fleet is not None:
        yield from over_ranks(plan.fleet)
    if plan.micro_batches and plan.trials:
        yield _why(plan)
    for length, length_plan in plan.per_length:
        yield f"up to {length} long: {plan.target_batch} = {window_notation(length_plan.micro_batches)}"
    if plan.eval_batch is not None:
        peak = "" if plan.eval_peak_bytes is None else f", which peak at {in_words(plan.eval_peak_bytes, unit_for(plan.budget_bytes))}"
        yield f"evaluation: batches of {plan.eval_batch}{peak}"
    if plan.objective == "throughput":
        yield from _timed(plan)
    if plan.budget_bytes:
        yield _budget(plan)
    for warning in plan.warnings:
        yield f"warning: {warning}"
    for hint in plan.hints:
        yield f"hint: {hint}"


def headline(plan: PlanRecord) -> str:
    """The first line of the report: `"512 = 40 x 5 + 39 x 8     13 micro-batches a step on cuda:0, Tesla T4"`."""
    if plan.fleet is not None:
        shares = " + ".join(f"{share} x {count}" if count > 1 else str(share) for share, count in runs(plan.shares))
        return f"{plan.target_batch} = {shares} over {plan.world_size} ranks     this is rank {plan.rank}, on {plan.device.label}, {plan.device.name}"
    if plan.target_tokens is not None and plan.learning and not plan.learned_windows:
        return f"{plan.target_tokens} tokens a step, in micro-batches that the first windows will show     on {_on(plan)}"
    if plan.target_tokens is not None:
        micro = f"micro-batches of up to {plan.micro_tokens} ({plan.micro_batch} x {(plan.micro_tokens or 0) // max(plan.micro_batch, 1)})"
        return f"{plan.target_tokens} tokens a step, in {micro}     about {plan.accumulation_steps} a step on {_on(plan)}"
    steps = "in one piece" if plan.accumulation_steps == 1 else f"{plan.accumulation_steps} micro-batches a step"
    ranks = f" on each of {plan.world_size} ranks" if plan.world_size > 1 else ""
    return f"{plan.target_batch} = {window_notation(plan.micro_batches)}{ranks}     {steps} on {_on(plan)}"


def _on(plan: PlanRecord) -> str:
    return f"a simulated {plan.device.name.removeprefix('virtual ')} (predicted)" if plan.predicted else f"{plan.device.label}, {plan.device.name}"


def over_ranks(fleet: Fleet) -> Iterator[str]:
    """One line for each run of neighbouring ranks that have the same GPU and the same share. At most twenty of them."""
    slowest = fleet.seconds()
    rows = runs([(curve, share) for curve, share in zip(fleet.curves, fleet.shares)])
    first = 0
    for (curve, share), count in rows[:20]:
        ranks = f"rank {first}" if count == 1 else f"ranks {first} to {first + count - 1}"
        first += count
        if not curve.most:
            yield f"{ranks}, {curve.gpu}: cannot hold one sample"
            continue
        sizes = [size for size in fleet.sizes(first - 1, fleet.target) if size]
        if not sizes:
            yield f"{ranks}, {curve.gpu}: no share; {curve.most} is the most that fits"
            continue
        seconds = curve.seconds(share)
        idle = 1 - seconds / slowest if slowest else 0.0
        yield f"{ranks}, {curve.gpu}: {window_notation(sizes)}, {duration_in_words(seconds)} a window, idle {idle:.0%}; {curve.most} is the most that fits"
    if len(rows) > 20:
        yield f"and {sum(count for _, count in rows[20:])} more ranks"


def _why(plan: PlanRecord) -> str:
    unit = _unit(plan)
    if plan.peak_bytes is None or plan.spare_bytes is None:
        parts = [f"{plan.micro_batch} ran within {in_words(plan.budget_bytes, unit)}"]
    else:
        samples = "1 sample peaks" if plan.micro_batch == 1 else f"{plan.micro_batch} samples peak"
        parts = [f"{samples} at {number(plan.peak_bytes, unit)} of {in_words(plan.budget_bytes, unit)} ({number(plan.spare_bytes, unit)} left)"]
    refused = next((trial for trial in plan.trials if trial.micro_batch == plan.smallest_refused and trial.outcome != "fits"), None)
    if refused is not None:
        parts.append(f"{refused.micro_batch} {outcome(refused)}")
    if plan.predicted_refusal is not None:
        parts.append(f"{plan.predicted_refusal} would not fit (predicted: nothing would have stopped it here)")
    if between := _between(plan):
        parts.append(f"{between} would take {plan.accumulation_steps} micro-batches, too")
    return " · ".join(parts)


def _timed(plan: PlanRecord) -> Iterator[str]:
    """One line for each plan whose speed was measured, the largest micro-batch first."""
    timed = {trial.micro_batch: trial for trial in plan.trials if trial.samples_per_second and trial.full}
    for size, trial in sorted(timed.items(), reverse=True):
        rate = trial.samples_per_second or 0.0
        small, larger = divmod(plan.target_batch, trial.accumulation_steps)
        window = (small + 1,) * larger + (small,) * (trial.accumulation_steps - larger)
        peak = "" if trial.peak_bytes is None else f", peak {in_words(trial.peak_bytes, unit_for(plan.budget_bytes))}"
        yield f"{window_notation(window)}: {rate:.4g} samples a second{peak}{'  <- chosen' if size == plan.micro_batch else ''}"


def chart(plan: PlanRecord, columns: int) -> Iterator[str]:
    """A bar for every size that was tried, as long as its peak, and a mark where the budget ends.

    columns: width of the chart in characters. Yields nothing for fewer than three sizes.
    """
    tried = {trial.micro_batch: trial for trial in plan.trials if trial.peak_bytes or trial.outcome != "fits"}
    if len(tried) < 3 or not plan.budget_bytes:
        return
    unit = unit_for(plan.budget_bytes)
    digits = max(len(str(size)) for size in tried)
    room = columns - digits - 32
    most = max(plan.budget_bytes, *(trial.peak_bytes or 0 for trial in tried.values()))
    budget = round(room * plan.budget_bytes / most)
    for size, trial in sorted(tried.items()):
        peak = trial.peak_bytes if trial.outcome in ("fits", "over-budget") else None
        # After an out-of-memory the full peak is unknown, so the bar ends at the budget.
        length = round(room * peak / most) if peak is not None else budget
        bar = ("█" if trial.outcome == "fits" else "▒") * length
        bar = f"{bar:<{budget}}" + "│" if length <= budget else f"{bar[:budget]}│{bar[budget:]}"
        label = in_words(peak, unit) if trial.outcome == "fits" and peak is not None else outcome(trial)
        yield f"{size:>{digits}} {bar}{' ' * max(room + 1 - len(bar), 0)} {label}{'  <- chosen' if size == plan.micro_batch else ''}"
    yield f"{'':{digits}} {'':{budget - 6}}budget│ {in_words(plan.budget_bytes, unit)}"


def outcome(tried: TrialRecord) -> str:
    """The outcome of a trial that did not fit, in words: `"ran out in backward"`."""
    if tried.outcome == "oom" and tried.phase == "command":
        return "ran out"
    return _OUTCOMES[tried.outcome].format(phase=tried.phase, peak=in_words(tried.peak_bytes or 0))


def _between(plan: PlanRecord) -> str:
    """The sizes above the chosen micro-batch that need as many steps as it does: `"41 and 42"`."""
    refused = plan.smallest_refused or plan.predicted_refusal
    if refused is None or plan.accumulation_steps < 2 or plan.objective == "throughput":
        return ""
    first, last = plan.micro_batch + 1, min(refused, math.ceil(plan.target_batch / (plan.accumulation_steps - 1))) - 1
    if last < first:
        return ""
    return str(first) if first == last else f"{first} {'and' if last == first + 1 else 'to'} {last}"


def _unit(plan: PlanRecord) -> str:
    """One unit for both lines of figures: none of them is printed as nought."""
    return unit_of_all([plan.budget_bytes, plan.spare_bytes or 0, *(bytes_ for bytes_, word in plan.arithmetic if word != "gradient buckets")])


def _budget(plan: PlanRecord) -> str:
    unit = _unit(plan)
    terms = [f"{number(bytes_, unit)} {word}" for bytes_, word in plan.arithmetic if word != "gradient buckets" or float(number(bytes_, unit))]
    parts = [f"{number(plan.budget_bytes, unit)} = {' - '.join(terms)}"] if terms else []
    if plan.shapes:
        parts.append(("simulated at " if plan.predicted else "measured at ") + ", ".join(f"{path} {shape}" for path, shape in list(plan.shapes.items())[:4]))
    if plan.allocator and plan.allocator != "steady malloc":  # as always on a CPU
        parts.append(plan.allocator)
    if plan.learning:
        return " · ".join([*parts, f"still learning, after {plan.learned_windows} windows of training"])
    if plan.learned_windows:
        return " · ".join([*parts, f"learned in {plan.learned_windows} windows of training"])
    trials = sum(not trial.cached for trial in plan.trials)
    remembered = f", {len(plan.trials) - trials} remembered" if trials < len(plan.trials) else ""
    parts.append(f"{trials} trial{'s' if trials != 1 else ''}{remembered}, {seconds_in_words(plan.seconds)}")
    return " · ".join(parts)


def html(plan: PlanRecord) -> str:
    """The report and a table of the trials, as HTML for notebooks."""
    cells = [
        (
            f"{trial.micro_batch} x {trial.accumulation_steps}",
            trial.outcome,
            trial.phase,
            "" if trial.peak_bytes is None else in_words(trial.peak_bytes),
            seconds_in_words(trial.seconds),
            "" if trial.samples_per_second is None else f"{trial.samples_per_second:.4g}",
        )
        for trial in plan.trials
    ]
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in cells)
    head = "".join(f"<th>{word}</th>" for word in ("tried", "outcome", "phase", "peak", "took", "samples/s"))
    report = escape("\n".join(lines(plan)))
    return f"<pre>{report}</pre><table><tr>{head}</tr>{rows}</table>"
