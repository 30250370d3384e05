"""Exactness in fp64 against the whole batch at once."""

import collections
import copy
import dataclasses

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch.utils.data import DataLoader

import autoaccum
from autoaccum.data import batches
from autoaccum.errors import JobError
from autoaccum.plan import arithmetic
from autoaccum.window import accumulation, weights
from autoaccum.window.job import Job
from tests import jobs
from tests.devices.fresh import fresh
from tests.plans import by_hand

MIB = 2**20
CPU = torch.device("cpu")


class Recorder(torch.optim.SGD):
    """Keeps the gradients it stepped with."""

    def step(self, closure=None):
        self.stepped = [p.grad.clone() for group in self.param_groups for p in group["params"]]
        return super().step(closure)


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)).double()


def mean_loss(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def token_loss(model, batch):
    """A sum over labels that count, and how many they are."""
    inputs, targets, counts = batch
    per_sample = (model(inputs) - targets).square().mean(dim=1)
    return (per_sample * counts).sum(), counts.sum()


def data(samples):
    torch.manual_seed(samples)
    return torch.randn(samples, 5).double(), torch.randn(samples, 2).double()


def gradients(loss, batch, sizes, **given):
    model = network()
    optimizer = Recorder(model.parameters(), lr=0.1)
    job = Job(model, optimizer, loss, batch, **given)
    ran = accumulation.run(job, loss, list(zip(batches.split(batch, sizes), sizes)), samples=sum(sizes), device=CPU)
    return optimizer.stepped, ran, model


SPLITS = [*(arithmetic.micro_batches(n, k) for n in range(1, 33) for k in range(1, n + 1)), (40, 40, 40), (50, 50, 20), (32, 32, 32, 31), (20, 50, 50)]


def test_every_split_gives_the_gradient_of_the_whole_batch():
    for sizes in SPLITS:
        batch = data(sum(sizes))
        whole, split = gradients(mean_loss, batch, (sum(sizes),)), gradients(mean_loss, batch, sizes)
        for a, b in zip(whole[0], split[0]):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(whole[1].loss, split[1].loss, rtol=1e-12, atol=0)


def test_a_wrong_weight_would_be_seen(monkeypatch):
    """Weighting by steps instead of samples, as most loops do, fails the test above."""
    right = weights.contribution
    monkeypatch.setattr(weights, "contribution", lambda returned, **_: right(returned, samples=1, of_samples=3))
    batch = data(120)
    whole, split = gradients(mean_loss, batch, (50, 50, 20))[0], torch.autograd.grad(mean_loss(model := network(), batch), model.parameters())
    assert not torch.allclose(whole[0], split[0], rtol=1e-3)


@pytest.mark.parametrize("known_beforehand", [False, True])
@pytest.mark.parametrize("sizes", [(40, 40, 40), (50, 50, 20), (32, 32, 32, 31), (1, 5)])
def test_sums_are_divided_by_the_count_of_the_whole_window(sizes, known_beforehand):
    samples = sum(sizes)
    counts = torch.randint(1, 30, (samples,)).double()
    batch = (*data(samples), counts)
    stepped, ran, _ = gradients(token_loss, batch, sizes, count=(lambda piece: piece[2].sum()) if known_beforehand else None)
    model = network()
    loss_sum, total = token_loss(model, batch)
    expected = torch.autograd.grad(loss_sum / total, model.parameters())
    for a, b in zip(expected, stepped):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(ran.loss, (loss_sum / total).detach(), rtol=1e-12, atol=0)


def test_the_gradient_is_clipped_once_as_a_whole():
    batch = data(50)
    model = network()
    mean_loss(model, batch).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    stepped, ran, _ = gradients(mean_loss, batch, (20, 20, 10), max_grad_norm=0.01)
    torch.testing.assert_close(ran.grad_norm, norm, rtol=1e-12, atol=0)
    for parameter, grad in zip(model.parameters(), stepped):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-12, atol=1e-15)


def test_an_inf_in_one_micro_batch_skips_the_whole_window():
    model = network().float()
    before = [p.clone() for p in model.parameters()]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    job = Job(model, torch.optim.SGD(model.parameters(), lr=0.1), mean_loss, (), scaler=scaler)
    inputs, targets = (each.float() for each in data(9))
    inputs[7, 0] = float("inf")
    sizes = (3, 3, 3)
    ran = accumulation.run(job, mean_loss, zip(batches.split((inputs, targets), sizes), sizes), samples=9, device=CPU, scaler=scaler)
    assert ran.skipped and scaler.get_scale() == 512.0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert all(p.grad is None for p in model.parameters())


