"""Frameworks over two real ranks: every window's gradient is the whole batch's, whatever each rank had of it."""

import pytest
import torch

from tests.integrations.in_ranks import SAMPLES_LEFT
from tests.ranked import in_ranks


@pytest.mark.parametrize("name", ["accelerate", "lightning"])
def test_over_two_ranks_every_window_is_exact(name, tmp_path):
    told = in_ranks("in_a_framework", name, 24, 5, str(tmp_path), world=2)
    for rank in told:
        assert rank["sizes"] == [4, 4, 4] and len(rank["apart"]) == 3 and max(rank["apart"]) < 1e-13, rank
    assert [sum(of) for of in zip(*(rank["samples"] for rank in told))][:2] == [24, 24]
    assert sum(rank["samples"][2] for rank in told) == SAMPLES_LEFT


def test_transformers_over_two_ranks_is_exact(tmp_path):
    from tests.integrations.test_huggingface import Line, Pairs

    told = in_ranks("in_a_framework", "huggingface", 24, 5, str(tmp_path), world=2)
    model, data = Line(), Pairs(48)
    for step in range(2):
        indices = [index for rank in told for index in rank["read"][step]]
        assert sorted(len(rank["read"][step]) for rank in told) == [12, 12] and len(set(indices)) == 24
        model.zero_grad()
        model(**{name: torch.stack([data[index][name] for index in indices]) for name in ("inputs", "targets")})["loss"].backward()
        whole = torch.cat([each.grad.flatten() for each in model.parameters()])
        for rank in told:
            assert (torch.tensor(rank["gradients"][step], dtype=torch.float64) - whole).norm() / whole.norm() < 1e-13
