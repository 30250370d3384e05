"""Every generator that training may draw from comes back, also where only half of a pair was drawn."""

import random

import numpy as np
import pytest
import torch

from autoaccum.window.rng_state import RngState

DRAWS = {
    "random": random.random,
    "gauss": lambda: random.gauss(0, 1),  # every second one comes from a store beside the generator
    "shuffle": lambda: random.sample(range(100), 3),
    "rand": np.random.rand,
    "randn": np.random.randn,  # likewise
    "randint": lambda: np.random.randint(1000),
    "torch": lambda: torch.rand(()).item(),
}


@pytest.mark.parametrize("before", [0, 1, 2])
@pytest.mark.parametrize("name", DRAWS)
def test_what_was_drawn_is_drawn_again(name, before):
    draw = DRAWS[name]
    generators = RngState(torch.device("cpu"))
    generators.note()
    for _ in range(before):
        draw()
    generators.note()
    first = [draw() for _ in range(5)]
    generators.put_back()
    assert [draw() for _ in range(5)] == first


def test_a_note_that_follows_a_note_still_tells_of_every_draw():
    """The memory is only compared, so a state noted earlier must not be taken for the present one."""
    generators = RngState(torch.device("cpu"))
    for draw in DRAWS.values():
        for _ in range(3):
            generators.note()
            drawn = draw()
            generators.put_back()
            assert draw() == drawn


def test_seeding_is_noticed():
    generators = RngState(torch.device("cpu"))
    generators.note()
    random.seed(5), np.random.seed(5)
    generators.note()
    drawn = random.random(), np.random.rand()
    generators.put_back()
    assert (random.random(), np.random.rand()) == drawn


def test_further_generators_come_back_too():
    own = torch.Generator().manual_seed(3)
    generators = RngState(torch.device("cpu"), [own])
    generators.note()
    drawn = torch.rand(3, generator=own)
    generators.put_back()
    assert torch.equal(torch.rand(3, generator=own), drawn)
