"""Every example runs, and says what its page promises."""

import os
import subprocess
import sys

import pytest

from tests.command_line import ROOT, autoaccum, document

MIB = 2**20


def example(name, *words):
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=dict(os.environ), check=True, timeout=120).stdout


def test_there_is_no_example_that_is_not_run_here():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == {"plain_loop.py", "tiny_gpt.py", "conv_net.py", "unmodified_script.py"}


def test_plain_loop():
    lines = example("plain_loop.py").splitlines()
    assert lines[0].startswith("120 = 40 x 3 ")
    losses = [float(line.split()[-1]) for line in lines[1:]]
    assert len(losses) == 4 and losses == sorted(losses, reverse=True)


def test_tiny_gpt_in_place():
    out = example("tiny_gpt.py")
    assert out.startswith("120 = ") and out.count("StepResult(") == 5


def test_conv_net_in_place():
    out = example("conv_net.py")
    assert out.startswith("120 = ") and "BatchNorm" in out


def test_unmodified_script():
    assert "step 2  loss" in example("unmodified_script.py", "--batch-size", 2, "--accum", 2)


GPT = ("examples/tiny_gpt.py:make_job", "-d", "cpu", "-q")


@pytest.fixture(scope="module")
def peak_of():
    """What a window of 120 peaks at in micro-batches of a given size: this test's own measurement."""

    def measure(micro_batch):
        return document(autoaccum("check", *GPT, "-b", 120, "-m", micro_batch, "--json"))["peak_bytes"]

    return measure


@pytest.mark.parametrize(("most", "answer"), [(40, (40, 3)), (39, (30, 4))])
def test_tiny_gpt_under_a_limit_at_which_so_many_fit_and_no_more(peak_of, most, answer):
    """The limit is put half a sample above the peak of `most`; its samples take more than 4 MiB each."""
    per_sample = (peak_of(60) - peak_of(30)) / 30
    assert per_sample > 4 * MIB
    limit = int((peak_of(30) + (most + 0.5 - 30) * per_sample) / 0.97)
    plan = document(autoaccum("tune", *GPT, "-b", 120, "--memory-limit", limit, "--json"))
    assert (plan["micro_batch"], plan["accumulation_steps"]) == answer
    refused = 60 if most == 40 else 40
    assert plan["smallest_refused"] == refused
    assert len(plan["trials"]) <= 6 and sum(trial["outcome"] == "oom" for trial in plan["trials"]) <= 1


def test_tiny_gpt_with_plenty_and_with_too_little():
    assert document(autoaccum("tune", *GPT, "-b", 120, "--json"))["micro_batches"] == [120]
    finished = autoaccum("tune", *GPT, "-b", 120, "--memory-limit", "260MiB")
    assert finished.returncode == 3
    assert "one sample does not fit" in finished.stderr and "raise --memory-limit (now 260 MiB)" in finished.stderr
