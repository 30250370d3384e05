"""A tape: the allocations and frees of a job's windows, in order.

`replay` runs a tape through the simulated `Allocator`. Importing this file does not load torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, field, replace
from functools import cached_property
from typing import Any

from autoaccum.simulate.allocator import Allocator, Block

EMPTY_CACHE = -(1 << 62)  # an event without a block: `torch.cuda.empty_cache()`, or cuDNN's benchmark, which does the same
KINDS = ("parameters", "gradients", "optimizer", "activations", "workspace")


@dataclass(frozen=True)
class Mark:
    """The start of a phase: from `event` on the job is in `phase`.

    phase: "setup", "forward", "backward", "clip", "step" or "end". window, piece: the window and its micro-batch, counted from 0.
    """

    event: int
    phase: str
    window: int
    piece: int


@dataclass(frozen=True)
class Staging:
    """A sum over part of a tensor. If several thread blocks share one result, it needs a staging buffer and semaphores in memory.

    outputs: the number of results. inputs: the number of values in each result.
    along: True if the values of a result are contiguous. vector: how many results a thread computes at once.
    The rule is setReduceConfig in aten/src/ATen/native/cuda/Reduce.cuh (torch 2.11). It gives the bytes of all 312 different
    sums that were recorded on an H200.
    """

    outputs: int
    inputs: int
    along: bool
    vector: int = 1

    def blocks(self, multiprocessors: int, threads: int) -> tuple[int, int]:
        """Bytes of the staging buffer and bytes of its semaphores; (0, 0) if the sum needs none.

        multiprocessors: of the card. threads: resident threads for each multiprocessor.
        """
        max_threads = 512 // self.vector
        across, down = (self.inputs, self.outputs) if self.along else (self.outputs // self.vector, self.inputs)
        if self.along and across > 128:
            across //= 4
        across, down = min(_power(across), max_threads), min(_power(down), max_threads)
        width = min(across, 32)
        height = min(down, max_threads // width)
        width = min(across, max_threads // height)
        step_in, step_out = (width, 1) if self.along else (1, width)
        if -(-self.inputs // step_in) >= min(height * 16, 256):
            step_in *= height
        else:
            return 0, 0
        values_per_thread = -(-self.inputs // step_in)
        grid, target_grid = -(-(self.outputs // self.vector) // step_out), multiprocessors * (threads // (width * height))
        if values_per_thread < 256 or grid > target_grid:
            return 0, 0
        split = max(min(-(-target_grid // grid), -(-values_per_thread // 16)), -(-values_per_thread // 256))
        if split <= 1:
            return 0, 0
        return 4 * self.outputs * split * (1 if self.along else width * self.vector), 4 * grid


def _power(value: int) -> int:
    return 1 << (max(value, 1).bit_length() - 1)


@dataclass
class Tape:
    """The memory events of a job's setup and windows.

    events: `number` if that block is allocated, `~number` if it is freed, or `EMPTY_CACHE`.
    sizes, kinds, operators: for each block its bytes, its kind (one of `KINDS`), and the operator that allocated it.
    marks: where the phases start. assumed: the assumptions of the trace, in words.
    staged: the blocks whose size depends on the card. Each has its rule, and 0 for the staging buffer or 1 for the semaphores.
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
        """The phase of the job at an event."""
        return next((mark for mark in reversed(self.marks) if mark.event <= event), Mark(0, "setup", 0, 0))

    def on(self, cublas_bytes: int, multiprocessors: int, threads: int) -> Tape:
        """The same tape on one card. A block that the card does not need gets 0 bytes.

        cublas_bytes: the card's cuBLAS workspace. multiprocessors, threads: as in `Staging.blocks`.
        """
        sizes = self.sizes.copy()
        index = -1
        for _ in range(self.operators.count("cublas")):
            index = self.operators.index("cublas", index + 1)
            sizes[index] = cublas_bytes
        for number, (rule, which) in self.staged.items():
            sizes[number] = rule.blocks(multiprocessors, threads)[which]
        return Tape(self.events, sizes, self.kinds, self.operators, self.marks, self.assumed)

    def without_nothing(self) -> Tape:
        """The same tape without blocks of 0 bytes."""
        events: list[int] = []
        marks: list[Mark] = []
        pending = iter([*self.marks, None])
        mark = next(pending)
        for index, event in enumerate(self.events):
            while mark is not None and mark.event <= index:
                marks.append(Mark(len(events), mark.phase, mark.window, mark.piece))
                mark = next(pending)
            if event == EMPTY_CACHE or self.sizes[event if event >= 0 else ~event]:
                events.append(event)
        while mark is not None:
            marks.append(Mark(len(events), mark.phase, mark.window, mark.piece))
            mark = next(pending)
        return Tape(events, self.sizes, self.kinds, self.operators, marks, self.assumed, self.staged)

    def requested_peak(self) -> int:
        """The most requested bytes that are live at the same time, without an allocator."""
        live_bytes = peak = 0
        for event in self.events:
            if event >= 0:
                live_bytes += self.sizes[event]
                peak = max(peak, live_bytes)
            elif event != EMPTY_CACHE:
                live_bytes -= self.sizes[~event]
        return peak


