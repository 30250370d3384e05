import builtins
import json
from pathlib import Path

import pytest
import torch

from autoaccum import oom

RECORDED = [json.loads(line) for line in (Path(__file__).parent / "recordings/oom_messages.jsonl").read_text().splitlines()]
MIB = 2**20


def as_exception(recorded):
    """The recorded exception with its real type; a type that is not installed here is made by its name."""
    module, _, name = recorded["type"].rpartition(".")
    kind = getattr(torch, name, None) if module == "torch" else getattr(builtins, name, None)
    if kind is None:
        base = RuntimeError if module == "torch" else Exception
        kind = type(name, (base,), {})
    return kind(*recorded["args"])


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda recorded: recorded["note"][:40])
def test_recorded_messages_get_their_verdict(recorded):
    assert oom.verdict(as_exception(recorded)) == recorded["verdict"]


@pytest.mark.parametrize("recorded", [each for each in RECORDED if each["verdict"] == "ask-device"], ids=lambda recorded: recorded["note"][:40])
def test_in_doubt_the_device_decides_by_how_much_it_has_left(recorded):
    error = as_exception(recorded)
    assert oom.is_oom(error, left_bytes=200 * MIB, taken_bytes=3000 * MIB)
    assert not oom.is_oom(error, left_bytes=9000 * MIB, taken_bytes=300 * MIB)


def test_an_out_of_memory_that_caused_another_error_is_one():
    try:
        try:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        except RuntimeError as cause:
            raise ValueError("the trainer failed") from cause
    except ValueError as error:
        assert oom.is_oom(error)


def test_an_error_that_says_it_has_no_cause_is_not_blamed_on_one():
    try:
        try:
            raise MemoryError
        except MemoryError:
            raise ValueError("shape mismatch") from None
    except ValueError as error:
        assert not oom.is_oom(error)


def test_users_can_add_a_case_of_their_own(monkeypatch):
    class EngineFull(Exception):
        pass

    monkeypatch.setattr(oom, "_of_the_user", [])
    assert not oom.is_oom(EngineFull())
    oom.register(lambda error: isinstance(error, EngineFull))
    assert oom.is_oom(EngineFull())
    assert not oom.is_oom(ValueError("other"))


def test_a_real_allocation_that_cannot_succeed_is_recognised():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert oom.is_oom(raised.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("Traceback ...\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB.", True),
        ("RuntimeError: [enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried", True),
        ("libgomp: Thread creation failed: Resource temporarily unavailable", True),
        ("MemoryError", True),
        ("INFO: will not run out of memory, we hope", False),
        ("ValueError: memory slots exhausted", False),
    ],
)
def test_printed_output_is_searched_for_whole_phrases(text, told):
    assert oom.in_output(text) is told
