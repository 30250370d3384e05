"""The layout of a sum on a card: its results, its inputs, and if several thread blocks may share one result."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from autoaccum.simulate.tape import Staging


def staging(value: torch.Tensor, dims: Sequence[int]) -> Staging | None:
    """The rule for the memory of the sum of `value` over `dims`.

    None if the sum needs no extra memory. Empty dims: over all dimensions.
    """
    over = {dim % max(value.dim(), 1) for dim in dims} or set(range(value.dim()))
    sizes = [(stride, size, dim in over) for dim, (size, stride) in enumerate(zip(value.shape, value.stride())) if size > 1]
    outputs = math.prod(size for _, size, summed in sizes if not summed)
    inputs = math.prod(size for _, size, summed in sizes if summed)
    if inputs <= 1:
        return None
    remaining, summed = ([entry for entry in sizes if entry[2] is is_summed] for is_summed in (False, True))
    nearest = min(remaining, default=None)
    if nearest is None or min(summed)[0] < nearest[0]:
        return Staging(outputs, inputs, True)
    vector = 4 if nearest[0] == 1 else 1
    # A thread reads `vector` values at once only if this size and all other strides are multiples of `vector`.
    for each in (nearest[1], *(stride for stride, _, _ in sizes if (stride != nearest[0]))):
        while each % vector:
            vector //= 2
    return Staging(outputs, inputs, False, vector)
