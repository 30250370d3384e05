"""A loader of any batch size becomes windows of exactly the share; nothing is lost, doubled or reordered."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import autoaccum
from autoaccum.data import windows
from autoaccum.data.windows import Window
from tests.plans import by_hand


class Stream(IterableDataset):
    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        return iter(torch.arange(self.samples).float().unsqueeze(1))


def numbers(window_or_pieces):
    return [int(number) for piece, _ in window_or_pieces for number in piece.flatten()]


@given(samples=st.integers(1, 200), batch=st.integers(1, 70), target=st.integers(1, 90), micro_batch=st.integers(1, 90), iterable=st.booleans())
def test_every_loader_gives_windows_of_the_share_in_the_plans_micro_batches(samples, batch, target, micro_batch, iterable):
    plan = by_hand(None, target, min(micro_batch, target))
    loader = DataLoader(Stream(samples) if iterable else torch.arange(samples).float().unsqueeze(1), batch_size=batch)
    seen = []
    windows = list(plan.windows(loader))
    for index, window in enumerate(windows):
        assert window.samples == (target if index < len(windows) - 1 else samples - target * (len(windows) - 1))
        pieces = list(window.cut(plan.sizes(window.samples)))
        assert [size for _, size in pieces] == [len(piece) for piece, _ in pieces] == list(plan.sizes(window.samples))
        assert max(size for _, size in pieces) <= plan.micro_batch
        seen += numbers(pieces)
    assert seen == list(range(samples))
    if not iterable:
        assert len(plan.windows(loader)) == len(windows)


def test_a_stream_does_not_say_how_many_windows_it_has():
    with pytest.raises(TypeError, match="does not say how many samples"):
        len(by_hand(None, 12, 4).windows(DataLoader(Stream(30), batch_size=4)))


def test_a_loader_that_drops_its_last_batch_has_fewer_windows():
    loader = DataLoader(torch.zeros(100, 1), batch_size=32, drop_last=True)
    assert len(by_hand(None, 48, 16).windows(loader)) == 2 == len(list(by_hand(None, 48, 16).windows(loader)))


def test_windows_start_anew_in_every_epoch():
    windows = by_hand(None, 12, 4).windows(DataLoader(torch.zeros(30, 1), batch_size=7))
    assert [window.samples for window in windows] == [window.samples for window in windows] == [12, 12, 6]


def test_batches_padded_to_unlike_lengths_are_not_joined_but_come_as_smaller_micro_batches():
    loader = [{"ids": torch.ones(5, length), "labels": torch.ones(5)} for length in (3, 4, 4)]
    (window,) = by_hand(None, 15, 8).windows(loader)
    pieces = list(window.cut((8, 7)))
    assert [(size, tuple(piece["ids"].shape)) for piece, size in pieces] == [(5, (5, 3)), (3, (3, 4)), (7, (7, 4))]
    # Their weights are by samples all the same.
    micros = list(by_hand(None, 15, 8).split(window))
    assert [micro.weight for micro in micros] == [5 / 15, 5 / 15, 5 / 15] and [micro.last for micro in micros] == [False, False, True]


@pytest.mark.parametrize("drop_last", [False, True])
def test_an_epoch_that_is_smaller_than_the_target_is_told(drop_last):
    loader = torch.utils.data.DataLoader(torch.zeros(20, 3), batch_size=8)
    with pytest.warns(
        UserWarning, match=r"no whole window, .* no step at all" if drop_last else "20 samples, and the target batch is 50: every step is smaller"
    ):
        windows = list(by_hand(None, 50, 8).windows(loader, drop_last=drop_last))
    assert [window.samples for window in windows] == ([] if drop_last else [20])


def test_a_part_is_cut_evenly_where_its_neighbours_cannot_be_joined_to_it():
    """Lengths of 3 and 4 in turn, 17 samples each: nothing is cut where a micro-batch of 50 would end."""
    loader = [{"ids": torch.ones(17, 3 + index % 2)} for index in range(6)]
    (window,) = by_hand(None, 102, 50).windows(loader)
    assert [size for _, size in window.cut((34, 34, 34), most=50, elsewhere=True)] == [17] * 6
    assert [size for _, size in window.cut((12,) * 8 + (6,), most=12, elsewhere=True)] == [9, 8] * 6


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("kind", [lambda part: part, lambda part: {"ids": part}, lambda part: (part, torch.zeros(4))], ids=["bare", "dict", "tuple"])
def test_nested_tensors_are_joined_whatever_their_longest_rows(kind, layout):
    def part(longest):
        return kind(
            torch.nested.nested_tensor([torch.ones(1 + (row * longest) % longest + row % 2) for row in range(3)] + [torch.ones(longest)], layout=layout)
        )

    (window,) = by_hand(None, 16, 8).windows([part(longest) for longest in (3, 5, 4, 6)])
    assert [size for _, size in window.cut((8, 8), most=8, elsewhere=True)] == [8, 8]


def test_batches_whose_other_values_differ_are_not_joined():
    loader = [(torch.ones(2, 3), "english"), (torch.ones(2, 3), "german")]
    (window,) = by_hand(None, 4, 4).windows(loader)
    assert [piece[1] for piece, _ in window.cut((4,))] == ["english", "german"]


@given(samples=st.integers(1, 150), target=st.integers(1, 60), micro_batch=st.integers(1, 60), seed=st.integers(0, 3))
def test_the_sampler_gives_micro_batches_one_by_one_in_whole_windows(samples, target, micro_batch, seed):
    plan = by_hand(None, target, min(micro_batch, target))
    sampler = plan.batch_sampler(torch.zeros(samples), seed=seed)
    first, second = list(sampler), list(sampler)
    assert len(first) == len(sampler) and sorted(index for each in first for index in each) == list(range(samples))
    sizes = [size for start in range(0, samples, target) for size in plan.sizes(min(target, samples - start))]
    assert [len(each) for each in first] == sizes
    sampler.set_epoch(0)
    assert list(sampler) == first and (samples < 10 or first != second)


def test_the_sampler_feeds_windows():
    plan = by_hand(None, 31, 8)
    data = torch.arange(100).float().unsqueeze(1)
    loader = DataLoader(data, batch_sampler=plan.batch_sampler(data, shuffle=False))
    windows = list(plan.windows(loader))
    assert len(plan.windows(loader)) == len(windows) == 4
    assert [window.sizes for window in windows] == [(8, 8, 8, 7)] * 3 + [(7,)]
    assert numbers((part, 0) for window in windows for part in window.parts) == list(range(100))
    with pytest.raises(autoaccum.PlanError, match=r"has no length .* plan\.windows"):
        plan.batch_sampler(Stream(8))


class Graphs:
    def __init__(self, samples):
        self.samples = samples


def test_what_cannot_be_cut_comes_in_micro_batches_that_say_how_many_they_hold():
    plan = by_hand(None, 12, 4)
    loader = [Graphs(4) for _ in range(7)]
    windows = list(plan.windows(loader, samples=lambda graphs: graphs.samples))
    assert [window.samples for window in windows] == [12, 12, 4]
    assert [size for _, size in windows[0].cut(plan.sizes(12))] == [4, 4, 4]
    with pytest.raises(autoaccum.PlanError, match=r"samples=\.\.\."):
        list(plan.windows(loader))
    with pytest.raises(autoaccum.PlanError, match=r"cannot be cut: use DataLoader\(batch_sampler=plan\.batch_sampler\(dataset\)\)"):
        list(plan.windows([Graphs(5) for _ in range(4)], samples=lambda graphs: graphs.samples))


def test_a_splitter_of_the_users_cuts_what_we_cannot():
    def split(graphs, sizes):
        return [Graphs(size) for size in sizes]

    plan = by_hand(None, 12, 4)
    windows = list(plan.windows([Graphs(5) for _ in range(4)], samples=lambda graphs: graphs.samples, split=split))
    assert [window.samples for window in windows] == [12, 8]
    assert [size for _, size in windows[0].cut((4, 4, 4))] == [4, 1, 3, 2, 2]  # never joined: only its owner could


@pytest.mark.parametrize("wrong", [torch.zeros(8, 2), {"inputs": torch.zeros(8, 2)}, "batch", 5, (torch.zeros(8, 2), torch.zeros(8))])
def test_one_batch_is_not_a_loader(wrong):
    with pytest.raises(autoaccum.PlanError, match="windows takes a loader of batches, not one batch"):
        by_hand(None, 12, 4).windows(wrong)


def test_a_window_is_cut_as_often_as_asked():
    window = Window.of([torch.arange(7.0), torch.arange(7.0, 12)])
    cut = window.cut((5, 5, 2))
    assert numbers(cut) == numbers(cut) == list(range(12))
    assert numbers(window.cut((1,) * 12)) == list(range(12))
    with pytest.raises(autoaccum.PlanError, match="cannot cut 12 samples"):
        window.cut((5, 5))


def test_a_batch_of_one_piece_is_not_copied():
    batch = torch.arange(12.0)
    pieces = [piece for piece, _ in Window.of([batch]).cut((5, 5, 2))]
    assert all(piece.untyped_storage().data_ptr() == batch.untyped_storage().data_ptr() for piece in pieces)


def test_lengths_need_a_loader_that_tells():
    assert math.ceil(windows.samples_in(DataLoader(TensorDataset(torch.zeros(9)), batch_size=2))) == 9


def packed(graphs):
    """Graphs in one batch: nodes side by side, and which graph each belongs to."""
    return {"nodes": torch.arange(graphs * 8.0).unsqueeze(1), "graph": torch.arange(graphs).repeat_interleave(8)}


def test_what_is_told_its_samples_is_neither_joined_nor_cut_along_its_first_dimension():
    plan = by_hand(None, 8, 4)
    (window,) = plan.windows([packed(2) for _ in range(4)], samples=lambda batch: int(batch["graph"].max()) + 1)
    pieces = list(window.cut(plan.sizes(8), most=4))
    assert [(size, len(piece["nodes"])) for piece, size in pieces] == [(2, 16)] * 4
    with pytest.raises(autoaccum.PlanError, match="cannot be cut, and a micro-batch may hold 1"):
        window.cut((1,) * 8, most=1)


def test_the_tail_of_what_cannot_be_cut_runs_as_it_came():
    plan = by_hand(None, 12, 4)
    loader = [Graphs(size) for size in (4, 4, 4, 4, 4, 1)]
    windows = list(plan.windows(loader, samples=lambda graphs: graphs.samples))
    assert [size for _, size in windows[1].cut(plan.sizes(9), most=plan.micro_batch)] == [4, 4, 1]
    micros = list(plan.split(windows[1]))
    assert [micro.weight for micro in micros] == [4 / 9, 4 / 9, 1 / 9]


def test_ragged_samples_stay_samples_whatever_is_left_of_a_list():
    lengths = (3, 5, 4, 6, 8, 8, 7)
    texts = [torch.full((length,), float(length)) for length in lengths]
    plan = by_hand(None, 4, 1)
    windows = list(plan.windows([texts[:6], texts[6:]]))
    assert [window.samples for window in windows] == [4, 3]
    seen = [text for window in windows for piece, _ in window.cut((1,) * window.samples) for text in piece]
    assert [len(text) for text in seen] == list(lengths)


def test_the_smaller_last_window_can_be_left_out():
    windows = by_hand(None, 12, 4).windows(DataLoader(torch.zeros(30, 1), batch_size=7), drop_last=True)
    assert [window.samples for window in windows] == [12, 12] and len(windows) == 2


def test_a_dataset_is_not_a_loader():
    with pytest.raises(autoaccum.PlanError, match=r"not a dataset .*DataLoader\(dataset, batch_size=\.\.\.\)"):
        by_hand(None, 12, 4).windows(TensorDataset(torch.zeros(30, 2)))
