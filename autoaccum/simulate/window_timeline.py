"""Who holds what, when: a tape as a picture's data, and as a snapshot that PyTorch's memory viewer opens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from autoaccum.simulate.allocator import Allocator, Block
from autoaccum.simulate.tape import EMPTY_CACHE, KINDS, Mark, Tape


@dataclass(frozen=True)
class Timeline:
    """One window, step by step: for each event the bytes held by kind, and what the allocator had reserved.

    marks: (event, phase, micro-batch) where a phase begins, counted from the window's first event.
    """

    held: dict[str, list[int]]
    reserved: list[int]
    marks: list[tuple[int, str, int]]

    def __len__(self) -> int:
        return len(self.reserved)


def timeline(tape: Tape, allocator: Allocator) -> Timeline:
    """The last window of a tape. Raises `torch.OutOfMemoryError` where the allocator runs out."""
    window = max(mark.window for mark in tape.marks)
    marks = [mark for mark in tape.marks if mark.window == window]
    first = marks[0].event
    now = dict.fromkeys(KINDS, 0)
    held: dict[str, list[int]] = {kind: [] for kind in KINDS}
    reserved: list[int] = []
    blocks: dict[int, Block] = {}
    for at, event in enumerate(tape.events):
        if event >= 0:
            blocks[event] = allocator.malloc(tape.sizes[event])
            now[tape.kinds[event]] += tape.sizes[event]
        elif event == EMPTY_CACHE:
            allocator.empty_cache()
        else:
            allocator.free(blocks.pop(~event))
            now[tape.kinds[~event]] -= tape.sizes[~event]
        if at >= first:
            for kind in KINDS:
                held[kind].append(now[kind])
            reserved.append(allocator.reserved_bytes)
    return Timeline(held, reserved, [(mark.event - first, mark.phase, mark.piece) for mark in marks])


def memory_snapshot(tape: Tape, allocator: Allocator, *, settings: dict[str, Any] | None = None) -> dict[str, Any]:
    """What `torch.cuda.memory._snapshot()` would return after the tape: pickled, https://pytorch.org/memory_viz opens it.

    Each block's stack is its phase, its kind and the operator that made it.
    """
    trace: list[dict[str, Any]] = []
    clock = 0

    def entry(action: str, address: int, size: int, frames: Sequence[dict[str, Any]] = ()) -> None:
        trace.append({"action": action, "addr": address, "size": size, "stream": 0, "time_us": clock, "frames": list(frames)})

    names = {"alloc": "segment_alloc", "free": "segment_free", "map": "segment_map", "unmap": "segment_unmap"}
    allocator.observer = lambda action, address, size: entry(names[action], address, size)
    marks = iter([*tape.marks, Mark(len(tape.events) + 1, "end", 0, 0)])
    phase, following = Mark(0, "setup", 0, 0), next(marks)
    blocks: dict[int, Block] = {}
    stacks: dict[int, list[dict[str, Any]]] = {}
    for clock, event in enumerate(tape.events):
        while following.event <= clock:
            phase, following = following, next(marks)
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
    found: list[dict[str, Any]] = []
    for block in allocator.blocks():
        if not block.mapped:
            continue
        if block.preceding is None or not block.preceding.mapped:
            found.append(
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
        segment = found[-1]
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
    return found
