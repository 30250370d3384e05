"""What would make it fit: the job with a change is traced, and is what tracing the changed job by hand gives."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import autoaccum
from autoaccum.probe import Request
from autoaccum.tuner import changes
from autoaccum.virtual import estimate_source
from autoaccum.window import parse_source
from tests import command_line
from tests.simulated import in_a_process

JOB = """
import torch, autoaccum
from torch import nn
from torch.utils.checkpoint import checkpoint


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        return x + self.body(x)


class Net(nn.Module):
    def __init__(self, width, again):
        super().__init__()
        self.again, self.embed, self.blocks, self.head = again, nn.Embedding(100, width), nn.ModuleList(Block(width) for _ in range(4)), nn.Linear(width, 100)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.again else block(x)
        return self.head(x)


def make_job(width: int = 128, again: bool = False, bf16: bool = False, length: int = 64, sgd: bool = False):
    model = Net(width, again)
    optimizer = (torch.optim.SGD if sgd else torch.optim.AdamW)(model.parameters())
    ids = torch.zeros(2, length, dtype=torch.long)
    return autoaccum.Job(model, optimizer, lambda m, b: nn.functional.cross_entropy(m(b).flatten(0, 1), b.flatten()), ids, autocast=torch.bfloat16 if bf16 else None)
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    path = tmp_path_factory.mktemp("what_if") / "train.py"
    path.write_text(JOB)
    return f"{path}:make_job"


def estimated(job, *settings, what_if=False):
    found = estimate_source(parse_source(job, settings), Request(4096), ["2GiB"], what_if=what_if, on_output=lambda _: None)
    return json.loads(json.dumps(found.as_dict()))


def test_a_changed_job_is_what_the_job_changed_by_hand_is_and_the_quickest_comes_first(job):
    told = estimated(job, what_if=True)
    rows = {tuple(row["changes"]): row for row in told["what_if"]["2GiB"]}
    of_bitsandbytes = {("8-bit-optimizer",), ("bf16", "checkpointing", "8-bit-optimizer")}  # LoRA is for Transformers
    assert set(rows) - of_bitsandbytes == {("bf16",), ("fused",), ("checkpointing",), ("bf16", "checkpointing"), ("half-length",)}
    by_hand = {
        ("bf16", "checkpointing"): ("again=True", "bf16=True"),
        ("half-length",): ("length=32",),
    }
    for names, settings in by_hand.items():
        card = estimated(job, *settings)["gpus"][0]
        assert rows[names]["micro_batches"] == card["micro_batches"], names
        assert rows[names]["peak_bytes"] == pytest.approx(card["peak_bytes"], rel=0.01), names
    order = [row["times"] for row in told["what_if"]["2GiB"] if row["fits"]]
    assert order == sorted(order)
    assert len(rows["checkpointing",]["micro_batches"]) < told["gpus"][0]["accumulation_steps"]


def test_where_nothing_fits_the_way_to_traced_changes_is_told_and_works(job):
    asked = ("estimate", job, "-b", 4096, "-g", "180MiB", "--headroom", "1MiB", "--set", "width=1024")
    told = command_line.autoaccum(*asked)
    assert told.returncode == 3 and "--what-if (in Python what_if=True) traces the job with changes that need less memory" in told.stdout
    told = command_line.autoaccum(*asked, "--what-if")
    assert told.returncode == 3, told.stderr
    assert "what if: each traced" in told.stdout and "blocks checkpointed" in told.stdout and "--what-if" not in told.stdout


def test_where_no_sample_fits_the_longest_length_that_does_is_traced(job):
    asked = ("estimate", job, "-b", 64, "-g", "180MiB", "--headroom", "1MiB", "--set", "width=256", "--set", "sgd=True", "--json")
    told = command_line.document(command_line.autoaccum(*asked, "--set", "length=16384", "--what-if"))
    rows = told["what_if"]["180MiB"]
    assert not told["gpus"][0]["fits"] and not any(row["fits"] for row in rows if not row["changes"][-1].startswith("length-"))
    (longest,) = [row for row in rows if row["fits"]]
    percent = int(longest["changes"][-1].removeprefix("length-"))
    assert longest["changes"] == ["bf16", "checkpointing", f"length-{percent}"] and longest["length"] == 16384 * percent // 100
    by_hand = (*asked, "--set", "again=True", "--set", "bf16=True", "--set")
    fits, too_long = (
        command_line.document(command_line.autoaccum(*by_hand, f"length={length}"))["gpus"][0] for length in (longest["length"], longest["length"] + 820)
    )
    assert fits["fits"] and fits["peak_bytes"] == pytest.approx(longest["peak_bytes"], rel=0.01) and not too_long["fits"]