def test_a_scaler_changes_no_gradient():
    batch = tuple(each.float() for each in data(30))
    results = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**10)):
        model = network().float()
        job = Job(model, torch.optim.SGD(model.parameters(), lr=0.1), mean_loss, (), max_grad_norm=0.05)
        ran = accumulation.run(job, mean_loss, zip(batches.split(batch, (20, 10)), (20, 10)), samples=30, device=CPU, scaler=scaler)
        results.append((ran.grad_norm, [p.detach() for p in model.parameters()]))
    torch.testing.assert_close(results[0], results[1])


def test_what_only_the_optimizer_holds_gets_the_right_gradient_too():
    """A learned weight beside the model, under a loss that is a sum."""
    model, scale = network(), torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = Recorder([*model.parameters(), scale], lr=0.0)

    def loss(model, batch):
        return (scale * (model(batch[0]) - batch[1])).square().sum(), len(batch[0])

    batch = data(30)
    accumulation.run(Job(model, optimizer, loss, batch), loss, zip(batches.split(batch, (20, 10)), (20, 10)), samples=30, device=CPU)
    expected = torch.autograd.grad(loss(model, batch)[0] / 30, scale)[0]
    torch.testing.assert_close(optimizer.stepped[-1], expected, rtol=1e-12, atol=0)


def test_a_window_in_which_nothing_counts_has_no_gradient():
    model = network()
    optimizer = Recorder(model.parameters(), lr=0.0)
    accumulation.run(Job(model, optimizer, mean_loss, ()), lambda m, b: (m(b[0]).sum() * 0, 0), [(data(4), 4)], samples=4, device=CPU)
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in optimizer.stepped)


def test_gradients_that_someone_left_are_not_added():
    batch = data(12)
    clean = gradients(mean_loss, batch, (12,))[0]
    model = network()
    optimizer = Recorder(model.parameters(), lr=0.1)
    mean_loss(model, batch).backward()
    accumulation.run(Job(model, optimizer, mean_loss, batch), mean_loss, [(batch, 12)], samples=12, device=CPU)
    for a, b in zip(clean, optimizer.stepped):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (lambda model, batch: model(batch[0]), "shape"),
        (lambda model, batch: mean_loss(model, batch).detach(), "needs no gradient"),
        (lambda model, batch: 0.5, "returned a float"),
        (lambda model, batch: None, "returned a NoneType"),
    ],
)
def test_a_loss_of_the_wrong_kind_is_told_with_the_remedy(loss, says):
    with pytest.raises(JobError, match=says):
        gradients(loss, data(4), (2, 2))


def test_22_samples_in_micro_batches_of_4_end_with_the_right_tail():
    """Sample i's gradient is i. Windows of 16: the last one is 17 to 22, whose mean is 19.5; others give 10.0 or 20.0."""
    model = nn.Linear(1, 1, bias=False).double()
    optimizer = Recorder(model.parameters(), lr=0.0)
    loop = autoaccum.Accumulator(model, optimizer, by_hand(None, 16, 4))
    loader = DataLoader(torch.arange(1.0, 23).double().unsqueeze(1), batch_size=4)
    seen = []
    for each in by_hand(None, 16, 4).windows(loader):
        loop.step(each, lambda model, batch: model(batch).mean())
        seen.append(float(optimizer.stepped[0]))
    assert seen == [8.5, 19.5]


def test_three_equal_pieces_give_the_gradient_once_and_not_three_times():
    model = nn.Linear(1, 1, bias=False).double()
    optimizer = Recorder(model.parameters(), lr=0.0)
    accumulation.run(
        Job(model, optimizer, mean_loss, ()), lambda model, batch: model(batch).mean(), [(torch.ones(2, 1).double(), 2)] * 3, samples=6, device=CPU
    )
    assert float(optimizer.stepped[0]) == 1.0


