"""`RngState`: the states of the random number generators that training draws from, saved before every window.

`random.getstate` and `numpy.random.get_state` build their results number by number. They take 9 and 31 microseconds warm, and
several times that between kernels: more than everything else that a window saves. Most training never draws from these two
generators. Their memory is therefore compared first, read-only, and their state is fetched only if the memory changed.
"""

from __future__ import annotations

import ctypes
import random
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

# Only in CPython is the id of an object the address of its memory.
_READABLE = sys.implementation.name == "cpython"
_HEADER = object.__basicsize__  # reference count and type


class RngState:
    """The states of the generators of Python, NumPy (if it is imported), torch and the device, and of further generators."""

    def __init__(self, device: torch.device, further: Sequence[torch.Generator] = ()) -> None:
        self._device, self._further = device, further
        self._python_memory: tuple[object, ...] | None = None
        self._numpy_memory: tuple[object, ...] | None = None
        self._numpy: Any = None

    def note(self) -> None:
        memory = _python_memory()
        if memory is None or memory != self._python_memory:
            self._python, self._python_memory = random.getstate(), memory
        if "numpy" in sys.modules:
            memory = _numpy_memory()
            if memory is None or memory != self._numpy_memory:
                self._numpy, self._numpy_memory = sys.modules["numpy"].random.get_state(), memory
        self._torch = torch.get_rng_state()
        self._of_device = _device_state(self._device)
        self._of_further = [generator.get_state() for generator in self._further]

    def put_back(self) -> None:
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        if self._of_device is not None:
            setter, state = self._of_device
            setter(state)
        for generator, state in zip(self._further, self._of_further):
            generator.set_state(state)


def _python_memory() -> tuple[object, ...] | None:
    """Memory that changes with every draw: the generator's position, its first words, and the second value of a Gaussian pair.

    The position repeats after 624 words, but with another state, and 15 words are enough to see that. In CPython's
    Modules/_randommodule.c, RandomObject is a position and 624 words.
    """
    generator: Any = random._inst if _READABLE else None  # type: ignore[attr-defined]
    if generator is None:
        return None
    return ctypes.string_at(id(generator) + _HEADER, 64), generator.gauss_next


def _numpy_memory() -> tuple[object, ...] | None:
    """The same for NumPy's legacy global generator. The second Gaussian is in the memory of the object itself.

    In numpy/random/src/mt19937/mt19937.h, mt19937_state is 624 words and a position.
    """
    generator = getattr(sys.modules["numpy"].random.mtrand, "_rand", None)
    bits = getattr(generator, "_bit_generator", None)
    if bits is None or not _READABLE or type(bits).__name__ != "MT19937":
        return None
    address = bits.ctypes.state_address
    object_memory = ctypes.string_at(id(generator) + _HEADER, type(generator).__basicsize__ - _HEADER)
    return bits, ctypes.string_at(address, 64), ctypes.string_at(address + 624 * 4, 4), object_memory


def _device_state(device: torch.device) -> tuple[Callable[[torch.Tensor], None], torch.Tensor] | None:
    if device.type == "cuda":
        return lambda state: torch.cuda.set_rng_state(state, device), torch.cuda.get_rng_state(device)
    if device.type == "mps":
        return torch.mps.set_rng_state, torch.mps.get_rng_state()
    if device.type == "xpu":
        return lambda state: torch.xpu.set_rng_state(state, device), torch.xpu.get_rng_state(device)
    return None
