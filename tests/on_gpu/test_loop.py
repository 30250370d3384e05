"""The loop on a real CUDA card: fed from the host, fp16 with a scaler, a real out-of-memory rescued. Run with `pytest -m gpu`."""

import copy
import gc

import pytest
import torch
from torch import nn

import autoaccum
from autoaccum.data import prefetch
from autoaccum.data.windows import Window
from tests.plans import by_hand

pytestmark = pytest.mark.gpu
MIB = 2**20
CUDA = "cuda"


def plan(jobs, target, micro_batch):
    import dataclasses

    from autoaccum.plan.record import PlannedDevice

    return dataclasses.replace(by_hand(jobs, target, micro_batch), device=PlannedDevice("cuda", "card", None, 0, 0, 0), budget_bytes=2**40)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 4))


def mse(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def pairs(samples):
    return torch.randn(samples, 64), torch.randn(samples, 4)


@pytest.mark.parametrize("pinned", [False, True])
def test_what_is_fed_ahead_arrives_whole_and_in_order(pinned):
    batch = torch.arange(4_000_000.0).view(40, -1), [f"text {index}" for index in range(40)]
    batch = (batch[0].pin_memory() if pinned else batch[0], batch[1])
    cut = Window.of([batch]).cut((16, 16, 8))
    device = torch.device("cuda:0")
    seen = []
    for (inputs, texts), samples in prefetch.feed(cut, device):
        assert inputs.device == device and len(texts) == samples
        torch.cuda._sleep(20_000_000)  # the copy of the next one runs meanwhile
        seen.append((inputs * 1).cpu())
    assert torch.equal(torch.cat(seen), batch[0])


def test_gradients_are_those_of_the_whole_batch_in_double_precision():
    model = network().double().cuda()
    batch = tuple(each.double() for each in pairs(120))
    expected = torch.autograd.grad(mse(model, tuple(each.cuda() for each in batch)), model.parameters())

    class Recorder(torch.optim.SGD):
        def step(self, closure=None):
            self.last = [p.grad.clone() for group in self.param_groups for p in group["params"]]

    optimizer = Recorder(model.parameters(), lr=0.0)
    autoaccum.Accumulator(model, optimizer, plan(None, 120, 50)).step(batch, mse)
    for a, b in zip(expected, optimizer.last):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_fp16_with_a_scaler_skips_the_window_with_an_inf_and_no_other():
    model = network().cuda()
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    job = autoaccum.Job(model, torch.optim.AdamW(model.parameters(), fused=True), mse, pairs(8), scaler=scaler, autocast=torch.float16, max_grad_norm=1.0)
    loop = autoaccum.Accumulator(job, plan(job, 60, 20))
    bad = pairs(60)
    bad[0][45, 3] = float("inf")
    before = [p.clone() for p in model.parameters()]
    assert loop.step(bad).skipped and all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert scaler.get_scale() == 512.0
    assert not loop.step(pairs(60)).skipped and not torch.equal(before[0], next(model.parameters()))


class Hungry(nn.Module):
    """Takes 8 MiB a sample between forward and backward."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.2)

    def forward(self, inputs):
        hidden = self.drop(self.norm(inputs)).mean(dim=1)
        return (hidden[:, None] + self.weight * torch.ones(len(inputs), 2 * MIB, device=inputs.device)).exp().mean()


def test_a_real_out_of_memory_is_rescued_exactly_and_memory_is_back():
    gc.collect()
    torch.cuda.empty_cache()
    torch.manual_seed(0)
    model = Hungry().cuda()
    twin = copy.deepcopy(model)
    data = [torch.randn(64, 4) for _ in range(4)]
    total = torch.cuda.get_device_properties(0).total_memory

    def trained(model, sizes, cap):
        torch.manual_seed(5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        results = []
        try:
            for number, batch in enumerate(data):
                if cap and number == 2:
                    torch.cuda.set_per_process_memory_fraction(700 * MIB / total)
                    torch.cuda.empty_cache()
                if number == 0 or not cap:
                    loop = autoaccum.Accumulator(model, optimizer, plan(None, 64, sizes[number]))
                results.append(loop.step(batch, lambda model, batch: model(batch)))
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return results

    results = trained(model, [64], cap=True)
    assert [each.rescued is not None for each in results] == [False, False, True, False]
    assert results[2].rescued.kept_bytes < 16 * MIB
    trained(twin, [-(-64 // each.micro_batches) for each in results], cap=False)
    for a, b in zip(model.state_dict().values(), twin.state_dict().values()):
        assert torch.equal(a, b)


def test_500_windows_reserve_no_more_than_50():
    model = network().cuda()
    loop = autoaccum.Accumulator(model, torch.optim.Adam(model.parameters()), plan(None, 240, 60))
    for number in range(550):
        if number == 50:
            reserved = torch.cuda.memory_reserved()
        loop.step(pairs(240), mse)
    assert torch.cuda.memory_reserved() == reserved
