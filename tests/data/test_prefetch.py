"""Micro-batches reach the loss on the model's device, one at a time; the CUDA part is tested on a card."""

import torch

from autoaccum.data import batches, prefetch
from autoaccum.data.windows import Window

CPU = torch.device("cpu")


def test_on_the_host_pieces_go_through_untouched_and_one_by_one():
    taken = []

    def pieces():
        for index in range(3):
            taken.append(index)
            yield torch.full((2,), float(index)), 2

    fed = iter(prefetch.feed(pieces(), CPU))
    piece, samples = next(fed)
    assert taken == [0] and samples == 2 and batches.move(piece, CPU) is piece


def test_what_is_on_the_device_already_is_not_copied():
    batch = {"inputs": torch.zeros(4, 2), "more": (torch.zeros(4), torch.ones(4))}
    for piece, _ in prefetch.feed(Window.of([batch]).cut((2, 2)), CPU):
        assert batches.move(piece, CPU) is piece


def test_the_loss_gets_plain_lists():
    for piece, _ in Window.of([{"inputs": torch.zeros(4, 2), "texts": ["a", "b", "c", "d"]}]).cut((2, 2)):
        assert type(batches.move(piece, CPU)["texts"]) is list


def test_another_device_gets_every_tensor_of_a_nested_batch():
    meta = torch.device("meta")
    moved = batches.move({"inputs": torch.zeros(4, 2), "texts": ["a"] * 4, "list": [torch.zeros(3), torch.zeros(2)]}, meta)
    assert moved["inputs"].device == meta and all(each.device == meta for each in moved["list"]) and moved["texts"] == ["a"] * 4
