"""`feed`: moves the micro-batches of a window from the host to the device, one at a time.

The effective batch stays on the host. On CUDA, the next micro-batch is copied while the current one computes. When the window's last
micro-batch has been fed, nothing of the caller's memory is read any more, so it may be written to.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch

from autoaccum import oom
from autoaccum.data import batches

Piece = tuple[Any, int]
_log = logging.getLogger("autoaccum")
_can_pin = True  # False once no pinned host memory was left


def feed(pieces: Iterable[Piece], device: torch.device) -> Iterable[Piece]:
    """The pieces in order. On CUDA they are on `device` already; on other devices the caller moves each with `batches.move`.

    pieces: pairs of (micro-batch, number of its samples).
    On CUDA the next piece is copied on a separate stream, from pinned memory, while the current piece computes. At most two
    pieces are on the device at the same time.
    """
    if device.type != "cuda":
        return pieces
    # Without a CUDA context the job's tensors are fake: only their memory is simulated.
    return _ahead(pieces, device) if torch.cuda.is_initialized() else _moved_ahead(pieces, device)


def _moved_ahead(pieces: Iterable[Piece], device: torch.device) -> Iterator[Piece]:
    """Like `_ahead`, but without streams: the same tensors are allocated and freed in the same order."""
    remaining = iter(pieces)

    def following() -> Piece | None:
        piece = next(remaining, None)
        return None if piece is None else (batches.move(piece[0], device), piece[1])

    piece = following()
    while piece is not None:
        moved, samples = piece
        piece = following()
        yield moved, samples
        del moved


def _ahead(pieces: Iterable[Piece], device: torch.device) -> Iterator[Piece]:
    remaining = iter(pieces)
    stream = _copy_stream(device)
    try:
        yield from _copied_ahead(remaining, device, stream)
    finally:
        # Needed also if the loop ends early: a pending copy may write to memory that the allocator is about to reuse.
        torch.cuda.current_stream(device).wait_stream(stream)


def _copied_ahead(remaining: Iterator[Piece], device: torch.device, stream: torch.cuda.Stream) -> Iterator[Piece]:
    upcoming = _copied(next(remaining, None), device, stream)
    borrowed: torch.cuda.Event | None = None  # the copy of what the caller pinned: it is read until then
    while upcoming is not None:
        moved, samples, arrived, is_borrowed = upcoming
        borrowed = arrived if is_borrowed else borrowed
        # Starts the copy before the current piece's kernels are queued. The copy waits for the kernels that were queued earlier,
        # because it may reuse their memory. Then it runs in parallel with the current piece.
        upcoming = _copied(next(remaining, None), device, stream)
        torch.cuda.current_stream(device).wait_event(arrived)
        yield moved, samples
        del moved  # or this piece would stay allocated until the next one is yielded
    if borrowed is not None:
        borrowed.synchronize()


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in pinned memory; the tensor itself if no pinned memory is left, which has nothing to do with the device's."""
    global _can_pin
    if not _can_pin:
        return tensor
    try:
        return tensor.pin_memory()
    except RuntimeError as error:
        if oom.verdict(error) != "oom":
            raise
        _can_pin = False
        _log.warning("no pinned host memory is left (%s): batches are copied to the device from ordinary memory from now on", str(error).splitlines()[0])
        return tensor


class _Moved(NamedTuple):
    batch: Any
    samples: int
    arrived: torch.cuda.Event
    is_borrowed: bool  # True if the copy reads memory that the caller pinned


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


def _copied(piece: Piece | None, device: torch.device, stream: torch.cuda.Stream) -> _Moved | None:
    if piece is None:
        return None
    batch, samples = piece
    is_borrowed = False
    compute_stream = torch.cuda.current_stream(device)

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal is_borrowed
        if tensor.device == device:
            return tensor
        if type(tensor) is not torch.Tensor or tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.requires_grad:
            return tensor.to(device)
        # Allocated on the compute stream, so that it returns to that stream's pool. Memory from the copy stream's pool
        # could be reused only after the delay of `record_stream`.
        # https://docs.pytorch.org/docs/stable/generated/torch.Tensor.record_stream.html
        target = torch.empty_like(tensor, device=device, pin_memory=False)
        free.record(compute_stream)
        stream.wait_event(free)
        with torch.cuda.stream(stream):
            if tensor.is_pinned():
                is_borrowed = True
                target.copy_(tensor, non_blocking=True)
            else:
                target.copy_(pinned(tensor), non_blocking=True)
        return target

    free = torch.cuda.Event()
    moved = batches.changed(batch, copy)
    arrived = torch.cuda.Event()
    arrived.record(stream)
    return _Moved(moved, samples, arrived, is_borrowed)
