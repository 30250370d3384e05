"""The same promises on a real CUDA card, under a capped budget. Run with `pytest -m gpu`."""

import gc
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import autoaccum
from tests import jobs
from tests.command_line import autoaccum as run
from tests.command_line import document
from tests.digest import digest

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parent.parent.parent
GIB = 2**30


@pytest.fixture(autouse=True)
def empty_card():
    gc.collect()
    torch.cuda.empty_cache()
    yield
    gc.collect()
    torch.cuda.empty_cache()


def conv_job(dtype=None, scaler=False):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.Dropout(0.1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    ).cuda()  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    batch = torch.randn(8, 3, 112, 112), torch.randint(0, 10, (8,))
    return autoaccum.Job(model, optimizer, loss, batch, autocast=dtype, scaler=torch.amp.GradScaler("cuda") if scaler else None)


MODES = [(None, False), (torch.bfloat16, False), (torch.float16, True)]


@pytest.mark.parametrize(("dtype", "scaler"), MODES)
def test_the_plan_survives_200_windows_without_retries_under_the_same_cap(dtype, scaler):
    job = conv_job(dtype, scaler)
    plan = autoaccum.tune(job, target_batch=500, memory_limit="6GiB")
    assert 1 < plan.accumulation_steps < 500 and plan.peak_bytes <= plan.budget_bytes
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((plan.budget_bytes + plan.headroom_bytes) / total)
    try:
        before = torch.cuda.memory_stats()
        loop = autoaccum.Accumulator(job, plan)
        batch = job.batch_of(plan.share)
        for _ in range(200):
            loop.step(batch)
        after = torch.cuda.memory_stats()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert after["num_ooms"] == before["num_ooms"] and after["num_alloc_retries"] == before["num_alloc_retries"]
    assert torch.cuda.max_memory_reserved() <= plan.budget_bytes + plan.headroom_bytes


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize(("dtype", "scaler"), MODES)
def test_nothing_is_changed_on_the_card(stepped, dtype, scaler):
    job = conv_job(dtype, scaler)
    if stepped:
        plan = autoaccum.tune(job, target_batch=8)
        autoaccum.Accumulator(job, plan).step(job.batch)
    others = [job.optimizer] + ([job.scaler] if scaler else [])
    before = digest(job.model, *others), torch.cuda.get_rng_state_all()[0].tolist()
    plan = autoaccum.tune(job, target_batch=500, memory_limit="4GiB")
    assert any(each.outcome != "fits" for each in plan.trials)  # an out-of-memory was among the trials
    assert (digest(job.model, *others), torch.cuda.get_rng_state_all()[0].tolist()) == before


def test_the_cap_is_what_it_was():
    getter = getattr(torch.cuda, "get_per_process_memory_fraction", None)
    if getter is None:
        pytest.skip("this torch cannot say the fraction: torch.cuda.get_per_process_memory_fraction is missing")
    torch.cuda.set_per_process_memory_fraction(0.5)
    try:
        autoaccum.tune(conv_job(), target_batch=16)
        assert getter() == pytest.approx(0.5)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_the_answer_has_the_fewest_steps():
    """One step fewer runs out when it is rehearsed by itself."""
    plan = autoaccum.tune(conv_job(), target_batch=512, memory_limit="5GiB")
    fewer = math.ceil(512 / (plan.accumulation_steps - 1))
    again = autoaccum.tune(conv_job(), target_batch=512, memory_limit="5GiB", max_micro_batch=fewer)
    assert again.accumulation_steps == plan.accumulation_steps


def test_nothing_fits_and_the_users_own_error_on_the_card():
    with pytest.raises(autoaccum.NothingFits):
        autoaccum.tune(conv_job(), target_batch=8, memory_limit="900MiB", headroom=0)
    job = conv_job()
    wrong = autoaccum.Job(job.model, job.optimizer, lambda m, b: jobs.mse(m, (b[0], b[1].float())), job.batch)
    with pytest.raises(RuntimeError) as raised:
        autoaccum.tune(wrong, target_batch=8)
    assert any("at a micro-batch of 2" in note for note in raised.value.__notes__)


def test_the_command_line_on_the_card():
    told = document(run("tune", "examples/tiny_gpt.py:make_job", "-b", 500, "-d", "cuda:0", "--memory-limit", "4GiB", "--json"))
    assert told["device"]["kind"] == "cuda" and sum(told["micro_batches"]) == 500 and told["peak_bytes"] <= told["budget_bytes"]
    listed = json.loads(run("devices", "--json").stdout)["devices"][0]
    assert listed["kind"] == "cuda" and 0 < listed["free_bytes"] <= listed["total_bytes"]
