import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoaccum.simulate.allocator import Allocator
from autoaccum.simulate.allocator_settings import UNLIMITED, Settings

KIB, MIB = 2**10, 2**20

SETTINGS = [
    Settings(),
    Settings(expandable_segments=True),
    Settings(max_split_bytes=32 * MIB),
    Settings(roundup_divisions=(4,) * 16),
    Settings(garbage_collection_threshold=0.5, memory_fraction=0.75),
    Settings(expandable_segments=True, roundup_divisions=(8,) * 16, memory_fraction=0.9),
]
sizes = st.one_of(st.integers(1, 4 * KIB), st.integers(KIB, 2 * MIB), st.integers(MIB, 64 * MIB))
# A size asks for a block; a number below zero gives one of those back that are held; None empties the cache.
scripts = st.lists(st.one_of(sizes, sizes, st.integers(-50, -1), st.none()), max_size=120)


def ran(script, how, capacity=UNLIMITED):
    allocator, held, history = Allocator(capacity, settings=how), [], []
    for each in script:
        if each is None:
            allocator.empty_cache()
        elif each > 0:
            try:
                held.append(allocator.malloc(each))
            except torch.OutOfMemoryError:
                history.append("oom")
        elif held:
            allocator.free(held.pop(each % len(held)))
        history.append((allocator.allocated_bytes, allocator.reserved_bytes))
    return allocator, held, history


@settings(max_examples=60, deadline=None)
@given(scripts, st.sampled_from(SETTINGS), st.sampled_from([UNLIMITED, 300 * MIB, 100 * MIB]))
def test_blocks_tile_their_segments_and_the_sums_are_right(script, how, capacity):
    allocator, held, _ = ran(script, how, capacity)
    blocks = allocator.blocks()
    for before, after in itertools.pairwise(blocks):
        assert before.address + before.size <= after.address  # nothing overlaps
        assert (before.following is after) == (after.preceding is before)
        if before.following is after:
            assert before.address + before.size == after.address  # no gap within a segment
            assert before.live or after.live or before.mapped != after.mapped  # free neighbours have grown together
    assert {id(block) for block in blocks if block.live} == {id(block) for block in held}
    assert allocator.allocated_bytes == sum(block.size for block in held)
    assert allocator.requested_bytes == sum(block.requested for block in held)
    assert allocator.reserved_bytes == sum(block.size for block in blocks if block.mapped)
    assert allocator.requested_bytes <= allocator.allocated_bytes <= allocator.reserved_bytes <= capacity
    assert allocator.peak_reserved_bytes >= allocator.peak_allocated_bytes >= allocator.allocated_bytes


@settings(max_examples=30, deadline=None)
@given(scripts, st.sampled_from(SETTINGS), st.sampled_from([UNLIMITED, 100 * MIB]))
def test_the_same_script_gives_the_same_history(script, how, capacity):
    assert ran(script, how, capacity)[2] == ran(script, how, capacity)[2]


@settings(max_examples=30, deadline=None)
@given(scripts, st.sampled_from(SETTINGS))
def test_all_given_back_and_the_cache_emptied_leaves_nothing(script, how):
    allocator, held, _ = ran(script, how)
    for block in held:
        allocator.free(block)
    allocator.empty_cache()
    assert allocator.allocated_bytes == allocator.requested_bytes == allocator.reserved_bytes == 0


@settings(max_examples=30, deadline=None)
@given(scripts, st.sampled_from([Settings(), Settings(expandable_segments=True)]))
def test_a_card_as_large_as_the_unlimited_peak_never_flushes(script, how):
    free = ran(script, how)[0]
    tight = ran(script, how, max(free.peak_reserved_bytes, 1))[0]
    assert (tight.retries, tight.ooms) == (0, 0)


def test_sizes_and_segments_follow_the_table():
    allocator = Allocator()
    segments = []
    allocator.observer = lambda action, address, size: segments.append((action, size))
    assert [allocator.malloc(n).size for n in (1, 512, 513, 1000)] == [512, 512, 1024, 1024]
    assert segments == [("alloc", 2 * MIB)]  # one small segment for all
    assert allocator.malloc(3 * MIB).size == 3 * MIB
    assert allocator.malloc(10 * MIB).size == 10 * MIB  # from what is left of the same 20
    assert allocator.malloc(10 * MIB + 1).size == 10 * MIB + 512  # from a segment of its own, of whole 2 MiB
    assert allocator.malloc(21 * MIB).size == 22 * MIB  # what is left, 1 MiB, is too little to split off
    assert segments[1:] == [("alloc", 20 * MIB), ("alloc", 12 * MIB), ("alloc", 22 * MIB)]


def test_of_equal_blocks_the_one_at_the_lowest_address_is_taken():
    for places in ([100 << 30, 300 << 30, 200 << 30], [300 << 30, 100 << 30, 200 << 30]):
        given = iter(places)
        allocator = Allocator(place=lambda _, given=given: next(given))
        blocks = [allocator.malloc(20 * MIB) for _ in places]
        assert [block.address for block in blocks] == places
        for block in blocks:
            allocator.free(block)
        assert [allocator.malloc(20 * MIB).address for _ in places] == sorted(places)


