"""Timings of micro-steps, and the speed curves that are fitted to them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from autoaccum.distributed.speed_curves import AffineCurve
from autoaccum.errors import PlanError

Timing = tuple[int, int, float]  # micro-steps, samples, seconds
_Fit = tuple[float, float, float]  # window_seconds, step_seconds, sample_seconds
_SAME_SPEED = 1.3  # between ranks on the same GPU model, times that differ by a smaller factor count as noise


def alike(ranks: Sequence[tuple[str, int, Sequence[Timing]]]) -> list[AffineCurve]:
    """The speed curve of every rank.

    ranks: for each rank the name of its GPU, its largest micro-batch, and its timings (none if it cannot hold a sample).
    Ranks on the same GPU model with about the same times get one common curve, fitted to all their timings. Otherwise noise
    between equal cards would give unequal shares.
    """
    curves = [AffineCurve(0, 0.0, 0.0, gpu=gpu) for gpu, _, _ in ranks]
    groups: dict[str, list[tuple[_Fit, list[int]]]] = {}  # by GPU: the first rank's fit, and all ranks of the same speed
    for rank, (gpu, most, timings) in enumerate(ranks):
        if not most or not timings:
            continue
        for first_fit, group in groups.setdefault(gpu, []):
            ratios = [seconds / _seconds_of(first_fit, steps, samples) for steps, samples, seconds in timings]
            if min(ratios) > 1 / _SAME_SPEED and max(ratios) < _SAME_SPEED:
                group.append(rank)
                break
        else:
            groups[gpu].append((fitted(timings), [rank]))
    for group in (group for gpu_groups in groups.values() for _, group in gpu_groups):
        window, step, sample = fitted([timing for rank in group for timing in ranks[rank][2]])
        for rank in group:
            curves[rank] = AffineCurve(ranks[rank][1], step, sample, window, ranks[rank][0])
    return curves


def _seconds_of(fit: _Fit, steps: int, samples: int) -> float:
    return max(fit[0] + fit[1] * steps + fit[2] * samples, 1e-9)


def fitted(timings: Iterable[Timing]) -> _Fit:
    """The (window_seconds, step_seconds, sample_seconds) that fit the timings best; none is negative.

    timings: (micro-steps, samples, seconds) each. The fit is least squares of the relative error; with the absolute error,
    long windows would dominate the short ones. If the timings cannot separate two causes, the time goes to the samples.
    Raises `PlanError` without timings.
    """
    rows = [(steps, samples, seconds) for steps, samples, seconds in timings if seconds > 0]
    if not rows:
        raise PlanError("nothing was timed, so nothing can be said of a rank's speed")
    best: tuple[float, int, _Fit] | None = None
    # Non-negative least squares in three unknowns: the best of all seven choices of the nonzero unknowns.
    for unknowns in ((2,), (1,), (0,), (0, 2), (1, 2), (0, 1), (0, 1, 2)):
        solution = _least_squares([[(1.0, float(steps), float(samples))[unknown] / seconds for unknown in unknowns] for steps, samples, seconds in rows])
        if solution is None or min(solution) < 0:
            continue
        fit = [0.0, 0.0, 0.0]
        for unknown, value in zip(unknowns, solution):
            fit[unknown] = value
        error = sum(((fit[0] + fit[1] * steps + fit[2] * samples) / seconds - 1) ** 2 for steps, samples, seconds in rows)
        if best is None or error < best[0] * (1 - 1e-9) - 1e-15:
            best = (error, len(unknowns), (fit[0], fit[1], fit[2]))
    assert best is not None  # a fit of one unknown is never negative
    return best[2]


def _least_squares(rows: list[list[float]]) -> list[float] | None:
    """The x for which the product of every row with x is nearest to 1; None if the rows do not determine x."""
    width = len(rows[0])
    system = [[sum(row[i] * row[j] for row in rows) for j in range(width)] + [sum(row[i] for row in rows)] for i in range(width)]
    for pivot in range(width):
        largest = max(range(pivot, width), key=lambda line: abs(system[line][pivot]))
        system[pivot], system[largest] = system[largest], system[pivot]
        if abs(system[pivot][pivot]) <= 1e-9 * max(abs(value) for value in system[pivot]):
            return None
        for line in range(width):
            if line != pivot:
                factor = system[line][pivot] / system[pivot][pivot]
                system[line] = [a - factor * b for a, b in zip(system[line], system[pivot])]
    return [system[line][-1] / system[line][line] for line in range(width)]
