"""States of the random number generators that training draws from, noted before every window.

`random.getstate` and `numpy.random.get_state` build their answers number by number: 9 and 31 microseconds warm,
several times that between kernels, more than all else that a window notes. Most training never draws from them,
so their memory is compared first, read only, and they are asked for their state where it changed.
"""

from __future__ import annotations

import ctypes
import random
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

# Where an object's memory begins is its id in CPython alone.
_READABLE = sys.implementation.name == "cpython"
_HEADER = object.__basicsize__  # reference count and type


class RngState:
    """Python's, NumPy's (if it is in use), torch's, the device's, and further ones that were given."""

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
        self._of_further = [each.get_state() for each in self._further]

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
    """What changes with every draw: the generator's position and first words, and the second of a pair of Gaussians.

    A position comes again after 624 words, with another state: 15 words of it tell. RandomObject in CPython's
    Modules/_randommodule.c is a position and 624 words.
    """
    one: Any = random._inst if _READABLE else None  # type: ignore[attr-defined]
    if one is None:
        return None
    return ctypes.string_at(id(one) + _HEADER, 64), one.gauss_next


def _numpy_memory() -> tuple[object, ...] | None:
    """As above, of the legacy global generator; the second Gaussian is in the object itself.

    mt19937_state in numpy/random/src/mt19937/mt19937.h is 624 words and a position.
    """
    one = getattr(sys.modules["numpy"].random.mtrand, "_rand", None)
    bits = getattr(one, "_bit_generator", None)
    if bits is None or not _READABLE or type(bits).__name__ != "MT19937":
        return None
    address = bits.ctypes.state_address
    own = ctypes.string_at(id(one) + _HEADER, type(one).__basicsize__ - _HEADER)
    return bits, ctypes.string_at(address, 64), ctypes.string_at(address + 624 * 4, 4), own


def _device_state(device: torch.device) -> tuple[Callable[[torch.Tensor], None], torch.Tensor] | None:
    if device.type == "cuda":
        return lambda state: torch.cuda.set_rng_state(state, device), torch.cuda.get_rng_state(device)
    if device.type == "mps":
        return torch.mps.set_rng_state, torch.mps.get_rng_state()
    if device.type == "xpu":
        return lambda state: torch.xpu.set_rng_state(state, device), torch.xpu.get_rng_state(device)
    return None
