"""BatchNorm's running statistics move once per window, however it is split."""

import pytest
import torch
from torch import nn

import autoaccum
from autoaccum.running_stats import RunningStats, batch_norms
from tests import jobs
from tests.plans import by_hand


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, momentum=0.1), nn.ReLU(), nn.Linear(6, 1))


@pytest.mark.parametrize("micro_batch", [12, 6, 5, 4, 2])
def test_the_old_values_keep_the_weight_they_have_over_one_big_batch(micro_batch):
    """On samples that are all alike the statistics of every micro-batch are those of the window."""
    model = network()
    batch = torch.ones(12, 4), torch.zeros(12, 1)
    whole = network()
    whole(batch[0])
    loop = autoaccum.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.0), by_hand(None, 12, micro_batch), correct_running_stats=True)
    loop.step(batch, jobs.mse)
    torch.testing.assert_close(model[1].running_mean, whole[1].running_mean)
    assert model[1].momentum == 0.1
    plain = network()
    autoaccum.Accumulator(plain, torch.optim.SGD(plain.parameters(), lr=0.0), by_hand(None, 12, micro_batch)).step(batch, jobs.mse)
    assert torch.allclose(plain[1].running_mean, whole[1].running_mean) == (micro_batch == 12)


def test_momentum_comes_back_when_the_loss_fails():
    model = network()
    loop = autoaccum.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.0), by_hand(None, 12, 4), correct_running_stats=True)

    def loss(model, batch):
        assert model[1].momentum == pytest.approx(1 - 0.9 ** (1 / 3))
        raise ValueError

    with pytest.raises(ValueError):
        loop.step(jobs.pairs(12, 4), loss)
    assert model[1].momentum == 0.1


def test_layers_without_a_momentum_are_left_alone_and_those_in_eval_mode_are_not_named():
    model = nn.Sequential(nn.BatchNorm1d(4, momentum=None), nn.BatchNorm1d(4).eval(), nn.BatchNorm1d(4))
    assert list(batch_norms(model)) == ["0", "2"]
    stats = RunningStats(model)
    with stats.corrected():
        stats.share(0.5)
        assert [layer.momentum for layer in model] == [None, pytest.approx(1 - 0.9**0.5), pytest.approx(1 - 0.9**0.5)]
    assert [layer.momentum for layer in model] == [None, 0.1, 0.1]
