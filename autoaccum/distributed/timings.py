"""How fast each rank is, from what was timed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from autoaccum.distributed.speed_curves import AffineCurve
from autoaccum.errors import PlanError

Timing = tuple[int, int, float]  # micro-steps, samples, seconds
_Fit = tuple[float, float, float]  # window_seconds, step_seconds, sample_seconds
_ALIKE = 1.3  # ranks of one GPU model whose times differ by less are taken to differ by noise


def alike(ranks: Sequence[tuple[str, int, Sequence[Timing]]]) -> list[AffineCurve]:
    """Every rank's curve from its GPU's name, its most, and its timings (none where it cannot hold a sample).

    Ranks on the same model of GPU whose times are about the same get one curve through all their timings: else noise
    between equal cards would become unequal shares.
    """
    found = [AffineCurve(0, 0.0, 0.0, gpu=gpu) for gpu, _, _ in ranks]
    groups: dict[str, list[tuple[_Fit, list[int]]]] = {}  # by GPU: the first rank's fit, and all that are like it
    for rank, (gpu, most, timings) in enumerate(ranks):
        if not most or not timings:
            continue
        for first, group in groups.setdefault(gpu, []):
            ratios = [seconds / _seconds_of(first, steps, samples) for steps, samples, seconds in timings]
            if min(ratios) > 1 / _ALIKE and max(ratios) < _ALIKE:
                group.append(rank)
                break
        else:
            groups[gpu].append((fitted(timings), [rank]))
    for group in (group for of_gpu in groups.values() for _, group in of_gpu):
        window, step, sample = fitted([timing for rank in group for timing in ranks[rank][2]])
        for rank in group:
            found[rank] = AffineCurve(ranks[rank][1], step, sample, window, ranks[rank][0])
    return found


def _seconds_of(curve: _Fit, steps: int, samples: int) -> float:
    return max(curve[0] + curve[1] * steps + curve[2] * samples, 1e-9)


def fitted(timings: Iterable[Timing]) -> _Fit:
    """(window_seconds, step_seconds, sample_seconds) that explain timings of (micro-steps, samples, seconds) best, none negative.

    Least squares of the relative error, since long windows would drown the short ones; where two
    causes cannot be told apart by what was timed, the samples get it.
    """
    rows = [(steps, samples, seconds) for steps, samples, seconds in timings if seconds > 0]
    if not rows:
        raise PlanError("nothing was timed, so nothing can be said of a rank's speed")
    best: tuple[float, int, _Fit] | None = None
    # Non-negative least squares in three unknowns: the best of all seven choices of which are zero.
    for kept in ((2,), (1,), (0,), (0, 2), (1, 2), (0, 1), (0, 1, 2)):
        found = _least_squares([[(1.0, float(steps), float(samples))[which] / seconds for which in kept] for steps, samples, seconds in rows])
        if found is None or min(found) < 0:
            continue
        whole = [0.0, 0.0, 0.0]
        for which, value in zip(kept, found):
            whole[which] = value
        error = sum(((whole[0] + whole[1] * steps + whole[2] * samples) / seconds - 1) ** 2 for steps, samples, seconds in rows)
        if best is None or error < best[0] * (1 - 1e-9) - 1e-15:
            best = (error, len(kept), (whole[0], whole[1], whole[2]))
    assert best is not None  # one unknown alone is never negative
    return best[2]


def _least_squares(rows: list[list[float]]) -> list[float] | None:
    """x that brings every row's product with it nearest to 1; None where the rows do not determine it."""
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