@given(
    whole=st.floats(1.0, 1e12),
    free=st.floats(1.0, 1e12),
    square=st.floats(0.0, 1.0),
    step=st.sampled_from([0.0, 1e3, 2e9, 1e11]),
    knows_half=st.booleans(),
    is_known=st.booleans(),
)
def test_the_longest_length_is_found_in_eight_looks(whole, free, square, step, knows_half, is_known):
    """A peak that grows with the length and with its square, in the steps of an allocator."""

    def excess(percent):
        part = percent / 100
        peak = whole * ((1 - square) * part + square * part * part)
        over = (math.ceil(peak / step) * step if step else peak) - free
        return over if is_known or over < 0 else math.inf

    if excess(100) < 0:
        return
    seen = []
    found = changes.longest(lambda percent: seen.append(percent) or excess(percent), whole=excess(100), half=excess(50) if knows_half else None)
    true = max((percent for percent in range(1, 100) if excess(percent) < 0), default=0)
    assert found <= true <= found + 3 and len(seen) <= 8 and (found in seen or found in (0, 50))


def test_what_the_job_has_already_is_left_out_of_changes_together_and_what_it_cannot_have_with_all_of_them():
    everything = changes.together({})
    assert ("lora", "bf16", "checkpointing") in everything and all(len(names) > 1 for names in everything)
    half = changes.together({"bf16": "the job computes in half precision already"})
    assert ("lora", "checkpointing") in half and not any("bf16" in names for names in half) and len(half) == len(set(half))
    without = changes.together({"lora": "LoRA is tried for models of Transformers", "8-bit-optimizer": "no bitsandbytes"})
    assert without == [("bf16", "checkpointing")]


def test_relative_times_count_forward_and_backward():
    assert changes.times(("checkpointing",), 2.0) == pytest.approx(4 / 3)
    assert changes.times(("lora",), 2.0) == pytest.approx(2 / 3)
    assert changes.times(("lora", "bf16", "checkpointing", "half-length"), 2.0) == pytest.approx(1 / 4)


def test_a_change_that_the_job_has_already_is_left_out_and_an_unknown_one_is_refused():
    told = in_a_process(
        """
from autoaccum.tuner import changes
def refused(job, *names):
    try: changes.changed([job], names)
    except autoaccum.UsageError as error: return str(error)
told = [refused(mlp(autocast=torch.bfloat16), "bf16"), refused(mlp(), "lora"), refused(mlp(), "half-length"), refused(mlp(), "faster")]
told.append(refused(decoder(again=False), "checkpointing"))
tell(told)
"""
    )
    assert "half precision already" in told[0] and "Transformers" in told[1] and "no length" in told[2] and "there is no change" in told[3]
    assert told[4] is None


def test_what_if_asks_for_a_file_and_for_few_cards(job):
    with pytest.raises(autoaccum.UsageError, match="give the job's file"):
        autoaccum.estimate(lambda: None, target_batch=8, gpus="t4", what_if=True)
    told = command_line.autoaccum("estimate", job, "-b", 8, "--all-gpus", "--what-if")
    assert told.returncode == 2 and "name up to four cards" in told.stderr


def test_on_a_device_that_is_here_each_changed_job_is_tuned():
    told = command_line.document(command_line.autoaccum("tune", "tests/jobs.py:small", "-b", 12, "-d", "cpu", "--what-if", "--json", "-q"))
    rows = {tuple(row["changes"]): row for row in told["what_if"]}
    assert set(rows) == {("bf16",), ("fused",), ("8-bit-optimizer",)}  # it has no repeated blocks and no length
    for row in rows.values():
        assert row["fits"] and sum(row["micro_batches"]) == 12 and row["samples_per_second"] > 0 and row["speed"] > 0 and not row["error"], row
    speeds = [row["samples_per_second"] for row in told["what_if"]]
    assert speeds == sorted(speeds, reverse=True)


def test_where_nothing_fits_the_changes_are_told_beside_the_error():
    done = command_line.autoaccum("tune", "tests/jobs.py:hungry", "--set", "mib=60", "-b", 12, "--memory-limit", "300MiB", "-d", "cpu", "--what-if", "-q")
    assert done.returncode == 3 and "one sample does not fit" in done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "what if: each measured here, the quickest first" and {line.split("  ")[1] for line in lines[1:]} == {
        "bfloat16 autocast",
        "a fused optimizer",
    }
    assert all(line.endswith("does not fit") for line in lines[1:])


@pytest.mark.parametrize("words", [("-d", "virtual:t4", "demo"), ("--format", "env", "demo"), ("--", "python", "train.py")])
def test_what_cannot_be_changed_and_measured_here_is_refused(words):
    done = command_line.autoaccum("tune", "-b", 12, "--what-if", *words)
    assert done.returncode == 2 and "--what-if builds a JOB with changes" in done.stderr
