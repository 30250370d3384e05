"""A window's memory as a tape: which blocks are born and die, in order. Replayed by an allocator; needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, field, replace
from functools import cached_property
from typing import Any

from autoaccum.simulate.allocator import Allocator, Block

EMPTY_CACHE = -(1 << 62)  # an event that is no block's: `torch.cuda.empty_cache()`, or cuDNN's benchmark doing the same
KINDS = ("parameters", "gradients", "optimizer", "activations", "workspace")


@dataclass(frozen=True)
class Mark:
    """From this event on the job is in `phase`: "setup", "forward", "backward", "clip", "step" or "end", of that window and micro-batch."""

    event: int
    phase: str
    window: int
    piece: int


@dataclass(frozen=True)
class Staging:
    """A sum over part of a tensor, whose thread blocks meet in memory if there are several for each result.

    outputs, inputs: results, and how many values go into each. along: True where the values of a result lie side by side.
    vector: how many results a thread makes at once. Rule: aten/src/ATen/native/cuda/Reduce.cuh, setReduceConfig (torch 2.11); the bytes
    of all 312 different sums that were recorded on an H200.
    """

    outputs: int
    inputs: int
    along: bool
    vector: int = 1

    def blocks(self, multiprocessors: int, threads: int) -> tuple[int, int]:
        """Bytes of the meeting place and of its semaphores on a card of so many multiprocessors with so many threads each; 0 and 0 without one."""
        most = 512 // self.vector
        across, down = (self.inputs, self.outputs) if self.along else (self.outputs // self.vector, self.inputs)
        if self.along and across > 128:
            across //= 4
        across, down = min(_power(across), most), min(_power(down), most)
        width = min(across, 32)
        height = min(down, most // width)
        width = min(across, most // height)
        step_in, step_out = (width, 1) if self.along else (1, width)
        if -(-self.inputs // step_in) >= min(height * 16, 256):
            step_in *= height
        else:
            return 0, 0
        each = -(-self.inputs // step_in)
        grid, wanted = -(-(self.outputs // self.vector) // step_out), multiprocessors * (threads // (width * height))
        if each < 256 or grid > wanted:
            return 0, 0
        split = max(min(-(-wanted // grid), -(-each // 16)), -(-each // 256))
        if split <= 1:
            return 0, 0
        return 4 * self.outputs * split * (1 if self.along else width * self.vector), 4 * grid


def _power(value: int) -> int:
    return 1 << (max(value, 1).bit_length() - 1)


@dataclass
class Tape:
    """events: the number of a block that is born, or `~number` of one that dies. For each block its size in bytes, its
    kind (one of `KINDS`) and the operator it came from. assumed: what was taken for granted along the way, in words.
    staged: blocks whose size depends on the card, each with its rule and which of its two blocks it is.
    """

    events: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    operators: list[str] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    assumed: tuple[str, ...] = ()
    staged: dict[int, tuple[Staging, int]] = field(default_factory=dict)

    def born(self, nbytes: int, kind: str, operator: str) -> int:
        number = len(self.sizes)
        self.sizes.append(nbytes)
        self.kinds.append(kind)
        self.operators.append(operator)
        self.events.append(number)
        return number

    def died(self, number: int) -> None:
        self.events.append(~number)

    def emptied(self) -> None:
        self.events.append(EMPTY_CACHE)

    def mark(self, phase: str, window: int, piece: int) -> None:
        self.marks.append(Mark(len(self.events), phase, window, piece))

    def phase_at(self, event: int) -> Mark:
        """Where the job was at an event."""
        return next((mark for mark in reversed(self.marks) if mark.event <= event), Mark(0, "setup", 0, 0))

    def on(self, cublas_bytes: int, multiprocessors: int, threads: int) -> Tape:
        """The same on one card: with cuBLAS's workspace of that size, and with the sums of a card of so many multiprocessors.

        What such a card does not take has no bytes.
        """
        sizes = self.sizes.copy()
        at = -1
        for _ in range(self.operators.count("cublas")):
            at = self.operators.index("cublas", at + 1)
            sizes[at] = cublas_bytes
        for number, (rule, which) in self.staged.items():
            sizes[number] = rule.blocks(multiprocessors, threads)[which]
        return Tape(self.events, sizes, self.kinds, self.operators, self.marks, self.assumed)

    def without_nothing(self) -> Tape:
        """The same without blocks that have no bytes."""
        events: list[int] = []
        marks: list[Mark] = []
        pending = iter([*self.marks, None])
        mark = next(pending)
        for at, event in enumerate(self.events):
            while mark is not None and mark.event <= at:
                marks.append(Mark(len(events), mark.phase, mark.window, mark.piece))
                mark = next(pending)
            if event == EMPTY_CACHE or self.sizes[event if event >= 0 else ~event]:
                events.append(event)
        while mark is not None:
            marks.append(Mark(len(events), mark.phase, mark.window, mark.piece))
            mark = next(pending)
        return Tape(events, self.sizes, self.kinds, self.operators, marks, self.assumed, self.staged)

    def requested_peak(self) -> int:
        """The most bytes that were asked for and alive at once, without any allocator."""
        now = most = 0
        for event in self.events:
            if event >= 0:
                now += self.sizes[event]
                most = max(most, now)
            elif event != EMPTY_CACHE:
                now -= self.sizes[~event]
        return most


@dataclass(frozen=True)
class Replayed:
    """What an allocator made of a tape; bytes. `failed_at`: the event that ran out of memory, None where all went well.

    resident_bytes: alive between the last window's micro-batches and at its end, whichever is more.
    activation_bytes: the most allocated in forward and backward of the last window that ran.
    """

    peak_reserved_bytes: int
    peak_allocated_bytes: int
    peak_requested_bytes: int
    retries: int
    failed_at: int | None
    peak_event: int
    base_bytes: int
    activation_bytes: int


def replay(tape: Tape, allocator: Allocator) -> Replayed:
    """Runs a tape through an allocator. Running out of memory ends it, and is told, not raised."""
    import torch

    blocks: dict[int, Block] = {}
    sizes, malloc, free = tape.sizes, allocator.malloc, allocator.free
    boundaries = [mark.event for mark in tape.marks] + [len(tape.events)]
    phases = [mark.phase for mark in tape.marks]
    most, peak_event, failed_at, base, activation = 0, 0, None, 0, 0
    at = 0
    try:
        for number, phase in enumerate(["setup", *phases]):
            start, stop = (0 if number == 0 else boundaries[number - 1]), boundaries[number]
            at = start
            lap = allocator.allocated_bytes
            for event in tape.events[start:stop]:
                if event >= 0:
                    if sizes[event]:
                        blocks[event] = malloc(sizes[event])
                        if allocator.allocated_bytes > lap:
                            lap = allocator.allocated_bytes
                            if lap > most:
                                most, peak_event = lap, at
                elif event == EMPTY_CACHE:
                    allocator.empty_cache()
                elif sizes[~event]:
                    free(blocks.pop(~event))
                at += 1
            if phase in ("forward", "backward"):
                activation = max(activation, lap)
            if phase == "end":
                base = allocator.allocated_bytes
    except torch.OutOfMemoryError:
        failed_at = at
    return Replayed(
        allocator.peak_reserved_bytes,
        allocator.peak_allocated_bytes,
        allocator.peak_requested_bytes,
        allocator.retries,
        failed_at,
        peak_event,
        base,
        activation,
    )


def held_at(tape: Tape, event: int) -> dict[str, int]:
    """Bytes asked for and alive right after an event, by kind."""
    held = dict.fromkeys(KINDS, 0)
    for each in tape.events[: event + 1]:
        if each == EMPTY_CACHE:
            continue
        number = each if each >= 0 else ~each
        held[tape.kinds[number]] += tape.sizes[number] if each >= 0 else -tape.sizes[number]
    return held


def canonical(tape: Tape) -> Tape:
    """The same tape with deaths that follow each other in order of birth: their order may be an accident of hashing."""
    events: list[int] = []
    deaths: list[int] = []
    bounds = {mark.event for mark in tape.marks}
    for at, event in enumerate(tape.events):
        if at in bounds or event >= 0 or event == EMPTY_CACHE:
            events += sorted(deaths, reverse=True)
            deaths = []
        if event >= 0 or event == EMPTY_CACHE:
            events.append(event)
        else:
            deaths.append(event)
    events += sorted(deaths, reverse=True)
    return Tape(events, tape.sizes, tape.kinds, tape.operators, tape.marks, tape.assumed, tape.staged)


class NotAlike(Exception):
    """Two tapes differ in more than their sizes."""


@dataclass(frozen=True)
class Growth:
    """A tape as a function of the micro-batch: what happens stays, and each block's size is a line through two traces."""

    low: Tape
    high: Tape
    low_batch: int
    high_batch: int

    def __post_init__(self) -> None:
        if self.low.events != self.high.events or self.low.staged.keys() != self.high.staged.keys():
            raise NotAlike(_first_difference(self.low, self.high))

    def at(self, micro_batch: int) -> Tape:
        """The tape at another micro-batch."""
        span, beyond = self.high_batch - self.low_batch, micro_batch - self.low_batch
        sizes = self.low.sizes.copy()
        for number, least, more in self._growing:
            sizes[number] = max(least + more * beyond // span, 1)
        staged = {}
        for number, (low, which) in self.low.staged.items():
            high = self.high.staged[number][0]
            outputs = max(low.outputs + (high.outputs - low.outputs) * beyond // span, 1)
            inputs = max(low.inputs + (high.inputs - low.inputs) * beyond // span, 1)
            staged[number] = replace(high, outputs=outputs, inputs=inputs), which
        return Tape(self.low.events, sizes, self.low.kinds, self.low.operators, self.low.marks, self.low.assumed, staged)

    @cached_property
    def _growing(self) -> list[tuple[int, int, int]]:
        """(block, bytes, how many more at the other trace) of those that are not always the same."""
        return [(number, low, high - low) for number, (low, high) in enumerate(zip(self.low.sizes, self.high.sizes)) if high != low]


def _first_difference(low: Tape, high: Tape) -> str:
    for at, (one, other) in enumerate(zip(low.events, high.events)):
        if one != other:
            name = "emptying the cache" if one == EMPTY_CACHE else low.operators[one if one >= 0 else ~one]
            return f"at event {at}, {name}"
    return f"{len(low.events)} and {len(high.events)} events"


def same_tape(one: Tape, other: Tape) -> bool:
    """True where both tapes hold the same events and sizes."""
    return one.events == other.events and one.sizes == other.sizes and one.staged == other.staged


def tape_from_json(told: dict[str, Any]) -> Tape:
    """A tape from `as_json`."""
    names: Sequence[str] = told["names"]
    return Tape(
        told["events"],
        told["sizes"],
        [KINDS[kind] for kind in told["kinds"]],
        [names[number] for number in told["operators"]],
        [Mark(*mark) for mark in told["marks"]],
        tuple(told["assumed"]),
        {number: (Staging(*rule), which) for number, which, rule in told.get("staged", ())},
    )


def tape_as_json(tape: Tape) -> dict[str, Any]:
    """Plain lists and numbers, for a golden file or another process."""
    names = {name: number for number, name in enumerate(dict.fromkeys(tape.operators))}
    return {
        "events": tape.events,
        "sizes": tape.sizes,
        "kinds": [KINDS.index(kind) for kind in tape.kinds],
        "operators": [names[name] for name in tape.operators],
        "names": list(names),
        "marks": [[mark.event, mark.phase, mark.window, mark.piece] for mark in tape.marks],
        "assumed": list(tape.assumed),
        "staged": [[number, which, list(astuple(rule))] for number, (rule, which) in tape.staged.items()],
    }
