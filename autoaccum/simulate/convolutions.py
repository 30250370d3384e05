"""What cuDNN takes for a convolution beside its result, without benchmark mode.

Kernels for tensor cores want channels last: what lies otherwise is copied, input, output and weights, and partial sums of the
weights' gradient are added up in memory. No formula is public. The rules here were read off 640 shapes on an H200
(cuDNN 9.19, torch 2.11): sizes are exact where a rule applies, which kernel cuDNN chooses is a heuristic of its own that is followed in most cases.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from autoaccum.units import MIB

_SUMS = 8 * MIB  # about what partial sums of the weights' gradient may take


@dataclass(frozen=True)
class Shape:
    """One convolution. images, weights, outputs: elements. spatial: positions of the output; kernel: of a filter."""

    dtype: torch.dtype
    samples: int
    channels: int
    groups: int
    images: int
    weights: int
    outputs: int
    spatial: int
    kernel: int
    strided: bool
    last: bool  # channels last

    @classmethod
    def of(cls, images: Any, weight: Any, outputs: Any, groups: int) -> Shape:
        """From a call's tensors; outputs may be their gradient."""
        positions = math.prod(outputs.shape[2:])
        last = images.dim() == 4 and images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
        return cls(
            outputs.dtype, images.shape[0], images.shape[1], groups, images.numel(), weight.numel(), outputs.numel(), positions,
            math.prod(weight.shape[2:]), math.prod(images.shape[2:]) > 2 * positions, last,
        )  # fmt: skip

    @property
    def dense(self) -> bool:
        """False for depthwise convolutions, which run on kernels of torch's own."""
        return self.groups == 1 or self.groups < self.channels

    @property
    def size(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    @property
    def padded(self) -> float:
        """How much larger the input and the weights get where channels are filled up: to 8 of them in bfloat16, else to 4."""
        step = 8 if self.dtype is torch.bfloat16 else 4
        return 1.0 if self.groups > 1 or self.channels >= step else step / self.channels

    @property
    def moved(self) -> int:
        """Bytes of input and output once more."""
        return (self.images + self.outputs) * self.size

    @property
    def copied(self) -> int:
        """Bytes of everything once more, channels last."""
        return int((self.images + self.weights) * self.padded + self.outputs) * self.size


def generation(capability: int) -> int:
    """Cards of one generation are alike in all of this."""
    return 6 if capability < 70 else min(capability // 10, 9)


def forward(shape: Shape, capability: int) -> int:
    """Bytes that are taken while the output is computed."""
    if not _on_tensor_cores(shape, capability) or not shape.dense:
        return 0
    if shape.channels == 3 and shape.kernel == 9:
        return 0
    if shape.last:
        return int((shape.images + shape.weights) * shape.padded) * shape.size if shape.padded > 1 else 0
    return _pointwise(shape) if shape.kernel == 1 else shape.copied


def of_images(shape: Shape, capability: int) -> int:
    """While the input's gradient is computed."""
    if not _on_tensor_cores(shape, capability) or not shape.dense or shape.last:
        return 0
    return _pointwise(shape) if shape.kernel == 1 else shape.copied


def of_weights(shape: Shape, capability: int) -> int:
    """While the weights' gradient is computed."""
    if not _on_tensor_cores(shape, capability):
        return 0
    weights = 4 * shape.weights  # added up in single precision
    if not shape.dense:
        return _depthwise(shape, weights, capability) if shape.last else 0
    if shape.last:
        return min(4 * weights, _SUMS) + (int((shape.images + shape.weights) * shape.padded) * shape.size if shape.padded > 1 else 0)
    if shape.kernel > 1:
        return 0 if shape.channels == 3 and shape.kernel == 9 and shape.size == 4 else shape.copied + int(_partial(shape, weights) * shape.padded)
    if shape.spatial == 1:
        return 0
    if shape.strided:
        return 0 if shape.size == 4 and shape.channels < 100 else shape.moved + _partial(shape, weights)
    if _by_sample(shape, weights, capability):
        return shape.samples * weights
    return shape.moved + _partial(shape, weights)


def _by_sample(shape: Shape, weights: int, capability: int) -> bool:
    """Whether the weights' gradient of a filter of one position is a product for each sample, added up afterwards."""
    if capability < 90 and shape.size == 4:
        # Published peaks of MnasNet, MobileNetV2 and RegNetX on Ampere and Ada (cuDNN 9.1) leave no other explanation: up to 529 MB they
        # hold these products, from 618 MB on they do not.
        return shape.samples * weights <= 512 * MIB
    filters = shape.weights // shape.channels
    return filters * shape.channels < 190 * (filters + shape.channels)


def _pointwise(shape: Shape) -> int:
    """A filter of one position is a product of matrices where rows begin as products of matrices want it."""
    if shape.strided:
        return shape.moved if shape.size == 2 or shape.channels >= 200 else 0
    return shape.moved if 1 < shape.spatial < 64 and shape.spatial % 4 else 0


def _depthwise(shape: Shape, weights: int, capability: int) -> int:
    """Channels last, where other kernels than torch's own run; in single precision on Hopper and later, and in large planes."""
    if shape.size == 2:
        return 8 * shape.samples * weights
    return 8 * shape.images * shape.size + 14 * MIB if capability >= 90 and shape.spatial > 400 else 0


def _partial(shape: Shape, weights: int) -> int:
    """Partial sums of the weights' gradient, as many as there is room for; in halves fewer where there are few positions to share out."""
    if shape.size == 4:
        return weights * min(14, _SUMS // weights) if weights <= _SUMS // 2 else int(0.917 * weights)
    most = 13 if shape.spatial > 3000 else 4 if shape.spatial > 700 else 0
    return weights * min(most, 2 * _SUMS // weights)


def _on_tensor_cores(shape: Shape, capability: int) -> bool:
    """Whether the kernels are those for tensor cores; what others take has not been measured."""
    if shape.size == 2:
        return capability >= 70
    return shape.dtype is torch.float32 and capability >= 80 and bool(torch.backends.cudnn.allow_tf32)
