"""What was built by reading torch's sources and the driver's documents, on a real card. Run with `pytest -m gpu`."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import autoaccum
from autoaccum import devices
from tests.command_line import ROOT
from tests.command_line import autoaccum as run

pytestmark = pytest.mark.gpu
GIB = 2**30


def classes(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def perceptron(**compiled):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 10)).cuda()
    trained = torch.compile(model, **compiled) if compiled else model
    return autoaccum.Job(trained, torch.optim.SGD(model.parameters(), lr=0.1), classes, (torch.randn(8, 64), torch.arange(8) % 10)), model


def trained(job, count=5):
    plan = autoaccum.tune(job, target_batch=24, max_micro_batch=6)
    loop, generator = autoaccum.Accumulator(job, plan), torch.Generator().manual_seed(1)
    return [loop.step((torch.randn(24, 64, generator=generator), torch.randint(0, 10, (24,), generator=generator))).loss for _ in range(count)]


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_cuda_graphs_train_as_eager_mode_does(mode):
    """A graph's pool would own the gradients: https://github.com/pytorch/pytorch/issues/169545"""
    (eager, plain), (job, model) = perceptron(), perceptron(mode=mode)
    losses = trained(eager)
    assert trained(job) == pytest.approx(losses, rel=1e-4)
    assert all(torch.allclose(ours, theirs, atol=1e-5) for ours, theirs in zip(model.parameters(), plain.parameters()))


def test_what_make_graphed_callables_captured_trains_as_eager_mode_does():
    (eager, plain), (job, model) = perceptron(), perceptron()
    losses = trained(eager)
    plan = autoaccum.tune(job, target_batch=24, max_micro_batch=6, equal=True)
    torch.cuda.make_graphed_callables(model, (torch.randn(plan.micro_batch, 64, device="cuda"),))
    loop, generator = autoaccum.Accumulator(job, plan), torch.Generator().manual_seed(1)
    ours = [loop.step((torch.randn(24, 64, generator=generator), torch.randint(0, 10, (24,), generator=generator))).loss for _ in range(5)]
    assert ours == pytest.approx(losses, rel=1e-4)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(model.parameters(), plain.parameters()))


def test_a_fraction_of_the_callers_own_is_a_limit_and_is_there_afterwards():
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(4 * GIB / total)
    try:
        job, _ = perceptron()
        plan = autoaccum.tune(job, target_batch=24)
        assert plan.budget_bytes <= 4 * GIB
        assert torch.cuda.get_per_process_memory_fraction(0) == pytest.approx(4 * GIB / total)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def convolutions():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
    )
    return autoaccum.Job(model.cuda(), torch.optim.SGD(model.parameters(), lr=0.01), classes, (torch.randn(8, 3, 112, 112), torch.arange(8) % 10))


def test_benchmark_mode_condemns_no_size_that_trains():
    """cuDNN's search takes what is free, once for each size; the plan needs no step more than two beyond that without it."""
    plans = []
    for is_on in (False, True):
        torch.backends.cudnn.benchmark = is_on
        try:
            plans.append(autoaccum.tune(convolutions(), target_batch=512, memory_limit="6GiB"))
        finally:
            torch.backends.cudnn.benchmark = False
    without, with_search = plans
    assert with_search.accumulation_steps <= without.accumulation_steps + 2
    assert any("cudnn.benchmark is on" in warning for warning in with_search.warnings)


def test_a_pinned_batch_may_be_written_to_when_step_has_returned():
    job, model = perceptron()
    other, theirs = perceptron()
    plan = autoaccum.tune(job, target_batch=24_000, max_micro_batch=6000)
    loops = autoaccum.Accumulator(job, plan), autoaccum.Accumulator(other, plan)
    batch = torch.randn(24_000, 64), torch.randint(0, 10, (24_000,))
    for _ in range(5):
        pinned = tuple(each.pin_memory() for each in batch)
        loops[0].step(pinned)
        pinned[0].fill_(1e6)
        loops[1].step(batch)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), theirs.parameters()))


ASSERTS = """
import torch, autoaccum
model = torch.nn.Embedding(4, 1).cuda()
def loss(model, batch):
    return model(batch + (100 if len(batch) > 4 else 0)).mean()
autoaccum.tune(autoaccum.Job(model, torch.optim.SGD(model.parameters(), lr=0.1), loss, torch.zeros(4, dtype=torch.long)), target_batch=64)
"""


def test_a_device_assert_ends_with_the_jobs_own_exception_last():
    done = subprocess.run([sys.executable, "-c", ASSERTS], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-6:]
    assert any("device-side assert" in line for line in last) or any("autoaccum: raised in" in line for line in last), done.stderr[-2000:]


SCRIPT = """
import os, sys
os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
import torch
model = torch.nn.Linear(1, 1).cuda()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
kept = torch.empty(int(sys.argv[1]) * 2**30, dtype=torch.uint8, device="cuda")
model(torch.ones(1, 1, device="cuda")).sum().backward()
optimizer.step()
"""


def test_a_command_that_sets_the_allocator_itself_is_capped(tmp_path):
    """One GiB a sample under a limit of 5: at most 4 and the context."""
    (tmp_path / "train.py").write_text(SCRIPT)
    words = ["tune", "-b", "8", "-d", "cuda:0", "--memory-limit", "5GiB", "--json", "--", sys.executable, str(tmp_path / "train.py"), "{micro_batch}"]
    plan = json.loads(run(*words).stdout)
    assert plan["micro_batch"] == 4 and plan["peak_bytes"] >= 4 * GIB


def test_the_context_is_measured_where_nvml_hides_our_process():
    """A process of its own, which has no context yet."""
    code = (
        "from autoaccum.devices import nvml; from dataclasses import replace; ask = nvml.ask; nvml.ask = lambda *a: replace(ask(*a), ours_bytes=None)\n"
        "from autoaccum import devices; d = devices.get('cuda:0'); d.prepare(); print(d.memory().outside_bytes)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert 100 * 2**20 < int(done.stdout) < 2 * GIB


def test_memory_is_read_from_a_mig_slice_by_its_own_id():
    if "MIG" not in torch.cuda.get_device_name(0):
        pytest.skip("needs a MIG slice, and this is a whole card")
    device = devices.get("cuda:0")
    assert device.memory().total_bytes == torch.cuda.mem_get_info(0)[1] and device.facts.uuid