def test_lbfgs_takes_the_steps_it_takes_on_the_whole_batch():
    batch = data(30)

    def trained(sizes):
        model = network()
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=6, history_size=4, line_search_fn="strong_wolfe")
        job = Job(model, optimizer, mean_loss, batch)
        losses = []
        for _ in range(3):
            pieces = list(zip(batches.split(batch, sizes), sizes))
            losses.append(float(accumulation.run(job, mean_loss, pieces, samples=30, device=CPU).loss))
        return losses, list(model.parameters())

    (losses, split), (whole_losses, whole) = trained((12, 12, 6)), trained((30,))
    assert losses == pytest.approx(whole_losses, rel=1e-9) and losses[2] < losses[0]
    for a, b in zip(split, whole):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_the_first_evaluation_of_a_closure_is_made_once_and_before_the_step():
    model = network()
    job = Job(model, torch.optim.LBFGS(model.parameters(), max_iter=1, max_eval=1), mean_loss, ())
    phases = []
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(phases[-1]))
    accumulation.run(job, mean_loss, [(data(4), 4)], samples=4, device=CPU, on_phase=lambda phase, index: phases.append(phase))
    assert forwards == ["forward"] and phases == ["forward", "backward", "clip", "step"]


def test_an_optimizer_that_steps_in_a_backward_hook_is_refused():
    job = jobs.small()
    for parameter in job.model.parameters():
        own = torch.optim.SGD([parameter], lr=0.1)
        parameter.register_post_accumulate_grad_hook(lambda _, own=own: own.step())
    before = [p.clone() for p in job.model.parameters()]
    loop = autoaccum.Accumulator(job, by_hand(job, 12, 4))
    with pytest.raises(JobError, match="SGD steps in a backward hook"):
        loop.step(jobs.pairs(12))
    with pytest.raises(JobError, match="SGD steps in a backward hook"):
        autoaccum.tune(job, target_batch=12)
    assert all(torch.equal(a, b) for a, b in zip(before, job.model.parameters()))


def test_of_several_optimizers_none_steps_where_one_finds_an_inf():
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2))
    before = [p.clone() for p in model.parameters()]
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    job = Job(model, [torch.optim.SGD(part.parameters(), lr=0.1) for part in model], mean_loss, (), scaler=scaler)

    def loss(model, batch):
        return mean_loss(model, batch) + model[1].bias[0] * float("inf") * 0 if batch[0][0, 0] > 50 else mean_loss(model, batch)

    inputs, targets = (each.float() for each in data(6))
    inputs[4, 0] = 100.0
    sizes = (2, 2, 2)
    ran = accumulation.run(job, loss, list(zip(batches.split((inputs, targets), sizes), sizes)), samples=6, device=CPU, scaler=scaler)
    assert ran.skipped and scaler.get_scale() == 8.0 and all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    inputs[4, 0] = 0.0
    assert not accumulation.run(job, loss, [((inputs, targets), 6)], samples=6, device=CPU, scaler=scaler).skipped
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_the_scheduler_does_not_count_a_skipped_window():
    job = jobs.small(scaler=torch.amp.GradScaler("cpu", init_scale=16.0))
    scheduler = torch.optim.lr_scheduler.StepLR(job.optimizer, 1, gamma=0.5)
    job = dataclasses.replace(job, scheduler=scheduler)
    loop = autoaccum.Accumulator(job, by_hand(job, 12, 4))
    bad = jobs.pairs(12)
    bad[0][7, 2] = float("inf")
    assert [loop.step(batch).skipped for batch in (jobs.pairs(12), bad, jobs.pairs(12))] == [False, True, False]
    assert scheduler.last_epoch == 2


def checkpointed(model, batch):
    hidden = torch.utils.checkpoint.checkpoint(model[:2], batch[0], use_reentrant=False)
    return nn.functional.mse_loss(model[2:](hidden), batch[1])


def reentrant(model, batch):
    hidden = torch.utils.checkpoint.checkpoint(model[:2], batch[0].requires_grad_(), use_reentrant=True)
    return nn.functional.mse_loss(model[2:](hidden), batch[1])


def compiled(model, batch):
    return mean_loss(torch.compile(model, backend="aot_eager"), batch)


