"""Packed sequences on simulated tensors: torch reads their lengths from memory, and here all have the full length, an upper bound."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_PACKED_LAYERS = ("lstm", "gru", "rnn_tanh", "rnn_relu")


@contextmanager
def of_full_length(kind: str, assume: Callable[[str], None]) -> Iterator[None]:
    """Inside, sequences that are packed on a device of type `kind` are packed whole. assume: records an assumption."""
    functions: Any = torch._VF
    originals = {name: getattr(functions, name) for name in ("_pack_padded_sequence", "_pad_packed_sequence", *_PACKED_LAYERS)}

    def pack(values: Any, lengths: Any, batch_first: bool) -> Any:
        if values.device.type != kind:
            return originals["_pack_padded_sequence"](values, lengths, batch_first)
        assume("packed sequences were taken to have the full length, at {where}: an upper bound")
        by_time = values.transpose(0, 1) if batch_first else values
        steps, batch = by_time.shape[:2]
        return by_time.reshape(steps * batch, *by_time.shape[2:]), _sizes(steps, batch)

    def pad(values: Any, batch_sizes: Any, batch_first: bool, padding: float, total: int) -> Any:
        if values.device.type != kind:
            return originals["_pad_packed_sequence"](values, batch_sizes, batch_first, padding, total)
        steps = batch_sizes.shape[0]
        by_time = values.view(steps, values.shape[0] // steps, *values.shape[1:])
        filled = by_time.new_full((max(total, steps) - steps, *by_time.shape[1:]), padding)
        padded = torch.cat([by_time, filled])
        return padded.transpose(0, 1) if batch_first else padded, _sizes(by_time.shape[1], steps)

    def layer(name: str) -> Callable[..., Any]:
        def run(values: Any, *args: Any) -> Any:
            sizes = args[0]
            if not isinstance(sizes, torch.Tensor) or sizes.is_floating_point() or values.device.type != kind:
                return originals[name](values, *args)
            steps = sizes.shape[0]
            out, *states = originals[name](values.view(steps, values.shape[0] // steps, *values.shape[1:]), *args[1:], False)
            return out.reshape(values.shape[0], -1), *states

        return run

    functions._pack_padded_sequence, functions._pad_packed_sequence = pack, pad
    for name in _PACKED_LAYERS:
        setattr(functions, name, layer(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(functions, name, original)


def _sizes(count: int, value: int) -> torch.Tensor:
    """`count` integers on the host, each of this value."""
    sizes = torch.empty(count, dtype=torch.int64)
    sizes._autoaccum_truth = value  # type: ignore[attr-defined]
    return sizes
