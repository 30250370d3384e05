"""The workspace of a convolution in cuDNN, without benchmark mode.

Kernels for tensor cores need channels-last tensors. cuDNN copies an input, an output and weights that are not channels last,
and adds up partial sums of the weights' gradient in memory. No formula is public. The rules here are fitted to 640 shapes on an H200
(cuDNN 9.19, torch 2.11). If a rule applies, the size is exact. cuDNN selects the kernel by its own heuristic; the rules follow it in
most cases.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from autoaccum.units import MIB

_SUMS = 8 * MIB  # about the largest size of the partial sums of the weights' gradient


@dataclass(frozen=True)
class Shape:
    """The shape of one convolution.

    images, weights, outputs: the number of elements of the input, the weights and the output.
    spatial: the number of positions in the output. kernel: the number of positions in a filter.
    strided: True if the input has more than twice as many positions as the output.
    """

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
        """The shape of a call, from its tensors. outputs: the output or its gradient."""
        positions = math.prod(outputs.shape[2:])
        last = images.dim() == 4 and images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
        return cls(
            outputs.dtype, images.shape[0], images.shape[1], groups, images.numel(), weight.numel(), outputs.numel(), positions,
            math.prod(weight.shape[2:]), math.prod(images.shape[2:]) > 2 * positions, last,
        )  # fmt: skip

    @property
    def dense(self) -> bool:
        """False for depthwise convolutions, which run on torch's own kernels."""
        return self.groups == 1 or self.groups < self.channels

    @property
    def size(self) -> int:
        """The bytes of one element."""
        return self.dtype.itemsize

    @property
    def padded(self) -> float:
        """The factor by which the input and the weights grow if cuDNN pads the channels: to 8 channels in bfloat16, otherwise to 4."""
        step = 8 if self.dtype is torch.bfloat16 else 4
        return 1.0 if self.groups > 1 or self.channels >= step else step / self.channels

    @property
    def moved(self) -> int:
        """The bytes of a copy of the input and the output."""
        return (self.images + self.outputs) * self.size

    @property
    def copied(self) -> int:
        """The bytes of a channels-last copy of the input, the weights and the output."""
        return int((self.images + self.weights) * self.padded + self.outputs) * self.size


def generation(capability: int) -> int:
    """The generation of a card. All rules here are equal for the cards of one generation. capability: 75 for sm_75."""
    return 6 if capability < 70 else min(capability // 10, 9)


def forward(shape: Shape, capability: int) -> int:
    """The bytes of the workspace while the output is computed."""
    if not _on_tensor_cores(shape, capability) or not shape.dense:
        return 0
    if shape.channels == 3 and shape.kernel == 9:
        return 0
    if shape.last:
        return int((shape.images + shape.weights) * shape.padded) * shape.size if shape.padded > 1 else 0
    return _pointwise(shape) if shape.kernel == 1 else shape.copied


def of_images(shape: Shape, capability: int) -> int:
    """The bytes of the workspace while the input's gradient is computed."""
    if not _on_tensor_cores(shape, capability) or not shape.dense or shape.last:
        return 0
    return _pointwise(shape) if shape.kernel == 1 else shape.copied


def of_weights(shape: Shape, capability: int) -> int:
    """The bytes of the workspace while the weights' gradient is computed."""
    if not _on_tensor_cores(shape, capability):
        return 0
    weights = 4 * shape.weights  # the sums are float32
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
    """True if the weights' gradient of a 1x1 filter is one product for each sample, and cuDNN adds up the products afterwards."""
    if capability < 90 and shape.size == 4:
        # This limit explains the published peaks of MnasNet, MobileNetV2 and RegNetX on Ampere and Ada (cuDNN 9.1): they contain these
        # products up to 529 MB, and do not contain them from 618 MB on.
        return shape.samples * weights <= 512 * MIB
    filters = shape.weights // shape.channels
    return filters * shape.channels < 190 * (filters + shape.channels)


def _pointwise(shape: Shape) -> int:
    """The bytes of the copies for a 1x1 filter. It is a matrix product, and needs no copies if its rows are aligned."""
    if shape.strided:
        return shape.moved if shape.size == 2 or shape.channels >= 200 else 0
    return shape.moved if 1 < shape.spatial < 64 and shape.spatial % 4 else 0


def _depthwise(shape: Shape, weights: int, capability: int) -> int:
    """The bytes for a depthwise convolution in channels last, which does not run on torch's own kernels.

    In float32 only Hopper and later cards take memory, and only for a large output plane.
    """
    if shape.size == 2:
        return 8 * shape.samples * weights
    return 8 * shape.images * shape.size + 14 * MIB if capability >= 90 and shape.spatial > 400 else 0


def _partial(shape: Shape, weights: int) -> int:
    """The bytes of the partial sums of the weights' gradient: as many sums as fit.

    Half types have fewer sums if there are few positions.
    """
    if shape.size == 4:
        return weights * min(14, _SUMS // weights) if weights <= _SUMS // 2 else int(0.917 * weights)
    most = 13 if shape.spatial > 3000 else 4 if shape.spatial > 700 else 0
    return weights * min(most, 2 * _SUMS // weights)


def _on_tensor_cores(shape: Shape, capability: int) -> bool:
    """True if the convolution runs on tensor cores. The workspace of other kernels has not been measured."""
    if shape.size == 2:
        return capability >= 70
    return shape.dtype is torch.float32 and capability >= 80 and bool(torch.backends.cudnn.allow_tf32)
