"""A plan in frameworks' words. That the libraries take them is tested where each is."""

import pytest

import autoaccum
from tests.command_line import autoaccum as cli
from tests.command_line import document
from tests.plans import by_hand
from tests.ranked import fleet_plan


def test_the_same_plan_in_four_words():
    plan = by_hand(None, 120, 40)
    assert plan.to_huggingface() == {"per_device_train_batch_size": 40, "gradient_accumulation_steps": 3}
    assert plan.to_accelerate() == {"gradient_accumulation_steps": 3} and plan.to_lightning() == {"accumulate_grad_batches": 3}
    assert plan.to_deepspeed() == {"train_batch_size": 120, "train_micro_batch_size_per_gpu": 40, "gradient_accumulation_steps": 3}


def test_unequal_micro_batches_are_refused_with_what_would_do():
    with pytest.raises(autoaccum.PlanError) as raised:
        by_hand(None, 512, 40).to_huggingface()
    assert "512 = 40 x 5 + 39 x 8 are not" in str(raised.value) and "equal=True (--equal), which gives 32 x 16" in str(raised.value)
    with pytest.raises(autoaccum.PlanError, match="127 is prime; near targets that divide: 125 = 25 x 5 and 128 = 32 x 4"):
        by_hand(None, 127, 40).to_deepspeed()


def test_ranks_with_shares_of_their_own_are_refused():
    with pytest.raises(autoaccum.PlanError, match="the same micro-batches on every rank"):
        fleet_plan(0, 3, [70, 35, 15], [35, 35, 4]).to_lightning()
    assert fleet_plan(1, 3, [40, 40, 40], [20, 20, 20]).to_deepspeed() == {
        "train_batch_size": 120,
        "train_micro_batch_size_per_gpu": 20,
        "gradient_accumulation_steps": 2,
    }


def test_on_the_command_line_formats_imply_equal_micro_batches():
    asked = ("tune", "demo", "-b", 23, "--max-micro-batch", 8, "-d", "cpu", "-q")
    assert document(cli(*asked, "--format", "deepspeed")) == {"train_batch_size": 23, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 23}
    finished = cli("tune", "demo", "-b", 24, "--max-micro-batch", 10, "-d", "cpu", "-q", "--format", "lightning")
    assert document(finished) == {"accumulate_grad_batches": 3} and "the DataLoader's batch_size is 8" in finished.stderr
    for words, said in (
        (("tune", "-b", 120, "--format", "huggingface"), "say `demo` as JOB"),
        (("tune", "demo", "-b", 120, "--format", "huggingface", "--json"), "both say how to print"),
        (("train", "demo", "-b", 120, "--format", "huggingface"), "train prints text or json"),
        (("tune", "demo", "-b", 120, "--plot", "search.gif"), "a picture is a .png, .svg or .pdf"),
        (("tune", "demo", "-b", 120, "--objective", "throughput", "--largest"), "two questions"),
    ):
        finished = cli(*words)
        assert finished.returncode == 2 and said in finished.stderr and not finished.stdout.startswith("120")
