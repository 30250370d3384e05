"""What a job is told when it asks about its card: the simulated card's name, memory, capability and multiprocessors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from autoaccum.simulate import Card

_NOTHING = (
    "set_rng_state",
    "manual_seed",
    "manual_seed_all",
    "seed",
    "empty_cache",
    "reset_peak_memory_stats",
    "reset_accumulated_memory_stats",
    "ipc_collect",
)
_NO_BYTES = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")


@contextmanager
def told(card: Card, kind: str, asked: Callable[[], None]) -> Iterator[None]:
    """Inside, `torch.cuda` answers questions about this card. kind: the type of the simulated device. asked: called at each question."""
    if kind != "cuda":
        yield
        return
    facts = card.facts
    properties = SimpleNamespace(
        name=facts.name,
        major=card.capability // 10,
        minor=card.capability % 10,
        total_memory=facts.total_bytes,
        multi_processor_count=facts.multiprocessors,
        max_threads_per_multi_processor=facts.threads,
        max_threads_per_block=1024,
        warp_size=32,
        shared_memory_per_block=48 * 1024,
        shared_memory_per_multiprocessor=100 * 1024,
        shared_memory_per_block_optin=99 * 1024,
        regs_per_multiprocessor=65536,
        L2_cache_size=40 * 2**20,
        is_integrated=0,
        is_multi_gpu_board=0,
        uuid="",
        gcnArchName="",
    )

    def answering(value: Any) -> Callable[..., Any]:
        def answer(*_: Any, **__: Any) -> Any:
            asked()
            return value

        return answer

    answers: dict[str, Any] = {
        "get_device_properties": answering(properties),
        "get_device_capability": answering((properties.major, properties.minor)),
        "get_device_name": answering(facts.name),
        "mem_get_info": answering((facts.total_bytes, facts.total_bytes)),
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "synchronize": lambda *_: None,
        "_lazy_init": lambda: None,
        "get_rng_state": lambda *_, **__: torch.empty(16, dtype=torch.uint8, device="cpu"),
        **{name: lambda *_, **__: None for name in _NOTHING},
        **{name: lambda *_, **__: 0 for name in _NO_BYTES},
    }
    cuda: Any = torch.cuda
    before = {name: getattr(cuda, name) for name in answers}
    for name, answer in answers.items():
        setattr(cuda, name, answer)
    try:
        yield
    finally:
        for name, answer in before.items():
            setattr(cuda, name, answer)
