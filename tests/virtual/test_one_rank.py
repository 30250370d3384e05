"""One rank of several, simulated: FSDP2 beside torch's own on the CPU, the others by what they hold."""

import json
import math

import pytest

from tests import command_line, forked
from tests.command_line import document
from tests.virtual.live_ranks import MODELS, WORLD

DEMO = "examples/tiny_gpt.py:make_job"


def live(engine, model):
    """Bytes that are live, at most, in each phase of two windows."""
    finished = forked.run("tests/virtual/live_ranks.py", engine, model, timeout=150)
    assert finished.returncode == 0, finished.stderr[-2000:]
    return json.loads(finished.stdout.splitlines()[-1])


@pytest.mark.parametrize("model", MODELS)
def test_a_sharded_rank_holds_what_torchs_own_holds_in_every_phase(model):
    """Blocks, one piece, and frozen blocks; parts are padded where a dimension does not divide."""
    real, ours = live("real", model), live("fsdp2", model)
    assert set(real) <= set(ours)
    for phase, held in real.items():
        assert abs(ours[phase] - held) <= 2048, phase  # when a batch and a few scalars go
    if model == "blocks":  # a few blocks are gathered at a time, never all
        whole = 4 * sum(each.numel() for each in MODELS[model]().parameters())
        assert ours["0.0.forward"] < whole + whole // WORLD


def test_the_buckets_of_ddp_are_a_second_copy_of_the_gradients():
    alone, ours = live("none", "blocks"), live("ddp", "blocks")
    gradients = 4 * sum(each.numel() for each in MODELS["blocks"]().parameters())
    for phase in ("0.0.forward", "1.0.backward", "1.1.backward", "1.1.step"):
        assert abs(ours[phase] - alone[phase] - gradients) <= 512, phase


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_holds_its_parts_and_buckets(stage):
    """By DeepSpeed's own rules: a part of weights in single precision and of each state; of the gradients from stage 2 on; buckets of 5e8 numbers."""
    parameters = sum(each.numel() for each in MODELS["blocks"]().parameters())
    part, weights, bucket = 4 * math.ceil(parameters / WORLD), 4 * parameters, 4 * 500_000_000
    ours = live(f"zero{stage}", "blocks")
    resident = weights + part + (part + bucket if stage == 3 else 0)
    assert abs(ours["1.0.end"] - resident - 2 * part) <= 20_000  # and Adam's two
    gradients = weights if stage == 1 else part  # of the first micro-batch, beside those that the second one is making
    held = ours["2.1.forward"] - ours["1.0.end"] - gradients
    assert 0 <= held < 100_000
    assert (ours["2.0.backward"] > bucket) and (ours["1.0.end"] > bucket) is (stage == 3)


def test_a_target_over_ranks_is_estimated_for_the_largest_share_and_said():
    finished = command_line.autoaccum("estimate", DEMO, "-b", 515, "-g", "600MiB", "--headroom", "10MiB", "--world", 4, "--json")
    (estimate,) = document(finished)["gpus"]
    assert {name: document(finished)[name] for name in ("target_batch", "world", "shard", "share")} == {
        "target_batch": 515,
        "world": 4,
        "shard": "ddp",
        "share": 129,
    }
    assert sum(estimate["micro_batches"]) == 129 and any(each.startswith("ddp: ") for each in estimate["warnings"])
    alone = document(command_line.autoaccum("estimate", DEMO, "-b", 129, "-g", "600MiB", "--headroom", "10MiB", "--json"))["gpus"][0]
    assert estimate["breakdown"]["gradients"] > alone["breakdown"]["gradients"] and estimate["peak_bytes"] != alone["peak_bytes"]
    text = command_line.autoaccum("estimate", DEMO, "-b", 515, "-g", "t4", "--world", 4, "--shard", "fsdp2").stdout
    assert text.startswith(f"515 samples a step of {DEMO} over 4 ranks (fsdp2), 129 on each, simulated at")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["-b", 5, "--world", 8], "a target batch of 5 over 8 ranks leaves some without a sample"),
        (["-b", 64, "--shard", "fsdp2"], "divides the state over ranks: say how many with world"),
        (["-b", 64, "--world", 4, "--shard", "fsdp"], "shard must be one of ddp, fsdp2, zero1, zero2, zero3, not 'fsdp'"),
        (["-b", 64, "--world", 0], "world must be a number of ranks, at least 1, not 0"),
    ],
)
def test_what_is_no_sharded_job_is_said_in_a_sentence(words, says):
    finished = command_line.autoaccum("estimate", DEMO, "-g", "t4", *words)
    assert finished.returncode == 2 and says in finished.stderr and not finished.stdout


def test_a_model_that_fsdp2_refuses_is_said_and_the_way_out_works(tmp_path):
    """It refuses a list of modules that has no forward of its own."""
    (tmp_path / "job.py").write_text(
        "import autoaccum, torch\n\ndef make_job():\n    model = torch.nn.ModuleList([torch.nn.Linear(4, 1)])\n"
        "    return autoaccum.Job(model, torch.optim.SGD(model.parameters()), lambda model, batch: model[0](batch).mean(), torch.zeros(4, 4))\n"
    )
    words = ["estimate", f"{tmp_path}/job.py:make_job", "-b", 64, "-g", "t4", "--world", 2, "--shard"]
    refused = command_line.autoaccum(*words, "fsdp2")
    assert refused.returncode != 0 and "FSDP2 cannot shard this model: " in refused.stderr and "shard=ddp" in refused.stderr
    assert command_line.autoaccum(*words, "ddp").returncode == 0


def test_in_python_it_is_a_keyword():
    program = (
        "import autoaccum; found = autoaccum.estimate('examples/tiny_gpt.py:make_job', target_batch=64, gpus='t4', world=8, shard='zero1'); "
        "print(found.world, found.shard, found.gpus[0].micro_batches)"
    )
    finished = forked.run(program)
    assert finished.stdout.splitlines()[-1] == "8 zero1 (8,)", finished.stderr
