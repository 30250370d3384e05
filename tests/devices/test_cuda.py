"""CUDA devices, with torch's own functions and NVML's shared object replaced by what they would answer.

Cards are given in torch's order, which is not NVML's: CUDA_VISIBLE_DEVICES reorders, and the faster card comes first.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from autoaccum.devices import budget_terms, cuda, make_budget, nvml
from autoaccum.devices.cuda import Cuda
from autoaccum.devices.memory import Consumer
from autoaccum.errors import MemoryUnknown
from autoaccum.units import GIB, MIB
from tests.devices.nvml_stand_in import answer_with


@dataclass
class Card:
    """What torch knows of one device, and its caching allocator."""

    name: str
    total: int
    free: int
    uuid: str | None = None
    pci: tuple[int, int, int] | None = None  # domain, bus, device
    fraction: float = 1.0
    refuses: Exception | None = None  # what mem_get_info raises
    reserved: int = 0
    allocated: int = 0
    most_reserved: int = 0
    most_allocated: int = 0
    retries: int = 0
    integrated: bool = False
    has_context: bool = True
    pluggable: bool = False

    def properties(self) -> SimpleNamespace:
        known = SimpleNamespace(name=self.name, total_memory=self.total, is_integrated=int(self.integrated))
        if self.uuid:
            known.uuid = self.uuid
        if self.pci:
            known.pci_domain_id, known.pci_bus_id, known.pci_device_id = self.pci
        return known

    def mem_get_info(self) -> tuple[int, int]:
        if self.refuses:
            raise self.refuses
        return self.free, self.total

    def held(self) -> int:
        if self.pluggable:
            raise RuntimeError("CUDAPluggableAllocator does not yet support getDeviceStats. If you need it, please file an issue describing your use case.")
        return self.reserved

    def set_fraction(self, fraction: float) -> None:
        self.fraction = fraction

    def hold(self, allocated: int, reserved: int) -> None:
        self.allocated, self.reserved = allocated, reserved
        self.most_allocated, self.most_reserved = max(self.most_allocated, allocated), max(self.most_reserved, reserved)

    def forget_peaks(self) -> None:
        self.most_allocated, self.most_reserved = self.allocated, self.reserved


def show(monkeypatch: pytest.MonkeyPatch, *cards: Card) -> None:
    """Makes these torch's cards, numbered as given."""
    functions = {
        "get_device_properties": lambda index: cards[index].properties(),
        "mem_get_info": lambda index: cards[index].mem_get_info(),
        "memory_reserved": lambda index: cards[index].held(),
        "memory_allocated": lambda index: cards[index].allocated,
        "max_memory_reserved": lambda index: cards[index].most_reserved,
        "max_memory_allocated": lambda index: cards[index].most_allocated,
        "reset_peak_memory_stats": lambda index: cards[index].forget_peaks(),
        "memory_stats": lambda index: {"num_alloc_retries": cards[index].retries},
        "get_per_process_memory_fraction": lambda index: cards[index].fraction,
        "set_per_process_memory_fraction": lambda fraction, index: cards[index].set_fraction(fraction),
    }
    for name, function in functions.items():
        monkeypatch.setattr(torch.cuda, name, function, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_hasPrimaryContext", lambda index: cards[index].has_context, raising=False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: any(card.has_context for card in cards))
    monkeypatch.setattr(cuda, "_contexts", {})


def t4(**more: Any) -> Card:
    return replace(Card("Tesla T4", 15 * GIB, 11 * GIB, uuid="3f1a2b4c-7d58-4e0f-9a6b-1c2d3e4f5a6b"), **more)


def mig_slice(**more: Any) -> Card:
    return replace(Card("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 4864 * MIB, 2700 * MIB, uuid="51cedddd-0000-5000-8000-000000000004", pci=(0, 7, 0)), **more)


def gtx_1650() -> Card:
    return Card("NVIDIA GeForce GTX 1650", 4096 * MIB, 3200 * MIB, uuid="1650aaaa-0000-4000-8000-000000000001", pci=(0, 0x17, 0))


def rtx_3090() -> Card:
    return Card("NVIDIA GeForce RTX 3090", 24576 * MIB, 15000 * MIB, uuid="3090bbbb-0000-4000-8000-000000000002", pci=(0, 0x65, 0), reserved=1024 * MIB)


def test_facts_are_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    show(monkeypatch, gtx_1650(), t4())
    facts = Cuda(1).facts
    assert (facts.label, facts.name, facts.uuid) == ("cuda:1", "Tesla T4", "3f1a2b4c-7d58-4e0f-9a6b-1c2d3e4f5a6b")


def test_mem_get_info_is_believed_over_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(monkeypatch, "one_t4")  # says 15360 MiB, of which 3000 are used
    show(monkeypatch, t4(total=14 * GIB, free=10 * GIB))
    memory = Cuda(0).memory()
    assert (memory.total_bytes, memory.free_bytes) == (14 * GIB, 10 * GIB)


def test_what_this_process_holds_beyond_its_allocator_is_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(monkeypatch, "one_t4")  # says this process holds 900 MiB
    show(monkeypatch, t4(reserved=600 * MIB))
    memory = Cuda(0).memory()
    assert (memory.ours_bytes, memory.outside_bytes) == (600 * MIB, 300 * MIB)


def test_others_are_listed_with_name_and_bytes_unless_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(monkeypatch, "one_t4")
    show(monkeypatch, t4())
    assert Cuda(0).memory().others == (Consumer(4194306, 1400 * MIB, "another process"), Consumer(4194305, 512 * MIB, "another process"))
    assert Cuda(0).memory(who=False).others == ()


def test_each_index_shows_its_own_card_under_reordered_visible_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA_VISIBLE_DEVICES=1,0: torch's first card is NVML's second."""
    answer_with(monkeypatch, "two_unlike_cards")
    show(monkeypatch, rtx_3090(), gtx_1650())
    first, second = Cuda(0), Cuda(1)
    assert (first.facts.name, [other.pid for other in first.memory().others]) == ("NVIDIA GeForce RTX 3090", [4194320])
    assert (second.facts.name, [other.pid for other in second.memory().others]) == ("NVIDIA GeForce GTX 1650", [4194310])
    assert (first.memory().outside_bytes, second.memory().outside_bytes) == (476 * MIB, None)  # this process is on the first only


def test_the_only_visible_card_may_be_nvmls_second(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(monkeypatch, "two_unlike_cards")
    show(monkeypatch, rtx_3090())
    assert [other.pid for other in Cuda(0).memory().others] == [4194320]


def test_a_card_whose_uuid_torch_does_not_tell_is_found_by_its_pci_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch gives the PCI numbers as integers, NVML writes them in hexadecimal: bus 101 is 65."""
    answer_with(monkeypatch, "two_unlike_cards")
    show(monkeypatch, Card("NVIDIA GeForce RTX 3090", 24576 * MIB, 15000 * MIB, pci=(0, 101, 0)))
    device = Cuda(0)
    assert device.facts.uuid is None
    assert [other.pid for other in device.memory().others] == [4194320]


@pytest.mark.parametrize("refuses", [None, RuntimeError("CUDA error: operation not supported")])
def test_a_mig_slice_shows_the_memory_of_the_slice(monkeypatch: pytest.MonkeyPatch, refuses: Exception | None) -> None:
    answer_with(monkeypatch, "mig_slice")
    show(monkeypatch, mig_slice(refuses=refuses))
    memory = Cuda(0).memory()
    assert memory.total_bytes == 4864 * MIB
    assert [other.pid for other in memory.others] == [4194330]  # not the one on the rest of the card


def test_nvml_is_believed_where_mem_get_info_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(monkeypatch, "one_t4")
    show(monkeypatch, t4(refuses=RuntimeError("CUDA error: operation not supported")))
    memory = Cuda(0).memory()
    assert (memory.total_bytes, memory.free_bytes) == (15360 * MIB, 12360 * MIB)


@pytest.mark.parametrize("situation, reason", [("forbidden", "Insufficient Permissions"), ("no_library", "Shared Library Not Found"), ("unified_memory", "")])
def test_memory_that_nobody_tells_is_an_error_that_names_who_was_asked(monkeypatch: pytest.MonkeyPatch, situation: str, reason: str) -> None:
    answer_with(monkeypatch, situation)
    show(monkeypatch, Card("NVIDIA GB10", 0, 0, uuid="6b10eeee-0000-4000-8000-000000000005", refuses=RuntimeError("CUDA error: not supported\nlong story")))
    with pytest.raises(MemoryUnknown) as raised:
        Cuda(0).memory()
    message = str(raised.value)
    assert all(part in message for part in ("cuda:0", "NVIDIA GB10", "torch.cuda.mem_get_info", "CUDA error: not supported", "NVML", reason))
    assert "long story" not in message
    assert raised.value.exit_code == 4


@pytest.mark.parametrize("situation", ["forbidden", "no_library", "processes_forbidden", "wsl2_no_list", "wsl2_empty_list", "wsl2_bytes_not_available"])
def test_outside_is_unknown_where_nvml_does_not_tell_our_share(monkeypatch: pytest.MonkeyPatch, situation: str) -> None:
    answer_with(monkeypatch, situation)
    show(monkeypatch, t4(reserved=600 * MIB))
    memory = Cuda(0).memory()
    assert (memory.total_bytes, memory.free_bytes, memory.ours_bytes, memory.outside_bytes) == (15 * GIB, 11 * GIB, 600 * MIB, None)


def test_an_amd_card_is_not_looked_up_in_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine may hold both makes; ROCm's cards are torch's "cuda" too, and their PCI ids are like any other."""
    answer_with(monkeypatch, "one_t4")
    monkeypatch.setattr(torch.version, "hip", "6.4.43482")
    show(monkeypatch, Card("AMD Instinct MI210", 64 * GIB, 60 * GIB, pci=(0, 0, 4)))
    memory = Cuda(0).memory()
    assert (memory.total_bytes, memory.outside_bytes, memory.others) == (64 * GIB, None, ())


def test_a_cap_is_the_allocators_and_ends_with_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    card = t4(fraction=0.75)
    show(monkeypatch, gtx_1650(), card)
    with Cuda(1).capped(3 * GIB):
        assert card.fraction * card.total == 3 * GIB
    assert card.fraction == 0.75


def test_the_callers_own_memory_fraction_is_a_limit_and_stays_one_inside_a_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a shared card one may take half of it: 7.5 GiB, of which 2 are reserved."""
    card = t4(fraction=0.5, reserved=2 * GIB)
    show(monkeypatch, card)
    memory = Cuda(0).memory()
    assert (memory.free_bytes, memory.ours_bytes, memory.binding_limit) == (int(5.5 * GIB), 2 * GIB, "memory fraction")
    assert any(name == "in use or beyond the memory fraction" for _, name in budget_terms(make_budget(memory, kind="cuda")))
    with Cuda(0).capped(12 * GIB):
        assert card.fraction == 0.5
    with Cuda(0).capped(3 * GIB):
        assert card.fraction * card.total == 3 * GIB
    assert card.fraction == 0.5


def test_a_fraction_in_the_environment_is_known_to_a_torch_that_cannot_tell_it(monkeypatch: pytest.MonkeyPatch) -> None:
    card = t4()
    show(monkeypatch, card)
    monkeypatch.delattr(torch.cuda, "get_per_process_memory_fraction")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True,per_process_memory_fraction:0.25")
    assert Cuda(0).memory().free_bytes == int(0.25 * 15 * GIB)
    with Cuda(0).capped(3 * GIB):
        assert card.fraction < 0.25
    assert card.fraction == 0.25


def test_a_card_that_shares_the_hosts_memory_has_no_more_than_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """GB10: the driver counts 100 GiB as free, and the host has less available."""
    show(monkeypatch, Card("NVIDIA GB10", 2**50, 2**49, integrated=True))
    memory = Cuda(0).memory()
    assert memory.free_bytes < 2**49 and memory.binding_limit == "host memory"


def test_the_context_is_measured_around_its_creation_where_nvml_hides_our_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container the card's use is told, and not whose it is."""
    card = t4(has_context=False)
    show(monkeypatch, card)
    answers = iter([3000 * MIB, 3000 * MIB + 480 * MIB + 2 * MIB])
    monkeypatch.setattr(Cuda, "_driver", lambda self: nvml.DriverAnswer(total_bytes=15 * GIB, used_bytes=next(answers, 5000 * MIB)))
    device = Cuda(0)
    assert device.memory().outside_bytes is None
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    monkeypatch.setattr(torch, "ones", lambda *_, **__: torch.zeros(2, 2))
    answers = iter([3482 * MIB])
    card.hold(2 * MIB, 2 * MIB)
    device.prepare()
    assert device.memory().outside_bytes == 480 * MIB
    card.has_context = True
    assert Cuda(0).memory().outside_bytes == 480 * MIB  # the context is there once in a process


def test_an_allocator_without_statistics_gets_the_drivers_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDAPluggableAllocator, as RMM sets it: no peak, no cap, and no end."""
    card = t4(pluggable=True)
    show(monkeypatch, card)
    device = Cuda(0)
    assert (device.exact_peak, device.enforces) == (False, False) and "pluggable" in device.allocator
    memory = device.memory()
    assert (memory.free_bytes, memory.ours_bytes, memory.outside_bytes) == (11 * GIB, 4 * GIB, 0)
    assert device.held_bytes() == device.live_bytes() == 4 * GIB
    with device.capped(3 * GIB), device.watch() as peak:
        card.free -= GIB
        assert peak.peak_bytes() == 5 * GIB
        card.free += GIB
        peak.restart()
        assert peak.peak_bytes() == 4 * GIB
    assert card.fraction == 1


def test_another_error_of_the_statistics_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    show(monkeypatch, t4())

    def lost(index: int) -> int:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "memory_reserved", lost)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        Cuda(0)


def test_a_peak_that_is_restarted_forgets_what_was_before(monkeypatch: pytest.MonkeyPatch) -> None:
    card = t4()
    show(monkeypatch, card)
    with Cuda(0).watch() as peak:
        card.hold(allocated=9 * GIB, reserved=10 * GIB)
        peak.lap_bytes()
        card.hold(allocated=1 * GIB, reserved=1 * GIB)
        card.retries += 3
        peak.restart()
        card.hold(allocated=2 * GIB, reserved=3 * GIB)
        assert (peak.peak_bytes(), peak.lap_bytes(), peak.retries()) == (3 * GIB, 2 * GIB, 0)


def test_pinned_memory_that_is_cached_on_the_host_goes_back_too(monkeypatch: pytest.MonkeyPatch) -> None:
    show(monkeypatch, t4())
    emptied: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append("card"))
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: emptied.append("host"), raising=False)
    Cuda(0).release()
    assert emptied == ["card", "host"]


def test_a_cap_ends_also_when_the_block_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    card = t4(fraction=0.75)
    show(monkeypatch, card)
    with pytest.raises(torch.OutOfMemoryError), Cuda(0).capped(3 * GIB):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    assert card.fraction == 0.75


@pytest.mark.parametrize("budget_bytes, fraction", [(-1, 0.0), (0, 0.0), (16 * GIB, 1.0)])
def test_a_cap_is_never_a_fraction_that_torch_refuses(monkeypatch: pytest.MonkeyPatch, budget_bytes: int, fraction: float) -> None:
    card = t4()
    show(monkeypatch, card)
    with Cuda(0).capped(budget_bytes):
        assert card.fraction == fraction


def test_a_torch_that_cannot_tell_the_cap_gets_none_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch before 2.8 has the setter only."""
    card = t4()
    show(monkeypatch, card)
    monkeypatch.delattr(torch.cuda, "get_per_process_memory_fraction")
    with Cuda(0).capped(3 * GIB):
        assert card.fraction < 1
    assert card.fraction == 1


def test_the_peak_is_of_reserved_bytes_and_outlives_laps_of_allocated_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    card = t4()
    card.hold(allocated=9 * GIB, reserved=10 * GIB)
    card.hold(allocated=0, reserved=0)
    show(monkeypatch, card)
    with Cuda(0).watch() as peak:
        card.hold(allocated=3 * GIB, reserved=5 * GIB)
        card.hold(allocated=1 * GIB, reserved=2 * GIB)
        assert peak.lap_bytes() == 3 * GIB
        card.hold(allocated=2 * GIB, reserved=3 * GIB)
        assert peak.lap_bytes() == 2 * GIB
        assert peak.peak_bytes() == 5 * GIB


def test_retries_are_counted_from_the_start_of_the_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    card = t4(retries=4)
    show(monkeypatch, card)
    with Cuda(0).watch() as peak:
        assert peak.retries() == 0
        card.retries += 2
        assert peak.retries() == 2