@pytest.mark.parametrize("loss", [checkpointed, reentrant, compiled])
def test_checkpointing_and_compiling_change_no_gradient(loss):
    batch = data(30)
    stepped, _, _ = gradients(loss, batch, (12, 12, 6))
    model = network()
    expected = torch.autograd.grad(mean_loss(model, data(30)), model.parameters())
    for a, b in zip(expected, stepped):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def test_channels_last_parameter_groups_and_parameters_that_get_no_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).double().to(memory_format=torch.channels_last)
    model.unused = nn.Parameter(torch.ones(3).double())
    model[4].bias.requires_grad_(False)
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": [*model[4].parameters(), model.unused], "lr": 0.01, "weight_decay": 0.1}]
    job = Job(model, torch.optim.AdamW(groups, fused=True), mean_loss, (), max_grad_norm=0.5)
    twin = copy.deepcopy(model)
    theirs = torch.optim.AdamW([{"params": twin[0].parameters(), "lr": 0.1}, {"params": [*twin[4].parameters(), twin.unused], "lr": 0.01, "weight_decay": 0.1}])
    batch = torch.randn(10, 3, 8, 8).double().to(memory_format=torch.channels_last), torch.randn(10, 2).double()
    for _ in range(3):
        accumulation.run(job, mean_loss, list(zip(batches.split(batch, (4, 4, 2)), (4, 4, 2))), samples=10, device=CPU)
        mean_loss(twin, batch).backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        theirs.step()
        theirs.zero_grad()
    for a, b in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_on_in_forward_and_its_gradients_are_those_of_the_whole_batch(dtype):
    seen = []

    def loss(model, batch):
        out = model(batch[0])
        seen.append(out.dtype)
        return nn.functional.mse_loss(out.float(), batch[1])

    batch = tuple(each.float() for each in data(32))
    results = []
    for sizes in ((32,), (12, 12, 8)):
        model = network().float()
        optimizer = Recorder(model.parameters(), lr=0.1)
        job = Job(model, optimizer, loss, batch, autocast=dtype)
        accumulation.run(job, loss, list(zip(batches.split(batch, sizes), sizes)), samples=32, device=CPU)
        results.append(torch.cat([grad.flatten() for grad in optimizer.stepped]))
    assert set(seen) == {dtype}
    assert (results[0] - results[1]).norm() < 2e-2 * results[0].norm()


@dataclasses.dataclass
class Sample:
    inputs: torch.Tensor
    targets: torch.Tensor
    texts: list
    scale: float = 1.0


Pair = collections.namedtuple("Pair", "inputs targets")


def nested(samples):
    inputs, targets = data(samples)
    texts = [f"{index}" * (index % 3) for index in range(samples)]
    return [
        (inputs, targets, texts),
        {"x": inputs, "more": {"y": targets, "texts": texts, "step": 7, "name": "train", "none": None, "zero": torch.tensor(3.0)}},
        Sample(inputs, targets, texts),
        [Pair(inputs, targets), texts],
    ]


def nested_loss(model, batch):
    if isinstance(batch, tuple):
        inputs, targets, texts = batch
    elif isinstance(batch, dict):
        inputs, targets, texts = batch["x"], batch["more"]["y"], batch["more"]["texts"]
        assert (batch["more"]["step"], batch["more"]["name"], batch["more"]["none"], float(batch["more"]["zero"])) == (7, "train", None, 3.0)
    elif isinstance(batch, Sample):
        inputs, targets, texts = batch.inputs, batch.targets, batch.texts
    else:
        (inputs, targets), texts = batch
    lengths = torch.tensor([len(text) for text in texts]).double()
    return ((model(inputs) - targets).square().mean(dim=1) * (1 + lengths)).mean()


@pytest.mark.parametrize("kind", range(4))
def test_nested_batches_of_every_kind_are_exact_texts_included(kind):
    batch = nested(22)[kind]
    model = network()
    expected = torch.autograd.grad(nested_loss(model, batch), model.parameters())
    for a, b in zip(expected, gradients(nested_loss, batch, (8, 8, 6))[0]):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


@pytest.mark.slow
def test_with_8_steps_the_peak_is_that_of_2():
    """No graph and no activation outlives its micro-batch. 20 samples take 40 MiB. In a process of its own: where other tests ran, the C library keeps
    what they freed."""
    peaks = fresh(
        """
import json
import torch
import autoaccum
from autoaccum.devices.cpu import Cpu
from tests import jobs
from tests.plans import by_hand

torch.set_num_threads(1)
job, cpu, peaks = jobs.hungry(mib=2), Cpu(), []
cpu.prepare()
for steps in (2, 8):
    loop = autoaccum.Accumulator(job, by_hand(job, 20 * steps, 20))
    loop.step(torch.zeros(20 * steps, 1))
    with cpu.watch() as watch:
        before = cpu.held_bytes()
        loop.step(torch.zeros(20 * steps, 1))
        peaks.append(watch.peak_bytes() - before)
print(json.dumps(peaks))
"""
    )
    assert peaks[0] > 40 * MIB and abs(peaks[1] - peaks[0]) < 2 * MIB, peaks


