"""The table of the kinds of devices, and the devices of this machine.

A device and its module are not touched before they are needed. A machine without an accelerator's driver does not import torch.
"""

from __future__ import annotations

import builtins
import glob
import os
import re
import sys
from collections.abc import Callable
from importlib import import_module

from autoaccum.devices.memory import Facts, Memory
from autoaccum.devices.protocol import Device
from autoaccum.errors import NoSuchDevice


def _cuda_driver() -> bool:
    # NVIDIA on Linux, WSL2 and Jetson; AMD through ROCm, because torch also calls it "cuda".
    paths = ("/dev/nvidiactl", "/dev/nvidia[0-9]*", "/dev/dxg", "/dev/nvhost-gpu", "/dev/nvgpu", "/dev/kfd")
    return os.name == "nt" or any(glob.glob(path) for path in paths)


def _xpu_driver() -> bool:
    return os.name == "nt" or bool(glob.glob("/dev/dri/renderD*"))


# kind -> (module, class, function that checks for the driver), in the order in which "auto" prefers them.
_TABLE: dict[str, tuple[str, str, Callable[[], bool]]] = {
    "cuda": ("autoaccum.devices.cuda", "Cuda", _cuda_driver),
    "xpu": ("autoaccum.devices.xpu", "Xpu", _xpu_driver),
    "mps": ("autoaccum.devices.mps", "Mps", lambda: sys.platform == "darwin"),
    "cpu": ("autoaccum.devices.cpu", "Cpu", lambda: True),
}


def here() -> builtins.list[str]:
    """Labels of the usable devices, best first: `["cuda:0", "cuda:1", "cpu"]`."""
    return [label for kind, (_, _, driver) in _TABLE.items() if driver() for label in _labels(kind)]


def accelerator_driver() -> bool:
    """True if the driver of any accelerator is installed. It does not check for cards, and it is fast."""
    return any(driver() for kind, (_, _, driver) in _TABLE.items() if kind != "cpu")


def get(label: str = "auto") -> Device:
    """The device with this label: `"auto"`, `"cpu"`, `"cuda"`, `"cuda:1"`, `"mps"`, `"xpu"`.

    Raises `NoSuchDevice`; its message lists the devices of this machine.
    """
    label = "mps" if label == "mps:0" else label  # torch writes the device of an MPS tensor so
    match = re.fullmatch(r"(auto|cpu|mps|(?:cuda|xpu)(?::\d+)?)", label)
    if not match:
        raise NoSuchDevice(f"{label!r} is not a device: use auto, cpu, cuda, cuda:INDEX, mps or xpu; devices here: {', '.join(here())}")
    if label == "auto":
        label = here()[0]
    kind, _, index = label.partition(":")
    wanted = label if index or kind in ("cpu", "mps") else f"{kind}:0"
    present = _labels(kind) if _TABLE[kind][2]() else []
    if wanted not in present:
        raise NoSuchDevice(f"there is no {label} here; devices: {', '.join(here())}")
    module, name, _ = _TABLE[kind]
    make = getattr(import_module(module), name)
    device: Device = make() if kind in ("cpu", "mps") else make(int(index or 0))
    return device


def list() -> builtins.list[tuple[Facts, Memory]]:
    """Every device of this machine with a reading of its memory. Raises `MemoryUnknown`."""
    return [(device.facts, device.memory()) for device in map(get, here())]


def _labels(kind: str) -> builtins.list[str]:
    if kind == "cpu":
        return ["cpu"]
    import torch

    if kind == "mps":
        return ["mps"] if torch.backends.mps.is_available() else []
    module = torch.cuda if kind == "cuda" else getattr(torch, "xpu", None)
    return [f"{kind}:{index}" for index in range(module.device_count())] if module is not None and module.is_available() else []
