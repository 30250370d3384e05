"""Frameworks over two real ranks: every window's gradient is the whole batch's, whatever each rank had of it."""

import pytest
import torch

from tests.ranked import in_ranks

# Samples of the smaller last window: one fewer than ranks, too. Lightning reads even ones in an order that the user made.
LEFT = [("accelerate", 7), ("lightning", 7), ("lightning", 1), ("lightning", 6)]


@pytest.mark.parametrize(("name", "left"), LEFT)
def test_over_two_ranks_every_window_is_exact(name, left, tmp_path):
    told = in_ranks("in_a_framework", name, 24, 5, str(tmp_path), left, world=2)
    for rank in told:
        assert rank["sizes"] == [4, 4, 4] and len(rank["apart"]) == 3 and max(rank["apart"]) < 1e-13, rank
    last = [left - left // 2, max(left // 2, 1)]  # who has none runs one for nothing
    assert [[rank["samples"][window] for rank in told] for window in range(3)] == [[12, 12], [12, 12], last]


@pytest.mark.parametrize("steps", [2, 4, 6])
@pytest.mark.parametrize("name", ["accelerate_resumed", "lightning_resumed"])
def test_a_checkpoint_goes_on_with_other_ranks_and_micro_batches(name, steps, tmp_path):
    """Windows of 24, 24 and 7 samples: the second ends in mid-epoch, the fourth in the next one, the sixth at its end. From 1 rank to 2 and back."""
    whole = in_ranks("in_a_framework", name, 24, 5, str(tmp_path), steps, world=1)[0]
    assert whole["samples"] == [24, 24, 7] * 3
    told = in_ranks("in_a_framework", name, 24, 3, str(tmp_path), steps, world=2)
    assert [len(rank["samples"]) for rank in told] == [9 - steps] * 2
    for rank in told:
        assert rank["parameters"] == pytest.approx(whole["parameters"], rel=0, abs=1e-12)
    back = in_ranks("in_a_framework", name, 24, 12, str(tmp_path), steps, world=1)[0]
    assert back["samples"] == whole["samples"][steps:] and back["parameters"] == pytest.approx(whole["parameters"], rel=0, abs=1e-12)


@pytest.mark.parametrize("own_mean", [0, 1])
def test_transformers_over_two_ranks_is_exact(own_mean, tmp_path):
    from tests.integrations.test_huggingface import Line, Pairs

    told = in_ranks("in_a_framework", "huggingface", 24, 5, str(tmp_path), own_mean, world=2)
    model, data = Line(), Pairs(48)
    for step in range(2):
        indices = [index for rank in told for index in rank["read"][step]]
        assert sorted(len(rank["read"][step]) for rank in told) == [12, 12] and len(set(indices)) == 24
        model.zero_grad()
        model(**{name: torch.stack([data[index][name] for index in indices]) for name in ("inputs", "targets")})["loss"].backward()
        whole = torch.cat([each.grad.flatten() for each in model.parameters()])
        for rank in told:
            assert (torch.tensor(rank["gradients"][step], dtype=torch.float64) - whole).norm() / whole.norm() < 1e-13