@dataclass(frozen=True)
class Replayed:
    """The result of a replay. Sizes are in bytes.

    failed_at: the event at which the memory ran out, None if the replay finished.
    peak_event: the event with the most allocated bytes.
    base_bytes: allocated at the end of the last window that finished.
    activation_bytes: the most allocated in forward and backward, over all windows that ran.
    ends_bytes: allocated at the end of each window that finished.
    """

    peak_reserved_bytes: int
    peak_allocated_bytes: int
    peak_requested_bytes: int
    retries: int
    failed_at: int | None
    peak_event: int
    base_bytes: int
    activation_bytes: int
    ends_bytes: tuple[int, ...]


def replay(tape: Tape, allocator: Allocator) -> Replayed:
    """Runs a tape through an allocator. An out-of-memory ends the replay and sets `failed_at`; it is not raised."""
    import torch

    blocks: dict[int, Block] = {}
    sizes, malloc, free = tape.sizes, allocator.malloc, allocator.free
    boundaries = [mark.event for mark in tape.marks] + [len(tape.events)]
    phases = [mark.phase for mark in tape.marks]
    peak, peak_event, failed_at, base, activation = 0, 0, None, 0, 0
    index = 0
    ends: list[int] = []
    try:
        for number, phase in enumerate(["setup", *phases]):
            start, stop = (0 if number == 0 else boundaries[number - 1]), boundaries[number]
            index = start
            phase_peak = allocator.allocated_bytes
            for event in tape.events[start:stop]:
                if event >= 0:
                    if sizes[event]:
                        blocks[event] = malloc(sizes[event])
                        if allocator.allocated_bytes > phase_peak:
                            phase_peak = allocator.allocated_bytes
                            if phase_peak > peak:
                                peak, peak_event = phase_peak, index
                elif event == EMPTY_CACHE:
                    allocator.empty_cache()
                elif sizes[~event]:
                    free(blocks.pop(~event))
                index += 1
            if phase in ("forward", "backward"):
                activation = max(activation, phase_peak)
            if phase == "end":
                base = allocator.allocated_bytes
                ends.append(base)
    except torch.OutOfMemoryError:
        failed_at = index
    return Replayed(
        allocator.peak_reserved_bytes,
        allocator.peak_allocated_bytes,
        allocator.peak_requested_bytes,
        allocator.retries,
        failed_at,
        peak_event,
        base,
        activation,
        tuple(ends),
    )


def held_at(tape: Tape, event: int) -> dict[str, int]:
    """Requested bytes that are live right after an event, by kind."""
    live_bytes = dict.fromkeys(KINDS, 0)
    for entry in tape.events[: event + 1]:
        if entry == EMPTY_CACHE:
            continue
        number = entry if entry >= 0 else ~entry
        live_bytes[tape.kinds[number]] += tape.sizes[number] if entry >= 0 else -tape.sizes[number]
    return live_bytes


def canonical(tape: Tape) -> Tape:
    """The same tape with consecutive frees sorted by allocation, because their recorded order may depend on hashing."""
    events: list[int] = []
    frees: list[int] = []
    phase_starts = {mark.event for mark in tape.marks}
    for index, event in enumerate(tape.events):
        if index in phase_starts or event >= 0 or event == EMPTY_CACHE:
            events += sorted(frees, reverse=True)
            frees = []
        if event >= 0 or event == EMPTY_CACHE:
            events.append(event)
        else:
            frees.append(event)
    events += sorted(frees, reverse=True)
    return Tape(events, tape.sizes, tape.kinds, tape.operators, tape.marks, tape.assumed, tape.staged)


class NotAlike(Exception):
    """Two tapes differ in more than their sizes."""


@dataclass(frozen=True)
class Growth:
    """A tape as a function of the micro-batch, from two traces.

    The events stay the same. The size of each block is a straight line through the two traces.
    Raises `NotAlike` if the events of the traces differ.
    """

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
        """(block, bytes in `low`, how many more in `high`) for the blocks whose size changes."""
        return [(number, low, high - low) for number, (low, high) in enumerate(zip(self.low.sizes, self.high.sizes)) if high != low]


def _first_difference(low: Tape, high: Tape) -> str:
    for index, (low_event, high_event) in enumerate(zip(low.events, high.events)):
        if low_event != high_event:
            name = "emptying the cache" if low_event == EMPTY_CACHE else low.operators[low_event if low_event >= 0 else ~low_event]
            return f"at event {index}, {name}"
    return f"{len(low.events)} and {len(high.events)} events"


def same_tape(one: Tape, other: Tape) -> bool:
    """True if both tapes have the same events and sizes."""
    return one.events == other.events and one.sizes == other.sizes and one.staged == other.staged


def tape_from_json(told: dict[str, Any]) -> Tape:
    """The tape that `tape_as_json` wrote."""
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
    """The tape as plain lists, numbers and strings, for a golden file or another process."""
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
