"""The timeline of a tape: held bytes at each event, as data for a picture and as a snapshot for PyTorch's memory viewer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from autoaccum.simulate.allocator import Allocator, Block
from autoaccum.simulate.tape import EMPTY_CACHE, KINDS, Mark, Tape


@dataclass(frozen=True)
class Timeline:
    """The memory of one window, event by event.

    held: for each kind, the requested bytes that are live after each event.
    reserved: the bytes that the allocator has reserved after each event.
    marks: (event, phase, micro-batch) at the start of each phase. Event 0 is the first event of the window.
    """

    held: dict[str, list[int]]
    reserved: list[int]
    marks: list[tuple[int, str, int]]

    def __len__(self) -> int:
        return len(self.reserved)


def timeline(tape: Tape, allocator: Allocator) -> Timeline:
    """The timeline of a tape's last window. Raises `torch.OutOfMemoryError` if the allocator runs out of memory."""
    window = max(mark.window for mark in tape.marks)
    marks = [mark for mark in tape.marks if mark.window == window]
    first = marks[0].event
    live = dict.fromkeys(KINDS, 0)
    held: dict[str, list[int]] = {kind: [] for kind in KINDS}
    reserved: list[int] = []
    blocks: dict[int, Block] = {}
    for index, event in enumerate(tape.events):
        if event >= 0:
            blocks[event] = allocator.malloc(tape.sizes[event])
            live[tape.kinds[event]] += tape.sizes[event]
        elif event == EMPTY_CACHE:
            allocator.empty_cache()
        else:
            allocator.free(blocks.pop(~event))
            live[tape.kinds[~event]] -= tape.sizes[~event]
        if index >= first:
            for kind in KINDS:
                held[kind].append(live[kind])
            reserved.append(allocator.reserved_bytes)
    return Timeline(held, reserved, [(mark.event - first, mark.phase, mark.piece) for mark in marks])


def memory_snapshot(tape: Tape, allocator: Allocator, *, settings: dict[str, Any] | None = None) -> dict[str, Any]:
    """A snapshot of the tape in the format of `torch.cuda.memory._snapshot()`.

    If it is pickled, https://pytorch.org/memory_viz opens it.
    The stack of each block holds the operator that allocated it, its kind and its phase.
    """
    trace: list[dict[str, Any]] = []
    clock = 0

    def entry(action: str, address: int, size: int, frames: Sequence[dict[str, Any]] = ()) -> None:
        trace.append({"action": action, "addr": address, "size": size, "stream": 0, "time_us": clock, "frames": list(frames)})

    names = {"alloc": "segment_alloc", "free": "segment_free", "map": "segment_map", "unmap": "segment_unmap"}
    allocator.observer = lambda action, address, size: entry(names[action], address, size)
    marks = iter([*tape.marks, Mark(len(tape.events) + 1, "end", 0, 0)])
    phase, next_mark = Mark(0, "setup", 0, 0), next(marks)
    blocks: dict[int, Block] = {}
    stacks: dict[int, list[dict[str, Any]]] = {}
    for clock, event in enumerate(tape.events):
        while next_mark.event <= clock:
            phase, next_mark = next_mark, next(marks)
        if event >= 0:
            block = blocks[event] = allocator.malloc(tape.sizes[event])
            where = f"window {phase.window + 1}, micro-batch {phase.piece + 1}, {phase.phase}" if phase.phase != "setup" else "setup"
            stack = [_frame(tape.operators[event]), _frame(tape.kinds[event]), _frame(where)]
            stacks[block.address] = stack
            entry("alloc", block.address, block.requested, stack)
        elif event == EMPTY_CACHE:
            allocator.empty_cache()
        else:
            block = blocks.pop(~event)
            for action in ("free_requested", "free_completed"):
                entry(action, block.address, block.requested, stacks[block.address])
            allocator.free(block)
    allocator.observer = None
    return {"segments": _segments(allocator, stacks), "device_traces": [trace], "allocator_settings": settings or {}}


def _frame(name: str) -> dict[str, Any]:
    return {"name": name, "filename": "simulated", "line": 0}


def _segments(allocator: Allocator, stacks: dict[int, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    segments: list[dict[str, Any]] = []
    for block in allocator.blocks():
        if not block.mapped:
            continue
        if block.preceding is None or not block.preceding.mapped:
            segments.append(
                {
                    "device": 0,
                    "address": block.address,
                    "total_size": 0,
                    "allocated_size": 0,
                    "active_size": 0,
                    "requested_size": 0,
                    "stream": 0,
                    "segment_type": "small" if block.pool.small else "large",
                    "segment_pool_id": (0, 0),
                    "is_expandable": block.base is not None,
                    "frames": [],
                    "blocks": [],
                }
            )
        segment = segments[-1]
        segment["total_size"] += block.size
        if block.live:
            for name, size in (("allocated_size", block.size), ("active_size", block.size), ("requested_size", block.requested)):
                segment[name] += size
        segment["blocks"].append(
            {
                "address": block.address,
                "size": block.size,
                "requested_size": block.requested if block.live else 0,
                "state": "active_allocated" if block.live else "inactive",
                "frames": stacks.get(block.address, []) if block.live else [],
            }
        )
    return segments
