"""The effective batch stays on the host; micro-batches are moved one at a time, the next while the current one computes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from autoaccum.data import batches

Piece = tuple[Any, int]


def feed(pieces: Iterable[Piece], device: torch.device) -> Iterable[Piece]:
    """The pieces, those for CUDA on their device already; others are moved by `batches.move` when their turn comes.

    On CUDA the next piece is copied on a stream of its own, from pinned memory, while the current one
    computes: two pieces of the input are on the device at once, never more.
    """
    if device.type != "cuda":
        return pieces
    # Without a context the tensors of the job are not there either: only their memory is simulated.
    return _ahead(pieces, device) if torch.cuda.is_initialized() else _one_early(pieces, device)


def _one_early(pieces: Iterable[Piece], device: torch.device) -> Iterator[Piece]:
    """As `_ahead` without its streams: the same tensors are born and die in the same order."""
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
        yield from _each(remaining, device, stream)
    finally:
        # Also where the loop ends early: a copy on its way may write to memory that is about to be given away.
        torch.cuda.current_stream(device).wait_stream(stream)


def _each(remaining: Iterator[Piece], device: torch.device, stream: torch.cuda.Stream) -> Iterator[Piece]:
    following = _copied(next(remaining, None), device, stream)
    while following is not None:
        moved, samples, arrived = following
        # Before the current piece's kernels are queued: the copy waits for what was queued earlier, whose
        # memory it may have been given, and then runs beside them.
        following = _copied(next(remaining, None), device, stream)
        torch.cuda.current_stream(device).wait_event(arrived)
        yield moved, samples
        del moved  # not kept until the next piece is taken


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


def _copied(piece: Piece | None, device: torch.device, stream: torch.cuda.Stream) -> tuple[Any, int, torch.cuda.Event] | None:
    if piece is None:
        return None
    host, samples = piece
    computing = torch.cuda.current_stream(device)

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device == device:
            return tensor
        if type(tensor) is not torch.Tensor or tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.requires_grad:
            return tensor.to(device)
        # Made on the computing stream, whose pool it goes back to: memory of the copy stream's own pool could
        # be used again only after `record_stream`'s delay.
        # https://docs.pytorch.org/docs/stable/generated/torch.Tensor.record_stream.html
        target = torch.empty_like(tensor, device=device, pin_memory=False)
        free.record(computing)
        stream.wait_event(free)
        with torch.cuda.stream(stream):
            target.copy_(tensor if tensor.is_pinned() else tensor.pin_memory(), non_blocking=True)
        return target

    free = torch.cuda.Event()
    moved = batches.changed(host, copy)
    arrived = torch.cuda.Event()
    arrived.record(stream)
    return moved, samples, arrived
