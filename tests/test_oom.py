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
    assert bool(oom.in_output(text)) is told


def printed(recorded, prefix=""):
    """What Python prints of the exception, as the end of a traceback."""
    error = as_exception(recorded)
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ in ("builtins", "__main__", "tests.test_oom") else f"{kind.__module__}.{kind.__qualname__}"
    text = str(error) if len(error.args) < 2 else repr(error.args)
    return "\n".join(prefix + line for line in f"Traceback (most recent call last):\n  File 'train.py', line 3, in <module>\n{name}: {text}".splitlines())


PRINTED = [recorded for recorded in RECORDED if len(recorded["args"]) < 2]  # two arguments are printed as a tuple


@pytest.mark.parametrize("prefix", ["", "[rank0]: ", "[default1]:"])
@pytest.mark.parametrize("recorded", PRINTED, ids=lambda recorded: recorded["note"][:40])
def test_a_program_that_prints_an_exception_gets_the_same_verdict(recorded, prefix):
    assert bool(oom.in_output(printed(recorded, prefix))) is (recorded["verdict"] != "not")


@pytest.mark.parametrize(
    "text",
    [
        "numpy._core._exceptions._ArrayMemoryError: Unable to allocate 8.00 GiB for an array with shape (120, 1, 64, 128, 128) and data type float64",
        "torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'",
        "slurmstepd: error: Detected 1 oom_kill event in StepId=77.0. Some of the step tasks have been OOM Killed.",
    ],
)
def test_what_others_print_when_memory_runs_out(text):
    assert oom.in_output(text)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (-9, ""),
        (137, ""),
        (1, "train.sh: line 3:  4242 Killed                  python train.py --bs 64"),
        (
            1,
            "E1128 torch/distributed/elastic/multiprocessing/api.py:984] failed (exitcode: -9) local_rank: 0 (pid: 77) of binary: python\n  exitcode  : -9 (pid: 77)",
        ),
        (1, "  error_file: <N/A>\n  traceback : Signal 9 (SIGKILL) received by PID 77"),
        (1, "subprocess.CalledProcessError: Command '['python', 'train.py']' died with <Signals.SIGKILL: 9>."),
        (1, "[ERROR] [launch.py:325:sigkill_handler] ['python', 'train.py'] exits with return code = -9"),
        (1, "RuntimeError: DataLoader worker (pid 4242) is killed by signal: Killed. "),
        (1, "RuntimeError: DataLoader worker (pid(s) 4242, 4243) exited unexpectedly\nslurmstepd: error: Detected 1 oom-kill event(s)"),
        (1, "srun: error: node7: task 0: Out Of Memory"),
    ],
)
def test_the_words_of_launchers_for_a_kill(code, text):
    assert oom.was_killed(code, text) or oom.in_output(text)


@pytest.mark.parametrize(("code", "text"), [(1, "ValueError: Killed by hand"), (0, "line: Killed"), (1, "exitcode: 1"), (-15, "Terminated")])
def test_other_ends_are_no_kill(code, text):
    assert not oom.was_killed(code, text)
