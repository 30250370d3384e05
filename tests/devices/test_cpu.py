"""The CPU's memory, measured and limited for real: each test that depends on it has a process of its own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from autoaccum.devices.cpu import Cpu
from autoaccum.devices.malloc import LINUX
from autoaccum.units import MIB
from tests.devices.fresh import fresh

linux = pytest.mark.skipif(not LINUX, reason="needs /proc and RLIMIT_DATA")
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's mallopt")

# MIB floats of 4 bytes are 4 MiB.
START = """
import json, resource, torch
from autoaccum.devices.cpu import Cpu
from autoaccum.devices.malloc import steady_malloc
torch.set_num_threads(1)
MIB = 2**20
def tensor(mib):
    return torch.ones(mib * MIB // 4)
def limits():
    return resource.getrlimit(resource.RLIMIT_DATA)
device = Cpu()
"""


def test_a_reading_stays_within_the_machine() -> None:
    memory = Cpu().memory(who=False)
    assert 0 <= memory.free_bytes <= memory.total_bytes <= psutil.virtual_memory().total
    assert 0 < memory.ours_bytes < memory.total_bytes
    assert (memory.outside_bytes, memory.others) == (0, ())
    assert memory.binding_limit == "physical" or memory.binding_limit.startswith("cgroup /")


@contextmanager
def holding(mib: int) -> Iterator[int]:
    """Another process that holds so much, by its number."""
    code = f"import sys; block = b'x' * ({mib} * 2**20); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "held\n"
        yield process.pid
        process.communicate()  # closes its standard input, at which it ends


def test_large_processes_beside_this_one_are_listed_largest_first() -> None:
    with holding(300) as small, holding(400) as large:
        others = Cpu().memory().others
    sizes = [other.bytes or 0 for other in others]
    assert sizes == sorted(sizes, reverse=True)
    assert os.getpid() not in {other.pid for other in others}
    # Three are shown at most: on a busy machine all three may be larger than ours.
    for pid, mib in ((small, 300), (large, 400)):
        assert pid in {other.pid for other in others} or (len(sizes) == 3 and min(sizes) >= mib * MIB)


@linux
def test_a_peak_sees_what_was_freed_before_it_was_read_and_a_lap_begins_anew() -> None:
    seen = fresh(
        START
        + """
device.prepare()
with device.watch() as watch:
    before = device.held_bytes()
    tensor(200)
    first_lap, second_lap = watch.lap_bytes(), watch.lap_bytes()
    tensor(50)
    third_lap, peak, held = watch.lap_bytes(), watch.peak_bytes(), device.held_bytes()
print(json.dumps([bytes_ - before for bytes_ in (first_lap, second_lap, third_lap, peak, held)]))
"""
    )
    for measured, expected in zip(seen, (200, 0, 50, 200, 0)):
        assert abs(measured - expected * MIB) < 8 * MIB


@linux
def test_a_cap_refuses_memory_above_the_budget_and_ends_with_the_block() -> None:
    seen = fresh(
        START
        + """
device.prepare()
before, budget = limits(), device.held_bytes() + 100 * MIB
kept = []
with device.watch() as watch:
    try:
        with device.capped(budget):
            inside = limits()
            while len(kept) < 50:
                kept.append(tensor(5))
    except RuntimeError as error:
        message = str(error)
    after, peak = limits(), watch.peak_bytes()
big = tensor(300).sum().item()
print(json.dumps({"before": before, "inside": inside, "after": after, "left": budget - peak, "message": message, "big": big}))
"""
    )
    assert "can't allocate memory" in seen["message"]
    assert 0 <= seen["left"] < 10 * MIB  # never more than the budget, and nearly all of it
    assert seen["after"] == seen["before"] != seen["inside"]
    assert seen["inside"][1] == seen["before"][1]  # the hard limit: once lowered it could not be raised again
    assert seen["big"] == 300 * MIB // 4


@linux
def test_a_cap_within_a_cap_within_an_exception_gives_each_limit_back() -> None:
    """A trial may run while the user's own exception is being handled, and its own failure passes through the cap."""
    seen = fresh(
        START
        + """
device.prepare()
seen = [limits()]
try:
    raise KeyError("the user's own")
except KeyError:
    with device.capped(device.held_bytes() + 400 * MIB):
        seen.append(limits())
        try:
            with device.capped(device.held_bytes() + 100 * MIB):
                tensor(200)
        except RuntimeError as error:
            context = type(error.__context__).__name__
        seen.append(limits())
        tensor(200)
    seen.append(limits())
print(json.dumps([context, *seen]))
"""
    )
    context, before, outer, outer_again, after = seen
    assert context == "KeyError"
    assert outer == outer_again != before
    assert after == before


@linux
def test_a_cap_does_not_lift_a_limit_that_was_set_from_outside() -> None:
    """As by `ulimit -d`."""
    seen = fresh(
        START
        + """
resource.setrlimit(resource.RLIMIT_DATA, (2**40, limits()[1]))
outside = limits()
with device.capped(2**60):
    inside = limits()
print(json.dumps([outside, inside, limits()]))
"""
    )
    outside, inside, after = seen
    assert outside == inside == after


# Tensors of 1 MiB with small ones kept between them, as a model's buffers lie between its activations. The large
# one at first makes glibc serve all these from its heap, unless the threshold for mapping was fixed.
MANY = """
tensor(16)
before = device.held_bytes()
held, small = [], []
for _ in range(150):
    held.append(tensor(1))
    small.append(torch.ones(256))
most = device.held_bytes()
del held
print(json.dumps([steady, most - before, device.held_bytes() - before]))
"""


@glibc
def test_with_the_steady_allocator_freed_tensors_leave_the_process() -> None:
    steady, most, left = fresh(START + "steady = steady_malloc()" + MANY)
    assert steady is True
    assert most > 140 * MIB
    assert left < 8 * MIB


@glibc
def test_the_steady_allocator_can_be_turned_off() -> None:
    """Then glibc keeps what lies below a live block, as it does by default."""
    steady, most, left = fresh(START + "steady = steady_malloc()" + MANY, AUTOACCUM_MALLOC="default")
    assert steady is False
    assert most > 140 * MIB
    assert left > 100 * MIB
