"""The function `fleet`: it forecasts the shares and the time of one data-parallel job on unlike GPUs that are not here.

The memory of the job comes from `estimate`, or from two figures that the user gives. The times come from `roofline`.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from autoaccum.devices import LEAST_GPU_HEADROOM
from autoaccum.distributed import AffineCurve, Fleet, equal_share, solve
from autoaccum.errors import NothingFits, UsageError
from autoaccum.probe import Request
from autoaccum.simulate import Profile, profiles
from autoaccum.units import in_words, parse_headroom, parse_size
from autoaccum.virtual import estimator, measured_times
from autoaccum.virtual.forecast import FleetCard, Forecast
from autoaccum.virtual.roofline import BYTES_MOVED_PER_KEPT_BYTE, Work, time_curves
from autoaccum.window import Source, parse_source

_LINK_BYTES_PER_SECOND = 6e9  # the rate of an all-reduce over PCIe without peer access
_FIXED_PER_PARAMETER = 20  # bytes: fp32 weight, gradient, two moments, DDP's bucket


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
    times: str | Path | Sequence[str | Path] = (),
    on_output: Callable[[str], None] | None = None,
) -> Forecast:
    """Shares, micro-batches and steps for every rank of one data-parallel job on unlike GPUs; no hardware needed.

    gpus: `"2*a100-80gb,4*t4"`; the ranks have this order.
    job: `"train.py:make_job"`, whose memory is simulated on each card. Instead of a job, give `fixed` and `per_sample`.
    fixed: bytes of weights, gradients, optimizer state and DDP's buckets. per_sample: bytes that each sample of a micro-batch adds.
    parameters: the number of parameters.
    flops_per_sample, bytes_per_sample: floating point operations and bytes moved in forward and backward. Without either, the
    bytes moved are three times `per_sample`.
    link: bytes per second of the slowest link between ranks, as a number or as `"10GB"`.
    dtype: "fp32", "tf32", "fp16" or "bf16", for the arithmetic; by default bf16 if all cards have it, else fp16.
    equal: the same share and micro-batches on every rank. lockstep: the same number of micro-steps on every rank.
    times: files of measured seconds, which count for their cards instead of all estimates: plans that `tune -o` wrote on the cards, or tables with the
    columns gpu, micro_batch, seconds (forward and backward of one micro-step) and, if known, window_seconds (the optimizer's step).

    Raises `UsageError` for an unknown card or a missing figure, `PlanError` if `equal` cannot divide the target, and `NothingFits`
    if no card holds one sample or one card cannot hold the fixed bytes.
    """
    started = time.monotonic()
    request = Request(target_batch, None, headroom, max_micro_batch, equal, lockstep=lockstep)
    counted = _parsed(gpus)
    world = sum(count for _, count in counted)
    if equal:
        equal_share(target_batch, world)
    figures = {"parameters": parameters, "flops_per_sample": flops_per_sample, "bytes_per_sample": bytes_per_sample, "link": link}
    for name, value in figures.items():
        if value is not None and not isinstance(value, str) and not (math.isfinite(value) and value > 0):
            raise UsageError(f"{name} must be a number above 0, not {value!r}")
    measured = measured_times.read([times] if isinstance(times, (str, Path)) else times)
    if strangers := sorted(set(measured) - {card.label for card, _ in counted}):
        raise UsageError(f"--times has seconds of {', '.join(strangers)}, and --gpus names {', '.join(dict.fromkeys(card.label for card, _ in counted))}")
    by_hand = fixed is not None or per_sample is not None
    if by_hand and (job is not None or fixed is None or per_sample is None):
        raise UsageError("give either a JOB, or both of --fixed and --per-sample" if job is not None else "--fixed and --per-sample belong together: give both")
    assumed: list[str] = []
    curves: dict[str, tuple[AffineCurve, AffineCurve, AffineCurve]] = {}
    if by_hand:
        assert fixed is not None and per_sample is not None
        work = Work(parse_size(fixed), parse_size(per_sample), 0)
        label, most = "by hand", [_most_by_hand(card, work, request) for card, _ in counted]
    else:
        origin = job if isinstance(job, Source) else parse_source(job)
        label = origin.label
        measured_by_hand = flops_per_sample is not None or bytes_per_sample is not None
        work, most, curves = _simulated(origin, request, [card.label for card, _ in counted], on_output, timed=not measured_by_hand)
    if parameters is None:
        parameters = work.parameters or work.fixed / _FIXED_PER_PARAMETER
        if not work.parameters:
            assumed.append(f"{parameters / 1e6:.0f} million parameters, {_FIXED_PER_PARAMETER} bytes of the fixed ones each (--parameters)")
    if 2 * parameters > work.fixed:
        raise UsageError(f"{parameters:.3g} parameters cannot lie in {in_words(work.fixed)} of fixed bytes, with two bytes each: give a larger --fixed")
    work = Work(work.fixed, work.per_sample, int(parameters), flops_per_sample, bytes_per_sample, work.gradient_bytes)
    if all(card.label in measured for card, _ in counted):
        pass
    elif curves:
        assumed.append("times: each operator of the job at the part of a card's rates that operators reach, with tensors in full and nothing fused")
    elif flops_per_sample is None and bytes_per_sample is None:
        assumed.append(f"times go as 1/bandwidth: a sample moves {BYTES_MOVED_PER_KEPT_BYTE} times what it keeps (--flops-per-sample, --bytes-per-sample)")
    for (card, _), size in zip(counted, most):
        if card.label in measured:
            curves[card.label] = (measured_times.curve(size, *measured[card.label], card.name),) * 3
    if measured:
        assumed.append(f"times of {', '.join(measured)}: the straight line through what was measured (--times)")
    precision = _dtype(dtype, [card for card, _ in counted], flops_per_sample)
    cards = tuple(
        FleetCard(card, count, size, curves.get(card.label) or time_curves(card, size, work, precision)) for (card, count), size in zip(counted, most)
    )
    link_rate = _LINK_BYTES_PER_SECOND if link is None else float(parse_size(link)) if isinstance(link, str) else link
    if link is None:
        assumed.append(f"the slowest link moves {link_rate / 1e9:.0f} GB/s (--link)")
    found = _forecast(label, request, cards, work, link_rate, tuple(assumed), tuple(_notes(cards, precision, dtype)), started)
    all_measured = all(card.label in measured for card, _ in counted)
    return replace(found, has_times=not by_hand or flops_per_sample is not None or bytes_per_sample is not None or all_measured)


def _forecast(
    label: str, request: Request, cards: tuple[FleetCard, ...], work: Work, link: float, assumed: tuple[str, ...], notes: tuple[str, ...], started: float
) -> Forecast:
    target, world = request.samples, sum(card.count for card in cards)

    def planned(pace: int, lockstep: bool = request.lockstep) -> Fleet:
        curves = [card.curves[pace] for card in cards for _ in range(card.count)]
        return Fleet.planned(curves, target, equal=request.equal, lockstep=lockstep)

    def crossing(ranks: int) -> float:
        # A ring: every rank sends and receives 2 (W - 1) / W of the gradients (Patarasu and Yuan, 2009); fp32.
        return 2 * (ranks - 1) / ranks * (work.gradient_bytes or 4 * work.parameters) / link if ranks > 1 else 0.0

    result = planned(1)
    # The slow and the fast end have the same shares, because the shares do not change while the job runs.
    ends = [
        Fleet(tuple(card.curves[pace] for card in cards for _ in range(card.count)), result.shares, result.lockstep, result.steps).seconds() for pace in (0, 2)
    ]
    window = result.seconds() + crossing(world)
    without: dict[str, float | None] = {}
    for name in dict.fromkeys(card.label for card in cards) if not request.equal else ():
        rest = [(card.curves[1], card.count) for card in cards if card.label != name]
        left = sum(count for _, count in rest)
        if left:
            without[name] = _seconds_of(rest, target, left, crossing)
    even = [target // world + (rank < target % world) for rank in range(world)]
    all_fit = all(curve.most for curve, share in zip(result.curves, even) if share)
    equal_seconds = max(curve.seconds(share) for curve, share in zip(result.curves, even)) + crossing(world) if all_fit else None
    lockstep_seconds = None
    if not request.equal and all(card.most for card in cards):
        lockstep_seconds = planned(1, lockstep=True).seconds() + crossing(world)
    return Forecast(
        label, target, result, cards, window, (ends[1] + crossing(world), ends[0] + crossing(world)), crossing(world), equal_seconds, lockstep_seconds, without, assumed, notes,
        round(time.monotonic() - started, 4),
    )  # fmt: skip


def _seconds_of(rest: Sequence[tuple[AffineCurve, int]], target: int, world: int, crossing: Callable[[int], float]) -> float | None:
    if not any(curve.most for curve, _ in rest):
        return None
    shares = solve(rest, target)
    curves = [curve for curve, count in rest for _ in range(count)]
    return max(curve.seconds(share) for curve, share in zip(curves, shares)) + crossing(world)


_MOST_RANKS = 100_000


def _parsed(gpus: str | Sequence[str]) -> list[tuple[Profile, int]]:
    """Parses `"2*a100-80gb,4*t4"` into cards and their numbers. Raises `UsageError` for an unknown card or a wrong number."""
    texts = gpus.split(",") if isinstance(gpus, str) else list(gpus)
    counted = []
    for text in texts:
        match = re.fullmatch(r"\s*(?:(-?[\d.]+)\s*[*x×]\s*)?(\S.*?)\s*", text)
        if match is None:
            raise UsageError(f"{text!r} in --gpus names no card: write for instance 2*a100-80gb,4*t4")
        if match[1] is not None and (not match[1].isdigit() or len(match[1]) > 18 or not int(match[1])):
            raise UsageError(f"{text.strip()!r} in --gpus: how many must be a whole number, at least 1")
        try:
            card = profiles.load(match[2])
        except UsageError as error:
            raise UsageError(str(error).partition("; or give a size")[0]) from None
        if card.bandwidth is None:
            raise UsageError(f"nobody says how fast {card.label} is, so it cannot be given a share: name a card (autoaccum profiles list)")
        counted.append((card, int(match[1] or 1)))
    if (ranks := sum(count for _, count in counted)) > _MOST_RANKS:
        raise UsageError(f"--gpus names {ranks} cards, each a rank with its own row: give at most {_MOST_RANKS}")
    return counted


def _most_by_hand(card: Profile, work: Work, request: Request) -> int:
    headroom = parse_headroom(request.headroom, card.available_bytes)
    if "%" in str(request.headroom):
        headroom = max(headroom, LEAST_GPU_HEADROOM)
    left = card.available_bytes - headroom - work.fixed
    if left < 0:
        raise NothingFits(
            f"{card.label} cannot hold what is fixed: {in_words(work.fixed)} of {in_words(max(card.available_bytes - headroom, 0))}. Every rank of a "
            "data-parallel job holds all of it: leave the card out, or shard the optimizer's state (ZeRO-1) or the model (FSDP)",
            budget_bytes=card.available_bytes - headroom,
        )
    return min(left // work.per_sample, request.max_micro_batch or left, request.samples)


def _simulated(
    origin: Source, request: Request, labels: Sequence[str], on_output: Callable[[str], None] | None, *, timed: bool
) -> tuple[Work, list[int], dict[str, tuple[AffineCurve, AffineCurve, AffineCurve]]]:
    """The job's work, the largest micro-batch of each card, and its time curves by card, all simulated. Memory for DDP's buckets stays free.

    timed: False leaves the curves out, where the user has said what a sample takes.
    """
    names = list(dict.fromkeys(labels))
    estimates = estimator.estimate_source(
        origin, Request(request.samples, None, request.headroom, request.max_micro_batch), names, on_output=on_output, buckets=True
    )
    by_name = dict(zip(names, estimates.gpus))
    for name, estimate in by_name.items():
        resident = sum(estimate.breakdown[kind] for kind in ("parameters", "gradients", "optimizer"))
        if not estimate.fits and resident + estimate.breakdown["gradients"] > estimate.budget_bytes:
            raise NothingFits(
                f"{name} cannot hold what is fixed: {in_words(resident)} and as much again as the gradients, of {in_words(estimate.budget_bytes)}: leave the card out"
            )
    first = estimates.gpus[0]
    fixed = sum(first.breakdown[kind] for kind in ("parameters", "gradients", "optimizer"))
    samples = first.micro_batch or 1
    most = {name: (estimate.micro_batch or 0) if estimate.fits else 0 for name, estimate in by_name.items()}
    told = estimator.timed(origin, request, most, on_output=on_output)
    any_card = told[names[0]]
    gradients = any_card["gradient_bytes"]
    work = Work(fixed + gradients, max((first.peak_bytes - fixed) // samples, 1), any_card["parameters"], gradient_bytes=gradients)
    curves = {}
    for name in names if timed else ():
        slow, middle, fast = (AffineCurve(most[name], step, sample, end, profiles.load(name).name) for step, sample, end in told[name]["curves"])
        curves[name] = (slow, middle, fast)
    return work, [most[label] for label in labels], curves


def _dtype(requested: str | None, cards: Sequence[Profile], flops: float | None) -> str:
    if requested is not None and requested not in profiles.DTYPES:
        raise UsageError(f"--dtype {requested!r}: it must be one of {', '.join(profiles.DTYPES)}")
    dtype = requested or ("bf16" if all("bf16" in card.flops for card in cards) else "fp16")
    unknown = [card.label for card in cards if dtype not in card.flops]
    if unknown and flops is not None:
        raise UsageError(f"nobody says how fast {', '.join(dict.fromkeys(unknown))} is in {dtype}: give another --dtype, or leave --flops-per-sample out")
    return dtype


def _notes(cards: Sequence[FleetCard], dtype: str, requested: str | None) -> Iterator[str]:
    without_bf16 = list(dict.fromkeys(card.label for card in cards if "bf16" not in card.profile.flops and card.profile.flops))
    if without_bf16:
        text = f"{', '.join(without_bf16)} {'has' if len(without_bf16) == 1 else 'have'} no native bf16"
        if requested == "bf16" or len(without_bf16) < len({card.label for card in cards}):
            yield f"{text}: one dtype for the whole job, fp16 with a GradScaler or fp32" + (", not the bf16 that was asked for" if requested == "bf16" else "")
        else:
            yield f"{text}: fp16 with a GradScaler, or fp32"
    for card in cards:
        if not card.most:
            yield f"{card.label} cannot hold one sample: it gets none and only slows the job down, leave it out"
