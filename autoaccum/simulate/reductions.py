"""How a card sums a tensor: in one go, or in blocks of threads that meet in memory of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from autoaccum.simulate.tape import Staging


def staging(value: torch.Tensor, dims: Sequence[int]) -> Staging | None:
    """How a card goes about the sum of `value` over `dims` (all of them for none); None for what takes nothing."""
    over = {dim % max(value.dim(), 1) for dim in dims} or set(range(value.dim()))
    sizes = [(stride, size, dim in over) for dim, (size, stride) in enumerate(zip(value.shape, value.stride())) if size > 1]
    outputs = math.prod(size for _, size, summed in sizes if not summed)
    inputs = math.prod(size for _, size, summed in sizes if summed)
    if inputs <= 1:
        return None
    kept, summed = ([each for each in sizes if each[2] is which] for which in (False, True))
    nearest = min(kept, default=None)
    if nearest is None or min(summed)[0] < nearest[0]:
        return Staging(outputs, inputs, True)
    vector = 4 if nearest[0] == 1 else 1
    # What lies at such distances, beginning anywhere, can be read so many at once.
    for each in (nearest[1], *(stride for stride, _, _ in sizes if (stride != nearest[0]))):
        while each % vector:
            vector //= 2
    return Staging(outputs, inputs, False, vector)
