"""Windows of tokens, as sets of samples: the same on any ranks, every sample once, and no micro-batch above its budget."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoaccum.data import TokenSampler, tokens
from autoaccum.data.windows import Windows
from autoaccum.errors import PlanError

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=80)


@given(
    lengths=LENGTHS, target=st.integers(1, 200), budget=st.integers(40, 120), shares=st.lists(st.integers(0, 9), min_size=1, max_size=4), padded=st.booleans()
)
def test_every_sample_comes_once_and_windows_do_not_know_the_ranks(lengths, target, budget, shares, padded):
    shares = shares if any(shares) else [1]
    alone = TokenSampler(lengths, target, budget, [1], padded=padded, seed=5)
    whole = [(start, samples) for start, samples, _ in alone.windows(0)]
    ranks = [TokenSampler(lengths, target, budget, shares, padded=padded, seed=5, rank=rank) for rank in range(len(shares))]
    read = [iter(rank) for rank in ranks]
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(5)).tolist()
    for number, windows in enumerate(zip(*(list(rank.windows(0)) for rank in ranks))):
        assert {(start, samples) for start, samples, _ in windows} == {whole[number]}
        start, samples = whole[number]
        seen = []
        for rank, (_, _, sizes) in enumerate(windows):
            for size in sizes:
                piece = next(read[rank])
                assert len(piece) == max(size, 1)
                if size:
                    seen += piece
                    longest, total = max(lengths[index] for index in piece), sum(lengths[index] for index in piece)
                    assert (len(piece) * longest if padded else total) <= budget
                    assert shares[rank]
        assert sorted(seen) == sorted(order[start : start + samples])
        held = sum(lengths[index] for index in seen)
        last = lengths[order[start + samples - 1]]
        assert held - last < target and (held >= target or start + samples == len(lengths))
    assert all(next(rank, None) is None for rank in read)


@given(lengths=st.lists(st.integers(1, 40), min_size=20, max_size=80), shares=st.lists(st.integers(1, 9), min_size=2, max_size=4))
def test_a_rank_gets_its_share_of_tokens_to_within_a_sample(lengths, shares):
    slices = tokens.slices(lengths, shares)
    assert slices[0][0] == 0 and slices[-1][1] == len(lengths)
    for share, (first, end) in zip(shares, slices):
        assert abs(sum(lengths[first:end]) - sum(lengths) * share / sum(shares)) <= max(lengths)


def padded(lengths):
    most = max(lengths)
    return {"labels": torch.tensor([[1] * length + [-100] * (most - length) for length in lengths])}


@given(lengths=LENGTHS, target=st.integers(1, 200), batch_size=st.integers(1, 9), budget=st.integers(40, 120))
def test_a_plain_loader_is_cut_where_the_tokens_are_reached(lengths, target, batch_size, budget):
    loader = [padded(lengths[start : start + batch_size]) for start in range(0, len(lengths), batch_size)]
    first = 0
    for window in Windows(loader, 1, gauge=tokens.TokenGauge(target)):
        held = lengths[first : first + window.samples]
        first += window.samples
        assert sum(held[:-1]) < target and (sum(held) >= target or first == len(lengths))
        sizes = tokens.sizes_within(window.parts, window.sizes, budget)
        pieces = list(window.cut(sizes))
        assert sum(size for _, size in pieces) == window.samples
        assert all(piece["labels"].numel() <= budget for piece, _ in pieces)
        assert sum(int((piece["labels"] != -100).sum()) for piece, _ in pieces) == sum(held)
    assert first == len(lengths)


def test_a_sample_longer_than_a_micro_batch_is_one_of_its_own():
    assert tokens.sizes_within([padded([50, 3]), padded([3, 3, 3])], [2, 3], 40) == (1, 1, 3)
    assert tokens.packed([0, 1, 2], [5, 9, 50], 40, padded=True) == [[2], [1, 0]]


@given(lengths=LENGTHS, budget=st.integers(40, 120), extra=st.lists(st.integers(0, 40), min_size=80, max_size=80))
def test_what_counts_and_what_takes_memory_may_differ(lengths, budget, extra):
    """Prompts have a length and no labels."""
    whole = [length + more for length, more in zip(lengths, extra)]
    for piece in TokenSampler(lengths, 60, budget, [1], padded=True, seed=5, lengths=whole):
        assert len(piece) == 1 or len(piece) * max(whole[index] for index in piece) <= budget


def test_batches_that_cannot_be_cut_belong_to_the_window_in_which_they_begin():
    packs = [torch.zeros(1, length) for length in (30, 30, 50, 10)]
    windows = list(Windows(iter(packs), 1, gauge=tokens.TokenGauge(55, lambda pack: pack.numel()), samples=lambda pack: 3))
    assert [window.parts for window in windows] == [tuple(packs[:2]), tuple(packs[2:])]


def test_tokens_without_labels_are_asked_for():
    with pytest.raises(PlanError, match=r"what counts as a token is not known, because the batch has no tensor under 'labels'.*give count="):
        list(Windows([torch.zeros(4, 3)], 1, gauge=tokens.TokenGauge(5)))


def test_an_iteration_that_ended_inside_a_window_leaves_nothing_behind():
    windows = Windows([padded([2, 2, 2]), padded([9, 9])], 1, gauge=tokens.TokenGauge(8))
    next(iter(windows))
    assert [window.samples for window in windows] == [4, 1] == [window.samples for window in windows]


def test_a_run_goes_on_with_other_ranks_where_it_stopped():
    lengths = [1 + 7 * index % 19 for index in range(100)]
    alone = TokenSampler(lengths, 60, 40, [1], padded=True, seed=5)
    bounds = [(start, samples) for start, samples, _ in alone.windows(0)]
    resumed = TokenSampler(lengths, 60, 40, [3, 1], padded=True, seed=5, rank=1)
    start, _ = bounds[2]
    resumed.load_state_dict(alone.state_of(0, start))
    assert [(begin, count) for begin, count, _ in resumed.windows(resumed.done)] == bounds[2:]
    with pytest.raises(PlanError, match="target"):
        TokenSampler(lengths, 61, 40, [1], padded=True, seed=5).load_state_dict(alone.state_of(0, start))