def test_the_norm_is_that_of_what_is_stepped_and_other_gradients_do_not_pile_up():
    """A head is trained, the rest gets gradients that nobody takes; under a scaler they would not even be unscaled."""
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        model = network().float()
        head = model[2]
        job = Job(model, torch.optim.SGD(head.parameters(), lr=0.0), mean_loss, (), max_grad_norm=1e9, scaler=scaler)
        batch = tuple(each.float() for each in data(6))
        expected = torch.cat([grad.flatten() for grad in torch.autograd.grad(mean_loss(model, batch), head.parameters())]).norm()
        for _ in range(3):
            ran = accumulation.run(job, mean_loss, [(batch, 6)], samples=6, device=CPU, scaler=scaler)
            torch.testing.assert_close(ran.grad_norm, expected)
        assert all(parameter.grad is None for parameter in head.parameters())
        once = torch.autograd.grad(mean_loss(model, batch), model[0].weight)[0] * (1 if scaler is None else 1024.0)
        torch.testing.assert_close(model[0].weight.grad, once)  # one window's, for whoever steps it


def test_a_window_in_which_no_optimizer_gets_a_gradient_does_not_break_the_next():
    model = network().float()
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    job = Job(model, torch.optim.SGD(model.parameters(), lr=0.1), mean_loss, (), scaler=scaler, max_grad_norm=1.0, count=lambda piece: piece[2].sum())
    batch = (*(each.float() for each in data(4)), torch.ones(4))
    nothing = (*batch[:2], torch.zeros(4))
    before = [p.clone() for p in model.parameters()]
    for _ in range(2):
        assert float(accumulation.run(job, mean_loss, [(nothing, 4)], samples=4, device=CPU, scaler=scaler).loss) == 0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert not accumulation.run(job, mean_loss, [(batch, 4)], samples=4, device=CPU, scaler=scaler).skipped
    assert not torch.equal(before[0], next(model.parameters()))


def test_a_micro_batch_in_which_nothing_counts_owes_nothing_also_where_its_mean_is_nan():
    def masked_mean(model, batch):
        inputs, targets, mask = batch
        return ((model(inputs) - targets).square().mean(dim=1) * mask).sum() / mask.sum()

    mask = torch.ones(9).double()
    mask[3:6] = 0
    batch = (*data(9), mask)
    stepped, ran, _ = gradients(masked_mean, batch, (3, 3, 3), count=lambda piece: piece[2].sum())
    model = network()
    for a, b in zip(torch.autograd.grad(masked_mean(model, batch), model.parameters()), stepped):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(ran.loss, masked_mean(model, batch).detach())


def test_of_several_scaled_optimizers_one_may_have_nothing_to_step():
    model = nn.Sequential(nn.Linear(5, 2), nn.Linear(3, 3))
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    job = Job(model, [torch.optim.SGD(part.parameters(), lr=0.1) for part in model], mean_loss, (), scaler=scaler)
    batch = tuple(each.float() for each in data(6))
    before = model[0].weight.clone()
    accumulation.run(job, lambda model, batch: mean_loss(model[0], batch), [(batch, 6)], samples=6, device=CPU, scaler=scaler)
    assert not torch.equal(before, model[0].weight)


@pytest.mark.parametrize("second", [torch.zeros(4, 2), "many", -3, None])
def test_the_second_part_of_a_pair_is_a_count(second):
    with pytest.raises(JobError, match="returned a pair whose second part is"):
        gradients(lambda model, batch: (model(batch[0]).sum(), second), data(4), (2, 2))


def test_a_piece_that_counts_nothing_contributes_nothing_although_its_own_mean_is_nan():
    """A mean times its count is 0/0 times 0 where nothing counts, and so is its gradient."""
    x, mask = torch.randn(12, 3, dtype=torch.float64), torch.ones(12, dtype=torch.bool)
    mask[4:8] = False

    def loss(model, batch):
        x, mask = batch
        return model(x)[mask].square().mean() * mask.sum(), mask.sum()

    model = nn.Linear(3, 1).double()
    job = Job(model, torch.optim.SGD(model.parameters(), lr=0.1), loss, ())
    result = accumulation.gradients(job, loss, [((x[at : at + 4], mask[at : at + 4]), 4) for at in (0, 4, 8)], samples=12, device=torch.device("cpu"))
    ours = model.weight.grad.clone()
    model.weight.grad = None
    whole = model(x)[mask].square().mean()
    whole.backward()
    assert torch.allclose(ours, model.weight.grad, rtol=1e-14, atol=0) and float(result.loss.sum()) == pytest.approx(float(whole), rel=1e-14)
