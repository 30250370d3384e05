"""In-batch negatives over the whole window, in micro-batches, in double precision."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import autoaccum
from autoaccum.errors import JobError, UsageError
from tests.plans import by_hand

# These tests call the loss on whole windows, to compare with.
pytestmark = pytest.mark.filterwarnings("ignore:a contrastive loss that is called")


class Towers(nn.Module):
    """Two encoders and a learned temperature, as CLIP has."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = (nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 4)) for _ in range(2))
        self.scale = nn.Parameter(torch.tensor(1.0))


def encode(model, batch):
    return F.normalize(model.left(batch[0])), F.normalize(model.right(batch[1]))


def both_ways(model):
    def loss(left, right):
        scores = model.scale.exp() * left @ right.T
        own = torch.arange(len(scores))
        return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2

    return loss


def towers(**given):
    model = Towers(**given).double()
    return model, torch.optim.SGD(model.parameters(), lr=0.0), autoaccum.contrastive(encode, both_ways(model))


def pairs(samples):
    drawn = torch.Generator().manual_seed(1)
    return tuple(torch.randn(samples, 6, dtype=torch.float64, generator=drawn) for _ in range(2))


def gradient(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def recorded(optimizer, model):
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(gradient(model).clone()))
    return seen


@pytest.mark.parametrize(("samples", "most"), [(24, 24), (24, 8), (23, 5), (24, 1)])
def test_every_window_has_the_gradient_of_all_its_samples_at_once(samples, most):
    model, optimizer, loss = towers()
    seen = recorded(optimizer, model)
    loop = autoaccum.Accumulator(model, optimizer, by_hand(None, samples, most))
    result = loop.step(pairs(samples), loss)
    whole = loss(model, pairs(samples))
    whole.backward()
    assert float((gradient(model) - seen[0]).norm() / gradient(model).norm()) < 1e-12
    assert result.loss == pytest.approx(float(whole.detach()), rel=1e-12) and result.micro_batches == -(-samples // most)


def test_plain_accumulation_is_far_off():
    model, _, loss = towers()
    left, right = pairs(24)
    for start in range(0, 24, 8):
        (loss(model, (left[start : start + 8], right[start : start + 8])) / 3).backward()
    off = gradient(model).clone()
    model.zero_grad()
    loss(model, (left, right)).backward()
    assert float((gradient(model) - off).norm() / gradient(model).norm()) > 0.1


def test_dropout_draws_the_same_in_both_passes_and_moves_on_once():
    """Against one graph over the same micro-batches, drawn from the same state."""
    model, optimizer, loss = towers(dropout=0.3)
    seen = recorded(optimizer, model)
    left, right = pairs(24)
    torch.manual_seed(7)
    autoaccum.Accumulator(model, optimizer, by_hand(None, 24, 7)).step((left, right), loss)
    after = torch.get_rng_state()
    torch.manual_seed(7)
    parts = [encode(model, (one, other)) for one, other in zip(left.split(6), right.split(6))]
    both_ways(model)(*(torch.cat(each) for each in zip(*parts))).backward()
    assert float((gradient(model) - seen[0]).norm() / gradient(model).norm()) < 1e-12
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("settings", [{"scaler": True}, {"max_grad_norm": 0.01}, {"autocast": torch.bfloat16}])
def test_with_a_scaler_with_clipping_and_under_autocast(settings):
    model, optimizer, loss = towers()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if settings.pop("scaler", False) else None
    seen = recorded(optimizer, model)
    loop = autoaccum.Accumulator(model, optimizer, by_hand(None, 24, 8), scaler=scaler, **settings)
    loop.step(pairs(24), loss)
    with torch.autocast("cpu", dtype=settings.get("autocast", torch.bfloat16), enabled="autocast" in settings):
        loss(model, pairs(24)).backward()
    if "max_grad_norm" in settings:
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    assert float((gradient(model) - seen[0]).norm() / gradient(model).norm()) < (2e-2 if "autocast" in settings else 1e-12)


def test_a_closure_evaluates_the_whole_window_every_time():
    model, _, loss = towers()
    other, _, _ = towers()
    ours, theirs = (torch.optim.LBFGS(each.parameters(), lr=0.1, max_iter=5) for each in (model, other))
    autoaccum.Accumulator(model, ours, by_hand(None, 24, 8)).step(pairs(24), loss)
    at_once = autoaccum.contrastive(encode, both_ways(other))

    def closure():
        theirs.zero_grad()
        value = at_once(other, pairs(24))
        value.backward()
        return value

    theirs.step(closure)
    assert all(torch.allclose(one, two, rtol=0, atol=1e-10) for one, two in zip(model.parameters(), other.parameters()))


def test_tuning_compares_it_and_has_nothing_to_warn_of():
    model, optimizer, loss = towers()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = autoaccum.tune(model, optimizer, loss, pairs(24), target_batch=24, max_micro_batch=8)
        assert autoaccum.equivalence(model, optimizer, loss, pairs(24)).exact
        loop = autoaccum.Accumulator(model, optimizer, plan)
        loader = DataLoader(TensorDataset(*pairs(60)), batch_size=10)
        assert [loop.step(window, loss).samples for window in plan.windows(loader)] == [24, 24, 12]


def test_without_it_tuning_names_it_as_the_cure():
    model, optimizer, loss = towers()

    def plain(model, batch):  # the same loss, as people write it
        return loss(model, batch)

    with pytest.warns(UserWarning, match=r"looks at several samples at once .* autoaccum.contrastive\(encode, loss\) looks at the whole window"):
        autoaccum.tune(model, optimizer, plain, pairs(24), target_batch=24, max_micro_batch=8)


def test_a_window_that_runs_out_of_memory_runs_again_as_a_whole():
    model, optimizer, loss = towers()
    seen = recorded(optimizer, model)

    def hungry(model, batch):
        if len(batch[0]) > 6 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return encode(model, batch)

    result = autoaccum.Accumulator(model, optimizer, by_hand(None, 24, 8)).step(pairs(24), autoaccum.contrastive(hungry, both_ways(model)))
    loss(model, pairs(24)).backward()
    assert result.rescued and float((gradient(model) - seen[0]).norm() / gradient(model).norm()) < 1e-12


def test_batch_norm_moves_once_for_every_micro_batch():
    model, optimizer, loss = towers()
    model.left.insert(1, nn.BatchNorm1d(16, dtype=torch.float64))
    autoaccum.Accumulator(model, optimizer, by_hand(None, 24, 8)).step(pairs(24), loss)
    assert model.left[1].num_batches_tracked == 3


def test_by_hand_a_micro_batch_alone_is_warned_of():
    model, optimizer, loss = towers()
    plan = by_hand(None, 24, 8)
    with pytest.warns(UserWarning, match=r"looks at this batch alone.*train with autoaccum.Accumulator"):
        for micro in plan.split(pairs(24)):
            (loss(model, micro.batch) * micro.weight).backward()
    with pytest.raises(JobError, match="returned a tuple: return one scalar"):
        autoaccum.Accumulator(model, optimizer, plan).step(pairs(24), autoaccum.contrastive(encode, lambda left, right: (left.sum(), 24)))


def test_what_cannot_be_is_said():
    model, optimizer, loss = towers()
    with pytest.raises(UsageError, match=r"contrastive\(encode, loss\) takes two functions"):
        autoaccum.contrastive(encode, None)
    loop = autoaccum.Accumulator(model, optimizer, by_hand(None, 24, 8), count=lambda batch: len(batch[0]))
    with pytest.raises(UsageError, match="contrastive weighs every micro-batch itself: leave count= out"):
        loop.step(pairs(24), loss)
    loop = autoaccum.Accumulator(model, optimizer, by_hand(None, 24, 8))
    with pytest.raises(JobError, match=r"encode\(model, batch\) returned a tensor of shape \(\) for 8 samples: return a tensor with a row for each sample"):
        loop.step(pairs(24), autoaccum.contrastive(lambda model, batch: encode(model, batch)[0].mean(), lambda one: one))
