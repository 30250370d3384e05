"""BatchNorm's running statistics move once per window, however it is split."""

import pytest
import torch
from torch import nn

import autoaccum
from autoaccum.window.batch_norm import RunningStats, batch_norms
from tests import jobs
from tests.plans import by_hand


def network(momentum=0.1):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, momentum=momentum), nn.ReLU(), nn.Linear(6, 1)).double()


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("micro_batch", [12, 6, 5, 4])
def test_running_means_and_counts_are_those_of_whole_batches_however_windows_are_split(micro_batch, momentum):
    model, whole, plain = network(momentum), network(momentum), network(momentum)
    torch.manual_seed(1)
    windows = [tuple(each.double() for each in jobs.pairs(samples, 4)) for samples in (12, 12, 7)]
    loops = [
        autoaccum.Accumulator(each, torch.optim.SGD(each.parameters(), lr=0.0), by_hand(None, 12, micro_batch), correct_running_stats=corrected)
        for each, corrected in ((model, True), (plain, False))
    ]
    for batch in windows:
        whole(batch[0])
        for loop in loops:
            loop.step(batch, jobs.mse)
    torch.testing.assert_close(model[1].running_mean, whole[1].running_mean, rtol=1e-12, atol=1e-15)
    assert model[1].num_batches_tracked == 3 and model[1].momentum == momentum
    assert torch.allclose(plain[1].running_mean, whole[1].running_mean, rtol=1e-6) == (micro_batch == 12)


def test_variances_lack_only_how_the_means_of_micro_batches_differ():
    """On micro-batches that are all alike there is nothing of that."""
    model, whole = network(), network()
    part = torch.randn(4, 4).double()
    loop = autoaccum.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.0), by_hand(None, 12, 4), correct_running_stats=True)
    loop.step((part.repeat(3, 1), torch.zeros(12, 1).double()), jobs.mse)
    whole(part)
    torch.testing.assert_close(model[1].running_var, whole[1].running_var, rtol=1e-12, atol=1e-15)


def test_momentum_and_statistics_come_back_when_the_loss_fails():
    model = network()
    loop = autoaccum.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.0), by_hand(None, 12, 4), correct_running_stats=True)

    def loss(model, batch):
        model(batch[0].double())
        raise ValueError

    with pytest.raises(ValueError):
        loop.step(jobs.pairs(12, 4), loss)
    assert model[1].momentum == 0.1
    assert torch.equal(model[1].running_mean, torch.zeros(6).double()) and model[1].num_batches_tracked == 0


def test_layers_in_eval_mode_are_left_alone():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4).eval(), nn.BatchNorm1d(4, track_running_stats=False))
    assert list(batch_norms(model)) == ["0", "2"]
    stats = RunningStats(model)
    with stats.corrected():
        stats.share(1.0)
        assert [layer.momentum for layer in model] == [1.0, 0.1, 0.1]
    assert [layer.momentum for layer in model] == [0.1] * 3


def test_a_compiled_model_is_not_compiled_for_every_micro_batch():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    model = network()
    compiled = torch.compile(model, backend=backend)
    loop = autoaccum.Accumulator(compiled, torch.optim.SGD(model.parameters(), lr=0.0), by_hand(None, 48, 4), correct_running_stats=True)
    for _ in range(2):
        loop.step(tuple(each.double() for each in jobs.pairs(48, 4)), jobs.mse)
    assert len(graphs) == 1


def test_a_scripted_layer_is_told():
    model = torch.jit.script(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1)))
    with pytest.raises(autoaccum.JobError, match="scripted"):
        autoaccum.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), by_hand(None, 8, 4), correct_running_stats=True)
