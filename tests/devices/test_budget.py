"""Budgets, the records of a device, and the peak of systems that keep none."""

from __future__ import annotations

import json
import threading
from dataclasses import replace

import psutil
import pytest

from autoaccum.devices.budget import Budget, drift, make_budget
from autoaccum.devices.memory import Consumer, Facts, Memory
from autoaccum.devices.sampled_peak import SampledPeak
from autoaccum.errors import UsageError
from autoaccum.units import GIB, MIB

# 2 GiB are reserved and 10 GiB free: 12 GiB could be reserved in all; the context takes 1 GiB.
MEMORY = Memory(total_bytes=16 * GIB, free_bytes=10 * GIB, ours_bytes=2 * GIB, outside_bytes=1 * GIB, others=(), binding_limit="physical")


def test_without_a_cap_the_budget_is_what_we_hold_and_what_is_free_less_the_headroom() -> None:
    found = make_budget(MEMORY, kind="cuda", headroom="10%")
    assert (found.headroom_bytes, found.budget_bytes) == (12 * GIB // 10, 12 * GIB - 12 * GIB // 10)
    assert (found.memory, found.cap_bytes) == (MEMORY, None)


def test_a_cap_pays_for_what_is_outside_of_the_allocator_too() -> None:
    found = make_budget(MEMORY, kind="cuda", limit_bytes=6 * GIB, headroom="10%")
    assert (found.headroom_bytes, found.budget_bytes) == (GIB // 2, 5 * GIB - GIB // 2)
    assert found.cap_bytes == 6 * GIB


def test_a_cap_above_what_there_is_gives_no_more_than_there_is() -> None:
    assert make_budget(MEMORY, kind="cuda", limit_bytes=64 * GIB).budget_bytes == make_budget(MEMORY, kind="cuda").budget_bytes


@pytest.mark.parametrize("limit_bytes, there_is", [(6 * GIB, 6 * GIB - 512 * MIB), (None, 12 * GIB)])
def test_an_unknown_outside_is_assumed_only_under_a_cap(limit_bytes: int | None, there_is: int) -> None:
    """Without a cap what is free already excludes the context."""
    unknown = replace(MEMORY, outside_bytes=None)
    assert make_budget(unknown, kind="cuda", limit_bytes=limit_bytes, headroom=0).budget_bytes == there_is


@pytest.mark.parametrize("kind, kept", [("cuda", 256 * MIB), ("xpu", 256 * MIB), ("mps", 256 * MIB), ("cpu", 20 * MIB)])
def test_a_percentage_keeps_a_least_headroom_on_a_gpu_and_none_on_the_cpu(kind: str, kept: int) -> None:
    small = replace(MEMORY, free_bytes=1000 * MIB, ours_bytes=0, outside_bytes=0)
    assert make_budget(small, kind=kind, headroom="2%").headroom_bytes == kept


def test_a_percentage_of_much_is_more_than_the_least() -> None:
    assert make_budget(replace(MEMORY, free_bytes=78 * GIB), kind="cuda", headroom="5%").headroom_bytes == 4 * GIB


@pytest.mark.parametrize("headroom, kept", [("100MiB", 100 * MIB), (50 * MIB, 50 * MIB), ("0", 0), (0, 0)])
def test_a_headroom_given_as_a_size_is_kept_as_given(headroom: str | int, kept: int) -> None:
    found = make_budget(MEMORY, kind="cuda", headroom=headroom)
    assert (found.headroom_bytes, found.budget_bytes) == (kept, 12 * GIB - kept)


def test_a_cap_below_what_the_context_takes_leaves_nothing() -> None:
    assert make_budget(MEMORY, kind="cuda", limit_bytes=512 * MIB).budget_bytes < 0


@pytest.mark.parametrize("headroom", ["100%", "12GiB", "a bit", "-1%"])
def test_a_headroom_that_leaves_nothing_or_means_nothing_is_refused(headroom: str) -> None:
    with pytest.raises(UsageError):
        make_budget(MEMORY, kind="cuda", headroom=headroom)


def test_a_reading_survives_json() -> None:
    memory = replace(MEMORY, others=(Consumer(7, None, "python"), Consumer(8, GIB, "blender")), outside_bytes=None)
    assert Memory.from_dict(json.loads(json.dumps(memory.as_dict()))) == memory


@pytest.mark.parametrize("facts, label", [(Facts("cpu", None, "EPYC", None), "cpu"), (Facts("cuda", 0, "Tesla T4", "3f1a"), "cuda:0")])
def test_a_label_is_what_torch_device_takes(facts: Facts, label: str) -> None:
    assert facts.label == label


class Resident:
    """Resident bytes of this process, and the other thread's reads of them as something to wait for."""

    def __init__(self) -> None:
        self._reads = threading.Semaphore(0)

    def read(self) -> int:
        held = int(psutil.Process().memory_info().rss)
        if threading.current_thread() is not threading.main_thread():
            self._reads.release()
        return held

    def wait(self) -> None:
        """Returns when a read that began after this call has been taken into account.

        Of the next three reads the first may have begun before, and when the third ends the second is accounted for.
        """
        while self._reads.acquire(blocking=False):
            pass
        for _ in range(3):
            assert self._reads.acquire(timeout=30), "nobody reads"


def test_a_peak_between_two_reads_is_seen() -> None:
    resident = Resident()
    with SampledPeak(resident.read) as peak:
        before = peak.peak_bytes()
        block = b"x" * (64 * MIB)  # mapped on its own: gone from what is resident once it is freed
        resident.wait()
        del block
        assert resident.read() < before + 32 * MIB
        assert 60 * MIB < peak.peak_bytes() - before < 96 * MIB


def test_a_lap_of_a_sampled_peak_begins_anew_and_the_peak_stays() -> None:
    resident = Resident()
    with SampledPeak(resident.read) as peak:
        before = peak.peak_bytes()
        block = b"x" * (64 * MIB)
        resident.wait()
        del block
        resident.wait()  # the last read with the block belongs to the first lap
        assert peak.lap_bytes() > before + 60 * MIB
        assert peak.lap_bytes() < before + 32 * MIB
        assert peak.peak_bytes() > before + 60 * MIB


def test_sampling_ends_with_the_block() -> None:
    with SampledPeak(lambda: 1):
        assert "autoaccum-peak" in {thread.name for thread in threading.enumerate()}
    assert "autoaccum-peak" not in {thread.name for thread in threading.enumerate()}


def test_a_loss_that_is_small_beside_what_is_spare_is_not_worth_a_warning() -> None:
    def budget(free: int) -> Budget:
        return make_budget(replace(MEMORY, total_bytes=32 * GIB, free_bytes=free), kind="cpu", headroom=0)

    before, after = budget(20 * GIB), budget(20 * GIB - 496 * 1024)
    assert not drift(before, after, peak_bytes=2 * GIB)
    assert drift(before, after, peak_bytes=after.budget_bytes - 1024)  # hardly anything is spare
    assert drift(before, budget(10 * GIB), peak_bytes=2 * GIB)
