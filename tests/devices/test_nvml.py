"""What NVML is asked and how its answers, or their lack, are understood."""

from __future__ import annotations

import os
import sys

import psutil
import pytest

from autoaccum.devices import nvml
from autoaccum.units import MIB
from tests.devices.nvml_stand_in import answer_with

# As torch gives a UUID: without NVML's prefix.
T4 = "3f1a2b4c-7d58-4e0f-9a6b-1c2d3e4f5a6b"
GTX_1650, RTX_3090 = "1650aaaa-0000-4000-8000-000000000001", "3090bbbb-0000-4000-8000-000000000002"
A100, SLICE = "a100cccc-0000-4000-8000-000000000003", "51cedddd-0000-5000-8000-000000000004"
GB10 = "6b10eeee-0000-4000-8000-000000000005"
T4_PCI, RTX_3090_PCI, A100_PCI = "00000000:00:04.0", "00000000:65:00.0", "00000000:07:00.0"


def test_a_card_tells_its_name_its_memory_and_our_share(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(monkeypatch, "one_t4")
    told = nvml.ask(T4, None)
    assert (told.name, told.uuid, told.why_not) == ("Tesla T4", f"GPU-{T4}", None)
    assert (told.total_bytes, told.used_bytes, told.ours_bytes) == (15360 * MIB, 3000 * MIB, 900 * MIB)


def test_other_processes_come_largest_first_and_without_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(monkeypatch, "one_t4")
    assert [(other.pid, other.bytes) for other in nvml.ask(T4, None).others] == [(4194306, 1400 * MIB), (4194305, 512 * MIB)]


def test_a_process_of_another_user_is_marked_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    class Process:
        def __init__(self, pid: int = os.getpid()) -> None:
            self.ours = pid == os.getpid() or pid == 4194305

        def username(self) -> str:
            return "ada" if self.ours else "grace"

        def name(self) -> str:
            return "python3"

    answer_with(monkeypatch, "one_t4")
    monkeypatch.setattr(psutil, "Process", Process)
    assert [other.name for other in nvml.ask(T4, None).others] == ["python3 (another user)", "python3"]


def test_a_process_number_that_means_nothing_here_still_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML gives the numbers of the host; in a container nobody has them. 4194304 is the largest Linux gives out."""
    answer_with(monkeypatch, "one_t4")
    assert {other.name for other in nvml.ask(T4, None).others} == {"another process"}


@pytest.mark.parametrize("uuid, name", [(GTX_1650, "NVIDIA GeForce GTX 1650"), (RTX_3090, "NVIDIA GeForce RTX 3090")])
def test_each_of_two_cards_is_found_by_its_uuid(monkeypatch: pytest.MonkeyPatch, uuid: str, name: str) -> None:
    answer_with(monkeypatch, "two_unlike_cards")
    assert nvml.ask(uuid, None).name == name


@pytest.mark.parametrize("uuid", [None, "00000000-0000-0000-0000-000000000000"])
def test_a_card_is_found_by_pci_id_where_its_uuid_does_not_help(monkeypatch: pytest.MonkeyPatch, uuid: str | None) -> None:
    answer_with(monkeypatch, "two_unlike_cards")
    assert nvml.ask(uuid, RTX_3090_PCI).name == "NVIDIA GeForce RTX 3090"


def test_a_card_that_nvml_does_not_have_is_not_taken_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(monkeypatch, "one_t4")
    told = nvml.ask(RTX_3090, RTX_3090_PCI)
    assert told == nvml.DriverAnswer(why_not=told.why_not)
    assert told.why_not and RTX_3090 in told.why_not and RTX_3090_PCI in told.why_not


def test_a_mig_slice_answers_for_itself_and_not_for_the_card_of_its_pci_id(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(monkeypatch, "mig_slice")
    told = nvml.ask(SLICE, A100_PCI)
    assert (told.uuid, told.total_bytes) == (f"MIG-{SLICE}", 4864 * MIB)
    assert [other.pid for other in told.others] == [4194330]


@pytest.mark.parametrize("situation", ["wsl2_no_list", "wsl2_empty_list", "processes_forbidden"])
def test_memory_is_told_where_processes_are_not(monkeypatch: pytest.MonkeyPatch, situation: str) -> None:
    answer_with(monkeypatch, situation)
    told = nvml.ask(T4, None)
    assert (told.total_bytes, told.used_bytes) == (15360 * MIB, 3000 * MIB)
    assert (told.ours_bytes, told.others) == (None, ())


def test_a_process_without_a_figure_is_listed_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML's "not available" is the largest number of 64 bits: taken at its word it would be 16 EiB."""
    answer_with(monkeypatch, "wsl2_bytes_not_available")
    told = nvml.ask(T4, None)
    assert told.ours_bytes is None
    assert [(other.pid, other.bytes) for other in told.others] == [(4194305, None)]


def test_unified_memory_tells_processes_and_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(monkeypatch, "unified_memory")
    told = nvml.ask(GB10, None)
    assert (told.name, told.total_bytes, told.used_bytes, told.ours_bytes) == ("NVIDIA GB10", None, None, 300 * MIB)


@pytest.mark.parametrize("situation, reason", [("forbidden", "Insufficient Permissions"), ("no_library", "NVML Shared Library Not Found")])
def test_nvml_that_does_not_start_says_why(monkeypatch: pytest.MonkeyPatch, situation: str, reason: str) -> None:
    answer_with(monkeypatch, situation)
    assert nvml.ask(T4, T4_PCI) == nvml.DriverAnswer(why_not=f"NVML: {reason}")


def test_without_pynvml_the_answer_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # what the import system takes for "cannot be imported"
    told = nvml.ask(T4, T4_PCI)
    assert told == nvml.DriverAnswer(why_not=told.why_not)
    assert told.why_not and "pynvml is not installed" in told.why_not


def test_a_driver_without_the_newest_process_list_still_tells_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(monkeypatch, "old_driver")
    told = nvml.ask(T4, None)
    assert (told.total_bytes, told.ours_bytes, told.others) == (15360 * MIB, None, ())


@pytest.mark.parametrize("uuid", [T4, "00000000-0000-0000-0000-000000000000"])
def test_nvml_is_initialised_once_in_a_process(monkeypatch: pytest.MonkeyPatch, uuid: str) -> None:
    stand_in = answer_with(monkeypatch, "one_t4")
    for _ in range(3):
        nvml.ask(uuid, None)
    assert stand_in.users == 1