def test_a_new_segment_lies_below_the_earlier_ones():
    allocator = Allocator()
    addresses = [allocator.malloc(size * MIB).address for size in (20, 1, 50, 5)]
    assert addresses == sorted(addresses, reverse=True)


def test_a_flush_makes_room_and_is_counted():
    allocator = Allocator(100 * MIB)
    allocator.free(allocator.malloc(60 * MIB))
    assert allocator.reserved_bytes == 60 * MIB
    allocator.malloc(80 * MIB)  # does not fit beside the cached block
    assert (allocator.reserved_bytes, allocator.retries, allocator.ooms) == (80 * MIB, 1, 0)


def test_out_of_memory_is_torchs_own_and_says_how_much():
    allocator = Allocator(100 * MIB, name="a card")
    kept = allocator.malloc(60 * MIB)
    with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate 80 MiB. a card has a total capacity of 100 MiB of which 40 MiB is free"):
        allocator.malloc(80 * MIB)
    assert allocator.memory_stats()["num_ooms"] == 1
    allocator.free(kept)
    allocator.malloc(80 * MIB)


def test_a_fraction_limits_what_is_reserved():
    allocator = Allocator(100 * MIB, settings=Settings(memory_fraction=0.5))
    allocator.malloc(50 * MIB)
    with pytest.raises(torch.OutOfMemoryError):
        allocator.malloc(1)


def test_oversize_blocks_are_neither_split_nor_wasted():
    allocator = Allocator(200 * MIB, settings=Settings(max_split_bytes=32 * MIB))
    allocator.free(allocator.malloc(100 * MIB))
    small = allocator.malloc(24 * MIB)  # must not take the block of 100
    assert allocator.reserved_bytes == 124 * MIB
    allocator.malloc(90 * MIB)  # takes it, whole
    assert (allocator.reserved_bytes, allocator.allocated_bytes) == (124 * MIB, 124 * MIB)
    allocator.free(small)


def test_an_oversize_block_is_released_before_the_whole_cache_is():
    allocator = Allocator(124 * MIB, settings=Settings(max_split_bytes=32 * MIB))
    small, large = allocator.malloc(24 * MIB), allocator.malloc(100 * MIB)
    allocator.free(small)
    allocator.free(large)
    allocator.malloc(40 * MIB)  # would waste 60 of the 100: those go, the 24 stay
    assert (allocator.retries, allocator.reserved_bytes) == (0, 64 * MIB)


def test_garbage_collection_releases_what_was_free_longest():
    allocator = Allocator(100 * MIB, settings=Settings(memory_fraction=1.0, garbage_collection_threshold=0.5))
    old, young = allocator.malloc(12 * MIB), allocator.malloc(32 * MIB)
    allocator.free(old)
    for _ in range(3):
        allocator.free(allocator.malloc(14 * MIB))
    allocator.free(young)
    allocator.malloc(40 * MIB)  # 58 MiB reserved are above half of 100: the 12 that nobody used for longest go
    assert (allocator.reserved_bytes, allocator.retries) == (86 * MIB, 0)


def test_expandable_segments_map_only_what_is_missing():
    allocator = Allocator(settings=Settings(expandable_segments=True))
    first = allocator.malloc(30 * MIB)
    assert allocator.reserved_bytes == 40 * MIB  # pages of 20 MiB
    allocator.free(first)
    second = allocator.malloc(50 * MIB)
    assert (allocator.reserved_bytes, second.address) == (60 * MIB, first.address)  # grown, not anew
    allocator.free(second)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0


def test_streams_do_not_share_blocks():
    allocator = Allocator()
    allocator.free(allocator.malloc(20 * MIB, stream="copy"))
    allocator.malloc(20 * MIB)
    assert allocator.reserved_bytes == 40 * MIB


def test_statistics_are_named_as_torch_names_them():
    allocator = Allocator()
    kept = [allocator.malloc(n) for n in (100, 3 * MIB, 3 * MIB)]
    allocator.free(kept.pop())
    stats = allocator.memory_stats()
    assert stats["allocated_bytes.all.current"] == 512 + 3 * MIB
    assert stats["allocated_bytes.all.peak"] == 512 + 6 * MIB
    assert stats["requested_bytes.all.current"] == 100 + 3 * MIB
    assert stats["reserved_bytes.small_pool.current"] == 2 * MIB
    assert stats["reserved_bytes.large_pool.current"] == 20 * MIB
    assert stats["segment.all.current"] == 2
    assert stats["inactive_split_bytes.all.current"] == 22 * MIB - 512 - 3 * MIB
    allocator.reset_peaks()
    assert allocator.memory_stats()["allocated_bytes.all.peak"] == 512 + 3 * MIB
