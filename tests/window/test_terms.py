"""Losses of several terms: each is divided by its own denominator over the window, and the gradient is that of the whole batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import autoaccum
from tests.plans import by_hand


def data(samples=24):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(samples, 5, dtype=torch.float64, generator=generator)
    mask = (torch.rand(samples, 7, generator=generator) < torch.linspace(0.05, 0.95, samples)[:, None]).double()
    return x, x.sum(1), mask, torch.randn(samples, 7, dtype=torch.float64, generator=generator)


def network():
    torch.manual_seed(1)
    return nn.ModuleDict({"trunk": nn.Linear(5, 6), "value": nn.Linear(6, 1), "boxes": nn.Linear(6, 7)}).double()


def heads(model, x):
    inner = torch.tanh(model["trunk"](x))
    return model["value"](inner)[:, 0], model["boxes"](inner)


def two_denominators(model, batch):
    """As detection has them: classes are a mean over samples, boxes over matched boxes."""
    x, y, mask, boxes = batch
    value, box = heads(model, x)
    return {"value": F.mse_loss(value, y), "boxes": (((box - boxes).abs() * mask).sum(), mask.sum())}


def balance(model, batch):
    """As a mixture of experts has it: two sums over the same tokens."""
    x, _y, mask, boxes = batch
    _value, box = heads(model, x)
    tokens = mask.sum()
    return {"main": (((box - boxes) ** 2 * mask).sum(), tokens), "balance": (0.1 * (box.abs() * mask).sum(), tokens)}


def all_means(model, batch):
    """As a variational autoencoder has it: a reconstruction and a divergence."""
    x, y, _mask, _boxes = batch
    value, box = heads(model, x)
    return [F.mse_loss(value, y), 0.3 * (box**2).mean(1).mean()]


def three(model, batch):
    """A number as one count, tensors as others."""
    x, y, mask, _boxes = batch
    value, box = heads(model, x)
    return {
        "a": ((value - y).abs().sum(), 2 * len(x)),
        "b": ((box * mask).sum(), mask.sum()),
        "c": ((box**2 * (1 - mask)).sum(), (1 - mask).sum()),
        "d": value.mean(),
    }


def flat(model):
    return torch.cat([torch.zeros(parameter.numel()) if parameter.grad is None else parameter.grad.flatten() for parameter in model.parameters()])


def whole(loss, batch):
    model = network()
    returned = loss(model, batch)
    named = returned if isinstance(returned, dict) else {str(index): term for index, term in enumerate(returned)}
    values = {name: term[0] / term[1] if isinstance(term, tuple) else term for name, term in named.items()}
    sum(values.values()).backward()
    return flat(model), {name: float(value.detach()) for name, value in values.items()}


def ours(loss, batch, size, **given):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    job = autoaccum.Job(model, optimizer, loss, batch, **given)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(flat(model)))
    result = autoaccum.Accumulator(job, by_hand(job, len(batch[0]), size)).step(batch)
    return seen[0], result


@pytest.mark.parametrize("loss", [two_denominators, balance, all_means, three])
@pytest.mark.parametrize("size", [1, 5, 7, 24])
def test_the_gradient_and_each_term_are_those_of_the_whole_batch(loss, size):
    batch = data()
    right, values = whole(loss, batch)
    gradient, result = ours(loss, batch, size)
    assert (gradient - right).norm() / right.norm() < 1e-14
    assert result.terms == pytest.approx(values, rel=1e-12)
    assert result.loss == pytest.approx(sum(values.values()), rel=1e-12)


@settings(max_examples=25, deadline=None)
@given(samples=st.integers(2, 40), size=st.integers(1, 13), loss=st.sampled_from([two_denominators, balance, three]))
def test_every_split_is_exact(samples, size, loss):
    batch = data(samples)
    right, values = whole(loss, batch)
    gradient, result = ours(loss, batch, min(size, samples))
    assert (gradient - right).norm() / right.norm() < 1e-13
    assert result.terms == pytest.approx(values, rel=1e-11)


def test_clipping_sees_the_sum_of_all_terms():
    batch = data()
    right, _ = whole(two_denominators, batch)
    gradient, result = ours(two_denominators, batch, 5, max_grad_norm=0.01)
    assert result.grad_norm == pytest.approx(float(right.norm()), rel=1e-12)
    assert torch.allclose(gradient, right * (0.01 / (right.norm() + 1e-6)), rtol=1e-9)


def test_a_term_in_which_nothing_counts_in_some_micro_batches():
    x, y, mask, boxes = data()
    mask[:10] = 0
    right, values = whole(two_denominators, (x, y, mask, boxes))
    gradient, result = ours(two_denominators, (x, y, mask, boxes), 4)
    assert (gradient - right).norm() / right.norm() < 1e-14 and result.terms == pytest.approx(values)


def test_tune_measures_a_loss_of_terms_and_finds_it_exact():
    model, batch = network(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plan = autoaccum.tune(model, optimizer, two_denominators, batch, target_batch=24, max_micro_batch=5)
    assert plan.micro_batches == (5, 5, 5, 5, 4) and not plan.warnings
    assert autoaccum.equivalence(model, optimizer, two_denominators, batch).exact


def test_lbfgs_evaluates_all_terms_again():
    def train(size):
        model = network()
        job = autoaccum.Job(model, torch.optim.LBFGS(model.parameters(), lr=0.2, max_iter=4), two_denominators, data())
        loop = autoaccum.Accumulator(job, by_hand(job, 24, size))
        for _ in range(2):
            loop.step(data())
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    assert torch.allclose(train(5), train(24), rtol=1e-9)


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (lambda model, batch: {}, "returned no terms"),
        (lambda model, batch: {"a": heads(model, batch[0])[0]}, "term 'a': loss(model, batch) returned a tensor of shape"),
        (lambda model, batch: {"a": 0.5}, "no term of the loss needs a gradient"),
        (lambda model, batch: {"a": "0.5"}, "term 'a': loss(model, batch) returned a str"),
    ],
)
def test_what_is_no_term_is_told_with_its_name(loss, says):
    with pytest.raises(autoaccum.JobError, match=says.replace("(", r"\(").replace(")", r"\)")):
        ours(loss, data(), 6)


def test_one_count_for_several_terms_is_refused_and_the_remedy_works():
    with pytest.raises(autoaccum.JobError, match="count= gives one number: leave count= out"):
        ours(two_denominators, data(), 6, count=lambda batch: batch[2].sum())
    ours(two_denominators, data(), 6)


def test_terms_that_change_between_micro_batches_are_refused():
    def loss(model, batch):
        terms = two_denominators(model, batch)
        return terms if len(batch[0]) == 7 else {"value": terms["value"]}

    with pytest.raises(autoaccum.JobError, match="return the same terms for every batch"):
        ours(loss, tuple(field[:20] for field in data()), 7)


def test_terms_without_a_graph_count_towards_the_loss_and_are_left_out_of_backward():
    """A detector's boxes in a batch without any, a figure that is only logged, a constant."""

    def loss(model, batch):
        terms = two_denominators(model, batch)
        boxes = terms["boxes"] if len(batch[0]) == 7 else (torch.zeros((), dtype=torch.float64), torch.tensor(0.0))
        return {**terms, "boxes": boxes, "logged": terms["value"].detach(), "constant": 0.5}

    batch = tuple(field[:20] for field in data())
    model = network()
    terms = two_denominators(model, batch)
    first = two_denominators(model, tuple(field[:14] for field in batch))["boxes"]
    (terms["value"] + first[0] / first[1]).backward()
    gradient, result = ours(loss, batch, 7)
    assert (gradient - flat(model)).norm() / gradient.norm() < 1e-14
    assert result.terms["logged"] == pytest.approx(result.terms["value"]) and result.terms["constant"] == pytest.approx(0.5)


def test_a_mean_times_its_count_is_0_where_nothing_counts():
    def loss(model, batch):
        x, _y, mask, boxes = batch
        _value, box = heads(model, x)
        count = mask.sum()
        mean = ((box - boxes) ** 2 * mask).sum() / count
        return torch.where(count > 0, mean, torch.zeros_like(mean)) * count if False else mean * count, count

    x, y, mask, boxes = data()
    mask[:8] = 0
    _, result = ours(loss, (x, y, mask, boxes), 4)
    assert result.loss == result.loss  # not nan
