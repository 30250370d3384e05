"""One data-parallel job on unlike GPUs that are not here: who carries what, and how long a window should take.

What fits comes from `estimate`, or from two figures given by hand. Times are a roofline: a micro-step takes as long as its
arithmetic or its memory traffic at the share of the card's peak that training usually reaches, whichever is longer. That is an
estimate, with an interval; `tune` under torchrun measures, and shares out anew.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from autoaccum import estimating, profiles
from autoaccum.devices.base import LEAST_GPU_HEADROOM
from autoaccum.errors import NothingFits, UsageError
from autoaccum.explaining import in_short, notation
from autoaccum.fleets import Affine, Fleet, equal_share, solve
from autoaccum.job import Source, source
from autoaccum.line import Wish, versions
from autoaccum.plan import Plan, PlannedDevice
from autoaccum.profiles import Profile
from autoaccum.units import in_words, parse_headroom, parse_size

# Shares of a card's dense peak that training reaches: of arithmetic 0.30 to 0.55 (Chowdhery et al. 2022, PaLM, table 3: 21 to 57 % across
# published large models), of memory bandwidth 0.5 to 0.85. The middle is used, the ends give the interval.
_ARITHMETIC = (0.30, 0.42, 0.55)
_BANDWIDTH = (0.50, 0.70, 0.85)
# Bytes that cross the card's memory bus, per byte or parameter; fp32 weights and Adam.
_PER_KEPT_BYTE = 3  # an activation is written once and read, or its gradient written, twice
_PER_PARAMETER_AND_STEP = 10  # weights read in forward and backward, gradients added to, in part in half precision
_PER_PARAMETER_AND_WINDOW = 28  # weights, gradients and two moments read and written
_LAUNCH_SECONDS = 12e-3  # of a micro-step's kernels from Python; seen to vary from 3 to 30 ms
_LINK_BYTES_PER_SECOND = 6e9  # what an all-reduce over PCIe without peer access reaches
_FIXED_PER_PARAMETER = 20  # fp32 weight, gradient, two moments, DDP's bucket


@dataclass(frozen=True)
class Work:
    """What a job asks of a card; bytes, and floating point operations. None where nobody said.

    fixed: weights, gradients, optimizer, buckets. per_sample: what each sample of a micro-batch keeps.
    """

    fixed: int
    per_sample: int
    parameters: int
    flops_per_sample: float | None = None
    bytes_per_sample: float | None = None


@dataclass(frozen=True)
class Card:
    """A kind of card in the fleet: how many, the most samples it holds at once, and what a window of a share takes on it."""

    profile: Profile
    count: int
    most: int
    curves: tuple[Affine, Affine, Affine]  # slow, middle, fast

    @property
    def label(self) -> str:
        return self.profile.label


@dataclass(frozen=True)
class Forecast:
    """One plan for a fleet that is not here. Times in seconds, predicted; `interval` is where a window's should lie.

    fleet: the plan itself. cards: kinds of card in the order of their ranks. link_seconds: of the all-reduce. equal_split_seconds: with the
    same share on every rank, None where that does not fit. without: by card's name, the window if all cards of that
    name were left out, None where the others cannot do it. lockstep_seconds: if all ranks ran the same number of micro-steps.
    """

    job: str
    target_batch: int
    fleet: Fleet
    cards: tuple[Card, ...]
    window_seconds: float
    interval: tuple[float, float]
    link_seconds: float
    equal_split_seconds: float | None
    lockstep_seconds: float | None
    without: dict[str, float | None]
    assumed: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        return self.explain()

    def explain(self) -> str:
        """The table and what is to be said of it."""
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
            "assumed": list(self.assumed),
            "notes": list(self.notes),
            "seconds": self.seconds,
        }

    def plan(self, rank: int = 0) -> Plan:
        """The plan that ranks load: `forecast.plan().save(path)`, then `Plan.load(path)` under torchrun, ranks in the order of the cards."""
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

    def _card(self, rank: int) -> Card:
        for card in self.cards:
            if rank < card.count:
                return card
            rank -= card.count
        raise IndexError(rank)

    def _label(self, rank: int) -> str:
        return self._card(rank).label


def fleet(
    gpus: str | Sequence[str],
    *,
    target_batch: int,
    job: str | Source | None = None,
    fixed: int | str | None = None,
    per_sample: int | str | None = None,
    parameters: float | None = None,
    flops_per_sample: float | None = None,
    bytes_per_sample: float | None = None,
    link: float | str | None = None,
    dtype: str | None = None,
    headroom: int | str = "3%",
    max_micro_batch: int | None = None,
    equal: bool = False,
    lockstep: bool = False,
    said: Callable[[str], None] | None = None,
) -> Forecast:
    """Shares, micro-batches and steps for every rank of one data-parallel job on unlike GPUs; no hardware needed.

    gpus: `"2*a100-80gb,4*t4"`, ranks in that order. job: `"train.py:make_job"`, whose memory is simulated on each card; without one,
    fixed: bytes of weights, gradients and optimizer, and per_sample: bytes that each sample of a micro-batch adds.
    parameters: their number. flops_per_sample, bytes_per_sample: of forward and backward; without either, traffic is
    taken as three times `per_sample`. link: bytes per second of the slowest link between ranks, or `"10GB"`. dtype: of the arithmetic, "fp32", "tf32", "fp16"
    or "bf16"; by default bf16 where all cards have it, else fp16. equal: the same on every rank. lockstep: the same number of micro-steps.

    Raises `UsageError` for an unknown card or a missing figure, `PlanError` for a target that `equal` cannot share out, and `NothingFits`
    where no card holds one sample, or one cannot even hold what is fixed.
    """
    started = time.monotonic()
    wish = Wish(target_batch, None, headroom, max_micro_batch, equal, lockstep=lockstep)
    counted = _parsed(gpus)
    world = sum(count for _, count in counted)
    if equal:
        equal_share(target_batch, world)
    figures = {"parameters": parameters, "flops_per_sample": flops_per_sample, "bytes_per_sample": bytes_per_sample, "link": link}
    for name, value in figures.items():
        if value is not None and not isinstance(value, str) and not (math.isfinite(value) and value > 0):
            raise UsageError(f"{name} must be a number above 0, not {value!r}")
    by_hand = fixed is not None or per_sample is not None
    if by_hand and (job is not None or fixed is None or per_sample is None):
        raise UsageError("give either a JOB, or both of --fixed and --per-sample" if job is not None else "--fixed and --per-sample belong together: give both")
    assumed: list[str] = []
    if by_hand:
        assert fixed is not None and per_sample is not None
        work = Work(parse_size(fixed), parse_size(per_sample), 0)
        label, most = "by hand", [_most_by_hand(card, work, wish) for card, _ in counted]
    else:
        origin = job if isinstance(job, Source) else source(job)
        label = origin.label
        work, most = _simulated(origin, wish, [card.label for card, _ in counted], said)
    if parameters is None:
        parameters = work.parameters or work.fixed / _FIXED_PER_PARAMETER
        if not work.parameters:
            assumed.append(f"{parameters / 1e6:.0f} million parameters, {_FIXED_PER_PARAMETER} bytes of the fixed ones each (--parameters)")
    if 2 * parameters > work.fixed:
        raise UsageError(f"{parameters:.3g} parameters cannot lie in {in_words(work.fixed)} of fixed bytes, with two bytes each: give a larger --fixed")
    work = Work(work.fixed, work.per_sample, int(parameters), flops_per_sample, bytes_per_sample)
    if flops_per_sample is None and bytes_per_sample is None:
        assumed.append(f"times go as 1/bandwidth: a sample moves {_PER_KEPT_BYTE} times what it keeps (--flops-per-sample, --bytes-per-sample)")
    precision = _dtype(dtype, [card for card, _ in counted], flops_per_sample)
    cards = tuple(Card(card, count, size, _curves(card, size, work, precision)) for (card, count), size in zip(counted, most))
    moves = _LINK_BYTES_PER_SECOND if link is None else float(parse_size(link)) if isinstance(link, str) else link
    if link is None:
        assumed.append(f"the slowest link moves {moves / 1e9:.0f} GB/s (--link)")
    return _forecast(label, wish, cards, work, moves, tuple(assumed), tuple(_notes(cards, precision, dtype)), started)


def _forecast(
    label: str, wish: Wish, cards: tuple[Card, ...], work: Work, link: float, assumed: tuple[str, ...], notes: tuple[str, ...], started: float
) -> Forecast:
    target, world = wish.target_batch, sum(card.count for card in cards)

    def planned(pace: int, lockstep: bool = wish.lockstep) -> Fleet:
        curves = [card.curves[pace] for card in cards for _ in range(card.count)]
        return Fleet.planned(curves, target, equal=wish.equal, lockstep=lockstep)

    def crossing(ranks: int) -> float:
        # A ring: every rank sends and receives 2 (W - 1) / W of the gradients (Patarasu and Yuan, 2009); fp32.
        return 2 * (ranks - 1) / ranks * 4 * work.parameters / link if ranks > 1 else 0.0

    found = planned(1)
    # The same shares at the slow and at the fast end: that is what would be run.
    ends = [
        Fleet(tuple(card.curves[pace] for card in cards for _ in range(card.count)), found.shares, found.lockstep, found.steps).seconds() for pace in (0, 2)
    ]
    window = found.seconds() + crossing(world)
    without: dict[str, float | None] = {}
    for name in dict.fromkeys(card.label for card in cards) if not wish.equal else ():
        rest = [(card.curves[1], card.count) for card in cards if card.label != name]
        left = sum(count for _, count in rest)
        if left:
            without[name] = _seconds_of(rest, target, left, crossing)
    even = [target // world + (rank < target % world) for rank in range(world)]
    all_fit = all(curve.most for curve, share in zip(found.curves, even) if share)
    split = max(curve.seconds(share) for curve, share in zip(found.curves, even)) + crossing(world) if all_fit else None
    step = None
    if not wish.equal and all(card.most for card in cards):
        step = planned(1, lockstep=True).seconds() + crossing(world)
    return Forecast(
        label, target, found, cards, window, (ends[1] + crossing(world), ends[0] + crossing(world)), crossing(world), split, step, without, assumed, notes,
        round(time.monotonic() - started, 4),
    )  # fmt: skip


def _seconds_of(rest: Sequence[tuple[Affine, int]], target: int, world: int, crossing: Callable[[int], float]) -> float | None:
    if not any(curve.most for curve, _ in rest):
        return None
    shares = solve(rest, target)
    curves = [curve for curve, count in rest for _ in range(count)]
    return max(curve.seconds(share) for curve, share in zip(curves, shares)) + crossing(world)


def _parsed(gpus: str | Sequence[str]) -> list[tuple[Profile, int]]:
    """`"2*a100-80gb,4*t4"` as cards and how many. Raises `UsageError` for what is no card."""
    texts = gpus.split(",") if isinstance(gpus, str) else list(gpus)
    found = []
    for text in texts:
        told = re.fullmatch(r"\s*(?:(-?[\d.]+)\s*[*x×]\s*)?(\S.*?)\s*", text)
        if told is None:
            raise UsageError(f"{text!r} in --gpus names no card: write for instance 2*a100-80gb,4*t4")
        if told[1] is not None and (not told[1].isdigit() or not int(told[1])):
            raise UsageError(f"{text.strip()!r} in --gpus: how many must be a whole number, at least 1")
        try:
            card = profiles.load(told[2])
        except UsageError as unknown:
            raise UsageError(str(unknown).partition("; or give a size")[0]) from None
        if card.bandwidth is None:
            raise UsageError(f"nobody says how fast {card.label} is, so it cannot be given a share: name a card (autoaccum profiles list)")
        found.append((card, int(told[1] or 1)))
    return found


def _most_by_hand(card: Profile, work: Work, wish: Wish) -> int:
    kept = parse_headroom(wish.headroom, card.available_bytes)
    if "%" in str(wish.headroom):
        kept = max(kept, LEAST_GPU_HEADROOM)
    left = card.available_bytes - kept - work.fixed
    if left < 0:
        raise NothingFits(
            f"{card.label} cannot hold what is fixed: {in_words(work.fixed)} of {in_words(max(card.available_bytes - kept, 0))}. Every rank of a "
            "data-parallel job holds all of it: leave the card out, or shard the optimizer's state (ZeRO-1) or the model (FSDP)",
            budget_bytes=card.available_bytes - kept,
        )
    return min(left // work.per_sample, wish.max_micro_batch or left, wish.target_batch)


def _simulated(origin: Source, wish: Wish, labels: Sequence[str], said: Callable[[str], None] | None) -> tuple[Work, list[int]]:
    """What a job takes, and the most that each card holds, both simulated, with room for DDP's buckets."""
    names = list(dict.fromkeys(labels))
    found = estimating.estimate_source(origin, Wish(wish.target_batch, None, wish.headroom, wish.max_micro_batch), names, said=said, buckets=True)
    by_name = dict(zip(names, found.gpus))
    for name, each in by_name.items():
        held = sum(each.breakdown[kind] for kind in ("parameters", "gradients", "optimizer"))
        if not each.fits and held + each.breakdown["gradients"] > each.budget_bytes:
            raise NothingFits(
                f"{name} cannot hold what is fixed: {in_words(held)} and as much again as the gradients, of {in_words(each.budget_bytes)}: leave the card out"
            )
    any_one = found.gpus[0]
    fixed = sum(any_one.breakdown[kind] for kind in ("parameters", "gradients", "optimizer"))
    samples = any_one.micro_batch or 1
    work = Work(fixed + any_one.breakdown["gradients"], max((any_one.peak_bytes - fixed) // samples, 1), any_one.breakdown["gradients"] // 4)
    return work, [(by_name[label].micro_batch or 0) if by_name[label].fits else 0 for label in labels]


def _dtype(asked: str | None, cards: Sequence[Profile], flops: float | None) -> str:
    if asked is not None and asked not in profiles.DTYPES:
        raise UsageError(f"--dtype {asked!r}: it must be one of {', '.join(profiles.DTYPES)}")
    found = asked or ("bf16" if all("bf16" in card.flops for card in cards) else "fp16")
    unknown = [card.label for card in cards if found not in card.flops]
    if unknown and flops is not None:
        raise UsageError(f"nobody says how fast {', '.join(dict.fromkeys(unknown))} is in {found}: give another --dtype, or leave --flops-per-sample out")
    return found


def _curves(card: Profile, most: int, work: Work, dtype: str) -> tuple[Affine, Affine, Affine]:
    assert card.bandwidth is not None  # `_parsed` refuses others
    bandwidth = float(card.bandwidth.value)
    moved = work.bytes_per_sample if work.bytes_per_sample is not None else 0.0 if work.flops_per_sample is not None else _PER_KEPT_BYTE * work.per_sample
    made = []
    for arithmetic, traffic in zip(_ARITHMETIC, _BANDWIDTH):
        sample = moved / (bandwidth * traffic)
        if work.flops_per_sample is not None:
            sample = max(sample, work.flops_per_sample / (card.flops[dtype].value * arithmetic))
        step = _LAUNCH_SECONDS + work.parameters * _PER_PARAMETER_AND_STEP / (bandwidth * traffic)
        made.append(Affine(most, step, sample, work.parameters * _PER_PARAMETER_AND_WINDOW / (bandwidth * traffic), card.name))
    return made[0], made[1], made[2]


def _notes(cards: Sequence[Card], dtype: str, asked: str | None) -> Iterator[str]:
    plain = list(dict.fromkeys(card.label for card in cards if "bf16" not in card.profile.flops and card.profile.flops))
    if plain:
        those = f"{', '.join(plain)} {'has' if len(plain) == 1 else 'have'} no native bf16"
        if asked == "bf16" or len(plain) < len({card.label for card in cards}):
            yield f"{those}: one dtype for the whole job, fp16 with a GradScaler or fp32" + (", not the bf16 that was asked for" if asked == "bf16" else "")
        else:
            yield f"{those}: fp16 with a GradScaler, or fp32"
    for card in cards:
        if not card.most:
            yield f"{card.label} cannot hold one sample: it gets none and only slows the job down, leave it out"


_TABLE = (("gpu", 18), ("ranks", 7), ("share", 7), ("micro-batches", 22), ("most", 6), ("window", 26), ("idle", 6))


def _lines(told: Forecast) -> Iterator[str]:
    fleet = told.fleet
    where = f" of {told.job}" if told.job != "by hand" else ""
    yield f"{told.target_batch} samples a step{where} over {len(fleet.shares)} rank{'s' if len(fleet.shares) > 1 else ''}; times are estimates"
    yield "".join(f"{title:<{width}}" for title, width in _TABLE).rstrip()
    slowest, first = fleet.seconds(), 0
    for card in told.cards:
        shares = fleet.shares[first : first + card.count]
        for share, alike in groupby(enumerate(shares, first), key=lambda each: each[1]):
            ranks = [rank for rank, _ in alike]
            sizes = told._sizes(ranks[0])
            low, middle, high = (curve.seconds(share) if card.most else 0.0 for curve in card.curves[::-1])
            cells = (
                card.label,
                str(len(ranks)),
                str(share),
                notation(sizes) if sizes else "cannot hold one sample" if not card.most else "none",
                str(card.most),
                f"{in_short(middle)} ({in_short(low)} to {in_short(high)})" if share else "",
                f"{1 - middle / slowest:.1%}" if share and not fleet.lockstep else "",
            )
            yield "".join(f"{cell:<{max(width, len(cell) + 1)}}" for cell, (_, width) in zip(cells, _TABLE)).rstrip()
        first += card.count
    low, high = told.interval
    per_second = told.target_batch / told.window_seconds
    yield f"window {in_short(told.window_seconds)} ({in_short(low)} to {in_short(high)}), of it all-reduce {in_short(told.link_seconds)}: {per_second:.0f} samples a second"
    if told.equal_split_seconds is None:
        yield "an even split does not fit: a card that would have to hold a sample cannot"
    elif len(set(fleet.shares)) > 1 and not math.isclose(told.equal_split_seconds, told.window_seconds):
        yield f"an even split would take {in_short(told.equal_split_seconds)}, {told.equal_split_seconds / told.window_seconds:.2f} times as long"
    if told.lockstep_seconds is not None and not fleet.lockstep and len(fleet.shares) > 1:
        yield f"with the same number of micro-steps on every rank (sharded parameters): {in_short(told.lockstep_seconds)}"
    for name, seconds in told.without.items():
        if seconds is None:
            continue
        gain = seconds / told.window_seconds
        yield f"without {name}: {in_short(seconds)}, " + (
            f"so keeping it gives {gain:.2f} times the speed" if gain > 1.005 else "faster: leave it out" if gain < 0.995 else "no slower: leave it out"
        )
    yield from (f"note: {note}" for note in told.notes)
    yield from (f"assumed: {each}" for each in told.assumed)
