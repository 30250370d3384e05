"""Recorded answers in the place of NVML's shared object, so that the real pynvml runs on them.

pynvml fetches C functions by name from `pynvml.nvmlLib`; each fills the structures it is given and returns
an error code. Only what autoaccum may call is here, and the look-up by index, which it must not use.
https://docs.nvidia.com/deploy/nvml-api/
"""

from __future__ import annotations

import ctypes
import json
import os
from pathlib import Path
from typing import Any

import pynvml
import pytest

from autoaccum.devices import nvml

RECORDINGS = Path(__file__).parent.parent / "recordings" / "nvml"


def answer_with(monkeypatch: pytest.MonkeyPatch, situation: str) -> NvmlStandIn:
    """Puts the recording of that name where pynvml keeps its loaded library."""
    recording = json.loads((RECORDINGS / f"{situation}.json").read_text())
    stand_in = NvmlStandIn(recording)
    absent = recording.get("library") == "absent"
    monkeypatch.setattr(pynvml, "nvmlLib", None if absent else stand_in)
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    monkeypatch.setattr(pynvml, "_nvmlLib_refcount", 0)
    monkeypatch.setattr(nvml, "_begun_by", 0)
    if absent:
        monkeypatch.setattr(pynvml, "CDLL", _no_such_file)
    return stand_in


def _no_such_file(name: str) -> None:
    raise OSError(f"{name}: cannot open shared object file: No such file or directory")


class NvmlStandIn:
    """The functions of one recording. `users`: how many have initialized it and not shut it down.

    A handle is the place of a device in `_all` plus one. Cards come first, in PCI order, as NVML counts
    them; slices follow, which no index reaches.
    """

    def __init__(self, recording: dict[str, Any]) -> None:
        self.users = 0
        self._recording = recording
        self._cards: list[dict[str, Any]] = recording["devices"]
        self._all = [*self._cards, *recording.get("mig_slices", [])]
        self._functions = {
            "nvmlInitWithFlags": self._init,
            "nvmlShutdown": self._shutdown,
            "nvmlDeviceGetCount_v2": self._count,
            "nvmlDeviceGetHandleByIndex_v2": self._by_index,
            "nvmlDeviceGetHandleByUUID": self._by_uuid,
            "nvmlDeviceGetHandleByPciBusId_v2": self._by_pci,
            "nvmlDeviceGetMemoryInfo": self._memory,
            "nvmlDeviceGetComputeRunningProcesses_v3": self._processes,
            "nvmlDeviceGetName": lambda handle, text, size: self._text(handle, text, "name"),
            "nvmlDeviceGetUUID": lambda handle, text, size: self._text(handle, text, "uuid"),
        }
        for name in recording.get("missing", []):
            del self._functions[name]

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["_functions"][name]
        except KeyError:
            raise AttributeError(f"undefined symbol: {name}") from None

    def _init(self, flags: int) -> int:
        code = _code(self._recording.get("nvmlInit", "NVML_SUCCESS"))
        self.users += code == pynvml.NVML_SUCCESS
        return code

    def _shutdown(self) -> int:
        if not self.users:
            return pynvml.NVML_ERROR_UNINITIALIZED
        self.users -= 1
        return pynvml.NVML_SUCCESS

    def _count(self, count: Any) -> int:
        count._obj.value = len(self._cards)
        return pynvml.NVML_SUCCESS

    def _by_index(self, index: Any, handle: Any) -> int:
        return self._found(handle, self._cards[index.value : index.value + 1])

    def _by_uuid(self, uuid: Any, handle: Any) -> int:
        return self._found(handle, [device for device in self._all if device["uuid"] == uuid.value.decode()])

    def _by_pci(self, pci: Any, handle: Any) -> int:
        return self._found(handle, [card for card in self._cards if card["pci"] == pci.value.decode().upper()])

    def _found(self, handle: Any, devices: list[dict[str, Any]]) -> int:
        if not self.users:
            return pynvml.NVML_ERROR_UNINITIALIZED
        if not devices:
            return pynvml.NVML_ERROR_NOT_FOUND
        ctypes.cast(handle, ctypes.POINTER(ctypes.c_void_p))[0] = self._all.index(devices[0]) + 1
        return pynvml.NVML_SUCCESS

    def _device(self, handle: Any) -> dict[str, Any]:
        return self._all[ctypes.cast(handle, ctypes.c_void_p).value - 1]

    def _memory(self, handle: Any, memory: Any) -> int:
        answer = self._device(handle)["memory"]
        if isinstance(answer, str):
            return _code(answer)
        for field, bytes_ in answer.items():
            setattr(memory._obj, field, bytes_)
        return pynvml.NVML_SUCCESS

    def _processes(self, handle: Any, count: Any, entries: Any) -> int:
        answer = self._device(handle)["processes"]
        if isinstance(answer, str):
            return _code(answer)
        room, count._obj.value = count._obj.value, len(answer)
        if len(answer) > room:
            return pynvml.NVML_ERROR_INSUFFICIENT_SIZE
        for entry, process in zip(entries or (), answer):
            entry.pid = os.getpid() if process["pid"] == "self" else process["pid"]
            bytes_ = process["usedGpuMemory"]
            entry.usedGpuMemory = pynvml.NVML_VALUE_NOT_AVAILABLE_ulonglong.value if bytes_ is None else bytes_
        return pynvml.NVML_SUCCESS

    def _text(self, handle: Any, text: Any, field: str) -> int:
        text.value = self._device(handle)[field].encode()
        return pynvml.NVML_SUCCESS


def _code(name: str) -> int:
    return int(getattr(pynvml, name))
