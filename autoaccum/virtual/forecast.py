"""The `Forecast` of one data-parallel job on unlike GPUs that are not here, and its table."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from autoaccum.distributed import AffineCurve, Fleet
from autoaccum.plan import Plan, PlannedDevice, window_notation
from autoaccum.simulate import Profile
from autoaccum.tuner import versions
from autoaccum.units import duration_in_words


@dataclass(frozen=True)
class FleetCard:
    """One kind of card in the fleet: the number of cards, the largest micro-batch of each (`most`), and its time curves."""

    profile: Profile
    count: int
    most: int
    curves: tuple[AffineCurve, AffineCurve, AffineCurve]  # slow, middle, fast

    @property
    def label(self) -> str:
        return self.profile.label


@dataclass(frozen=True)
class Forecast:
    """The predicted plan of a fleet that is not here. Times are in seconds; `interval` is the expected range of the window's time.

    fleet: the plan. cards: the kinds of card, in the order of their ranks. link_seconds: the time of the all-reduce.
    equal_split_seconds: the window's time with the same share on every rank; None if that does not fit.
    lockstep_seconds: the window's time with the same number of micro-steps on every rank; None if it was not computed.
    without: for each card's name, the window's time without all cards of that name; None if the others cannot hold a sample.
    assumed: figures that were assumed, in words. notes: notes on the cards. seconds: the time that the forecast took.
    has_times: False if nothing is known of what a sample computes and moves: then only the ratios of times are worth something, and only they are printed.
    """

    job: str
    target_batch: int
    fleet: Fleet
    cards: tuple[FleetCard, ...]
    window_seconds: float
    interval: tuple[float, float]
    link_seconds: float
    equal_split_seconds: float | None
    lockstep_seconds: float | None
    without: dict[str, float | None]
    assumed: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: float
    has_times: bool = True

    def __str__(self) -> str:
        return self.explain()

    def explain(self) -> str:
        """The table of the fleet, and notes below it."""
        return "\n".join(_lines(self))

    def as_dict(self) -> dict[str, Any]:
        """The document that `fleet --json` prints, schema autoaccum.fleet/1."""
        ranks = []
        for rank, (curve, share) in enumerate(zip(self.fleet.curves, self.fleet.shares)):
            sizes = self._sizes(rank)
            ranks.append(
                {
                    "rank": rank,
                    "gpu": self._label(rank),
                    "share": share,
                    "micro_batch": max(sizes, default=0),
                    "accumulation_steps": len(sizes),
                    "micro_batches": list(sizes),
                    "largest_micro_batch": curve.most,
                    "predicted_seconds": curve.seconds(share),
                }
            )
        return {
            "schema": "autoaccum.fleet/1",
            "job": self.job,
            "target_batch": self.target_batch,
            "lockstep": self.fleet.lockstep,
            "ranks": ranks,
            "predicted_window_seconds": self.window_seconds,
            "predicted_window_seconds_interval": list(self.interval),
            "all_reduce_seconds": self.link_seconds,
            "equal_split_seconds": self.equal_split_seconds,
            "lockstep_seconds": self.lockstep_seconds,
            "without_seconds": self.without,
            "has_times": self.has_times,
            "assumed": list(self.assumed),
            "notes": list(self.notes),
            "seconds": self.seconds,
        }

    def plan(self, rank: int = 0) -> Plan:
        """The plan of one rank. `forecast.plan().save(path)` writes a file that every rank loads under torchrun with `Plan.load(path)`.

        The ranks have the order of the cards.
        """
        card = self._card(rank).profile
        sizes = self._sizes(rank)
        return Plan(
            target_batch=self.target_batch,
            micro_batch=max(sizes, default=0),
            accumulation_steps=len(sizes),
            micro_batches=sizes,
            share=self.fleet.shares[rank],
            shares=self.fleet.shares,
            rank=rank,
            world_size=len(self.fleet.shares),
            largest_fit=self.fleet.curves[rank].most,
            smallest_refused=None,
            device=PlannedDevice("cuda", card.name, None, card.total_bytes, card.available_bytes, 0),
            shapes={},
            budget_bytes=0,
            peak_bytes=None,
            outside_bytes=None,
            headroom_bytes=0,
            samples_per_second=self.target_batch / self.window_seconds,
            trials=(),
            seconds=self.seconds,
            versions=versions(),
            job_fingerprint="",
            job=self.job,
            predicted=True,
            warnings=("nothing of this plan was run: sizes are estimated and times are a roofline; tune under torchrun measures both",),
            fleet=self.fleet,
        )

    def _sizes(self, rank: int) -> tuple[int, ...]:
        return tuple(size for size in self.fleet.sizes(rank, self.target_batch) if size)

    def _card(self, rank: int) -> FleetCard:
        for card in self.cards:
            if rank < card.count:
                return card
            rank -= card.count
        raise IndexError(rank)

    def _label(self, rank: int) -> str:
        return self._card(rank).label


def _between(low: float, middle: float, high: float) -> str:
    """A time and its interval; the time alone where it was measured."""
    return duration_in_words(middle) + (f" ({duration_in_words(low)} to {duration_in_words(high)})" if low < high else "")


_TABLE = (("gpu", 18), ("ranks", 7), ("share", 7), ("micro-batches", 22), ("most", 6), ("window", 26), ("idle", 6))
_WITHOUT_TIMES = 5  # columns


def _lines(forecast: Forecast) -> Iterator[str]:
    fleet = forecast.fleet
    where = f" of {forecast.job}" if forecast.job != "by hand" else ""
    times = "times are estimates" if forecast.has_times else "no times: they need a JOB, or --flops-per-sample and --bytes-per-sample"
    columns = _TABLE if forecast.has_times else _TABLE[:_WITHOUT_TIMES]
    yield f"{forecast.target_batch} samples a step{where} over {len(fleet.shares)} rank{'s' if len(fleet.shares) > 1 else ''}; {times}"
    yield "".join(f"{title:<{width}}" for title, width in columns).rstrip()
    slowest, first = fleet.seconds(), 0
    for card in forecast.cards:
        shares = fleet.shares[first : first + card.count]
        for share, group in groupby(enumerate(shares, first), key=lambda pair: pair[1]):
            ranks = [rank for rank, _ in group]
            sizes = forecast._sizes(ranks[0])
            low, middle, high = (curve.seconds(share) if card.most else 0.0 for curve in card.curves[::-1])
            cells = (
                card.label,
                str(len(ranks)),
                str(share),
                window_notation(sizes) if sizes else "cannot hold one sample" if not card.most else "none",
                str(card.most),
                _between(low, middle, high) if share else "",
                f"{1 - middle / slowest:.1%}" if share and not fleet.lockstep else "",
            )
            yield "".join(f"{cell:<{max(width, len(cell) + 1)}}" for cell, (_, width) in zip(cells, columns)).rstrip()
        first += card.count
    low, high = forecast.interval
    per_second = forecast.target_batch / forecast.window_seconds
    if forecast.has_times:
        yield f"window {_between(low, forecast.window_seconds, high)}, of it all-reduce {duration_in_words(forecast.link_seconds)}: {per_second:.0f} samples a second"
    if forecast.equal_split_seconds is None:
        yield "an even split does not fit: a card that would have to hold a sample cannot"
    elif len(set(fleet.shares)) > 1 and not math.isclose(forecast.equal_split_seconds, forecast.window_seconds):
        took = f"{duration_in_words(forecast.equal_split_seconds)}, " if forecast.has_times else ""
        yield f"an even split would take {took}{forecast.equal_split_seconds / forecast.window_seconds:.2f} times as long"
    if forecast.lockstep_seconds is not None and not fleet.lockstep and len(fleet.shares) > 1:
        took = (
            duration_in_words(forecast.lockstep_seconds) if forecast.has_times else f"{forecast.lockstep_seconds / forecast.window_seconds:.2f} times as long"
        )
        yield f"with the same number of micro-steps on every rank (sharded parameters): {took}"
    for name, seconds in forecast.without.items():
        if seconds is None:
            continue
        gain = seconds / forecast.window_seconds
        if not forecast.has_times:
            yield f"without {name}: {gain:.2f} times as long" + ("" if gain > 1.005 else ": leave it out")
            continue
        yield f"without {name}: {duration_in_words(seconds)}, " + (
            f"so keeping it gives {gain:.2f} times the speed" if gain > 1.005 else "faster: leave it out" if gain < 0.995 else "no slower: leave it out"
        )
    yield from (f"note: {note}" for note in forecast.notes)
    yield from (f"assumed: {assumption}" for assumption in forecast.assumed)
