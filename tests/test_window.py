"""Exactness in fp64 against the whole batch at once."""

import pytest
import torch
from torch import nn

from autoaccum import batches, plan, weighting, window
from autoaccum.errors import JobError
from autoaccum.job import Job

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
    ran = window.run(job, loss, list(zip(batches.split(batch, sizes), sizes)), samples=sum(sizes), device=CPU)
    return optimizer.stepped, ran, model


SPLITS = [*(plan.micro_batches(n, k) for n in range(1, 33) for k in range(1, n + 1)), (40, 40, 40), (50, 50, 20), (32, 32, 32, 31), (20, 50, 50)]


def test_every_split_gives_the_gradient_of_the_whole_batch():
    for sizes in SPLITS:
        batch = data(sum(sizes))
        whole, split = gradients(mean_loss, batch, (sum(sizes),)), gradients(mean_loss, batch, sizes)
        for a, b in zip(whole[0], split[0]):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(whole[1].loss, split[1].loss, rtol=1e-12, atol=0)


def test_a_wrong_weight_would_be_seen(monkeypatch):
    """Weighting by steps instead of samples, as most loops do, fails the test above."""
    right = weighting.contribution
    monkeypatch.setattr(weighting, "contribution", lambda returned, **_: right(returned, samples=1, of_samples=3))
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
    ran = window.run(job, mean_loss, zip(batches.split((inputs, targets), sizes), sizes), samples=9, device=CPU, scaler=scaler)
    assert ran.skipped and scaler.get_scale() == 512.0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert all(p.grad is None for p in model.parameters())


def test_a_scaler_changes_no_gradient():
    batch = tuple(each.float() for each in data(30))
    results = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**10)):
        model = network().float()
        job = Job(model, torch.optim.SGD(model.parameters(), lr=0.1), mean_loss, (), max_grad_norm=0.05)
        ran = window.run(job, mean_loss, zip(batches.split(batch, (20, 10)), (20, 10)), samples=30, device=CPU, scaler=scaler)
        results.append((ran.grad_norm, [p.detach() for p in model.parameters()]))
    torch.testing.assert_close(results[0], results[1])


def test_what_only_the_optimizer_holds_gets_the_right_gradient_too():
    """A learned weight beside the model, under a loss that is a sum."""
    model, scale = network(), torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = Recorder([*model.parameters(), scale], lr=0.0)

    def loss(model, batch):
        return (scale * (model(batch[0]) - batch[1])).square().sum(), len(batch[0])

    batch = data(30)
    window.run(Job(model, optimizer, loss, batch), loss, zip(batches.split(batch, (20, 10)), (20, 10)), samples=30, device=CPU)
    expected = torch.autograd.grad(loss(model, batch)[0] / 30, scale)[0]
    torch.testing.assert_close(optimizer.stepped[-1], expected, rtol=1e-12, atol=0)


def test_a_window_in_which_nothing_counts_has_no_gradient():
    model = network()
    optimizer = Recorder(model.parameters(), lr=0.0)
    window.run(Job(model, optimizer, mean_loss, ()), lambda m, b: (m(b[0]).sum() * 0, 0), [(data(4), 4)], samples=4, device=CPU)
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in optimizer.stepped)


def test_gradients_that_someone_left_are_not_added():
    batch = data(12)
    clean = gradients(mean_loss, batch, (12,))[0]
    model = network()
    optimizer = Recorder(model.parameters(), lr=0.1)
    mean_loss(model, batch).backward()
    window.run(Job(model, optimizer, mean_loss, batch), mean_loss, [(batch, 12)], samples=12, device=CPU)
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
