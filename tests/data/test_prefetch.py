"""Micro-batches reach the loss on the model's device, one at a time; the CUDA part is tested on a card."""

from contextlib import nullcontext

import pytest
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


def test_where_no_pinned_memory_is_left_the_batch_goes_from_ordinary_memory(monkeypatch, caplog):
    """cudaHostAlloc runs out in the words of the card's own memory, and no smaller micro-batch would help."""
    asked = []

    def pin_memory(tensor):
        asked.append(tensor)
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call")

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(prefetch, "_can_pin", True)
    tensor = torch.ones(3)
    with caplog.at_level("WARNING", logger="autoaccum"):
        assert prefetch.pinned(tensor) is tensor and prefetch.pinned(tensor) is tensor
    assert len(asked) == 1 and [record.getMessage().split(" (")[0] for record in caplog.records] == ["no pinned host memory is left"]


def test_another_error_of_pinning_is_not_hidden(monkeypatch):
    def pin_memory(tensor):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(prefetch, "_can_pin", True)
    with pytest.raises(RuntimeError, match="illegal"):
        prefetch.pinned(torch.ones(3))


class Timeline:
    """Streams and events in the order in which they were waited for, as torch.cuda has them."""

    def __init__(self, monkeypatch, device):
        self.waited = []
        timeline = self

        class Event:
            def record(self, stream=None):
                pass

            def synchronize(self):
                timeline.waited.append(self)

        class Stream:
            def __init__(self, device=None):
                pass

            def wait_event(self, event):
                pass

            wait_stream = wait_event

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())
        monkeypatch.setattr(prefetch, "_streams", {})


@pytest.mark.parametrize("is_pinned, waits", [(True, 1), (False, 0)])
def test_what_the_caller_pinned_is_not_read_any_more_when_the_window_is_over(monkeypatch, is_pinned, waits):
    """The copy that reads it runs by itself; a caller that fills the same buffer again would change the micro-batch."""
    device = torch.device("meta")
    timeline = Timeline(monkeypatch, device)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: is_pinned)
    pieces = [(torch.ones(2), 2), (torch.zeros(2), 2)]
    fed = [piece.device.type for piece, _ in prefetch._ahead(pieces, device)]
    assert fed == ["meta", "meta"] and len(timeline.waited) == waits
