"""What a card's allocator did, and which operator asked for what, written down while a job runs there."""

from __future__ import annotations

import base64
import json
import lzma
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# How torch names an event, by its number in a recording. A free counts when it is complete.
ACTIONS = {"alloc": 0, "free_completed": 1, "segment_alloc": 2, "segment_free": 3, "segment_map": 4, "segment_unmap": 5, "oom": 6}
NAMES = ("alloc", "free", "segment_alloc", "segment_free", "segment_map", "segment_unmap", "oom")
Events = list[tuple[str, int, int]]


def start() -> None:
    """Before the first tensor. Costs host memory alone."""
    torch.cuda.memory._record_memory_history(context=None, max_entries=2_000_000, clear_history=True)


def stop() -> Events:
    """(action, address, bytes) of the first device, in order; of a request its bytes as asked for."""
    found = events_of(torch.cuda.memory._snapshot())
    torch.cuda.memory._record_memory_history(enabled=None)
    return found


def events_of(snapshot: dict[str, Any]) -> Events:
    """The same of any snapshot of torch's."""
    trace = snapshot["device_traces"][0]
    return [(NAMES[ACTIONS[each["action"]]], each.get("addr", 0), each["size"]) for each in trace if each["action"] in ACTIONS]


def packed(events: Events) -> str:
    """A recording as text, some bytes an event."""
    base = min((address for action, address, _ in events if action != "oom"), default=0)
    columns = (
        [NAMES.index(action) for action, _, _ in events],
        [0 if action == "oom" else (address - base) // 512 for action, address, _ in events],
        [size for _, _, size in events],
    )
    return text_of(columns)


def unpacked(text: str) -> Events:
    """`packed` undone; addresses count from the lowest."""
    return [(NAMES[action], address * 512, size) for action, address, size in zip(*content_of(text))]


def text_of(content: Any) -> str:
    """Anything that JSON can say, compressed, as text."""
    return base64.b85encode(lzma.compress(json.dumps(content, separators=(",", ":")).encode(), preset=4)).decode()


def content_of(text: str) -> Any:
    """`text_of` undone."""
    return json.loads(lzma.decompress(base64.b85decode(text)))


class Calls(TorchDispatchMode):
    """Inside, every operator that asks the allocator for something is written down with its shapes. Start the recorder first."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._first = _asked()
        self._seen: list[tuple[str, str, int, int, list[int]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = _asked()
        out = func(*args, **(kwargs or {}))
        after = _asked()
        if after > before:
            self._seen.append((func._overloadpacket.__name__, _signature(args), before - self._first, after - self._first, list(_addresses(out))))
        return out

    def told(self, events: Events) -> dict[str, Any]:
        """names, signatures: texts. calls: for each (name, signature, blocks), the first two by number; for each block its bytes as asked
        for, whether it is a result ("o"), was given back before the next request of anyone's ("t"), or neither ("h", for held), and
        how many requests came while it lived, of those in the same call."""
        requests = [(address, size) for action, address, size in events if action == "alloc"]
        ends = _ends(events)
        names: dict[str, int] = {}
        signatures: dict[str, int] = {}
        calls = []
        for name, signature, first, last, results in self._seen:
            blocks = []
            for number in range(first, min(last, len(requests))):
                address, size = requests[number]
                kind = "o" if address in results else "t" if ends.get(number, 1 << 60) <= last else "h"
                blocks.append([size, kind, min(ends.get(number, last), last) - number - 1])
            calls.append([names.setdefault(name, len(names)), signatures.setdefault(signature, len(signatures)), blocks])
        return {"names": list(names), "signatures": list(signatures), "calls": calls}


def _asked() -> int:
    return int(torch._C._cuda_memoryStats(0)["allocation"]["all"]["allocated"])


def _ends(events: Events) -> dict[int, int]:
    """For every request that was given back: how many requests had been made by then."""
    alive: dict[int, int] = {}
    found: dict[int, int] = {}
    asked = 0
    for action, address, _ in events:
        if action == "alloc":
            alive[address] = asked
            asked += 1
        elif action == "free" and address in alive:
            found[alive.pop(address)] = asked
    return found


def _addresses(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        if value.device.type == "cuda" and value.layout == torch.strided:
            yield value.untyped_storage().data_ptr()
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _addresses(each)


def _signature(value: Any) -> str:
    """`f32[8, 3, 224, 224]`, with `c` behind for channels last and `s` for other strides."""
    if isinstance(value, torch.Tensor):
        kind = str(value.dtype).removeprefix("torch.").replace("float", "f").replace("int", "i")
        order = "" if value.is_contiguous() else "c" if value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last) else "s"
        where = "" if value.device.type == "cuda" else "@" + value.device.type
        return f"{kind}[{','.join(map(str, value.shape))}]{order}{where}"
    if isinstance(value, (tuple, list)):
        inside = [_signature(each) for each in value[:8]]
        return "(" + ";".join(inside) + (f";+{len(value) - 8}" if len(value) > 8 else "") + ")"
    return "-" if value is None else str(value)
