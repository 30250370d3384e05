"""Ranks learn what each can hold while they train, share windows out by it, and share them anew where one slows down."""

import pytest

from tests.ranked import in_ranks


def seconds(shares, speeds):
    return max(share * speed for share, speed in zip(shares, speeds))


def test_shares_settle_within_six_windows_and_follow_a_rank_that_slows_down():
    speeds = [0.003, 0.006, 0.012]
    told = in_ranks("learned", speeds, [None, None, 100], 44, 8, 3)
    assert [each["difference"] < 1e-14 for each in told] == [True] * 3 and not any(each["learning"] for each in told)
    shares = told[0]["shares"]
    assert all(each["shares"] == shares for each in told) and all(sum(each) == 60 for each in shares)
    assert shares[0] == [20, 20, 20]
    best = 60 / sum(1 / speed for speed in speeds)
    assert seconds(shares[6], speeds) < 1.15 * best  # whole samples, and cores that other tests use
    slowed = [0.009, 0.006, 0.012]
    assert seconds(shares[-1], slowed) < 1.15 * 60 / sum(1 / speed for speed in slowed) < seconds(shares[6], slowed)
    assert told[1]["rescued"][3] and not any(told[0]["rescued"])


def test_a_rank_with_little_memory_gets_what_it_can_run():
    told = in_ranks("learned", [0.0, 0.0, 0.0], [None, None, 60], 8)
    assert max(each["difference"] for each in told) < 1e-14
    assert 0 < told[2]["most"][2] <= 30  # of 2 MiB each


def test_shares_follow_in_a_sampler_from_the_next_window_that_no_worker_has_read():
    """The ranks' loaders read ahead unlike far: not at all, and with one and two workers, which hold two batches each."""
    told = in_ranks("learned", [0.003, 0.006, 0.012], [None, None, 100], 20, None, None, [0, 1, 2])
    assert [each["difference"] < 1e-14 for each in told] == [True] * 3 and not any(each["learning"] for each in told)
    shares = told[0]["shares"]
    assert all(each["shares"] == shares for each in told) and all(sum(each) == 60 for each in shares)
    assert shares[0] == [20, 20, 20] and shares[-1][0] > shares[-1][1] > shares[-1][2]  # by times on cores that other tests use, so no more is asked


@pytest.mark.parametrize("turns", [False, True])
def test_a_rank_may_have_read_its_whole_epoch_ahead_and_loaders_may_take_turns(turns):
    """Epochs of four windows, of which two workers read all at once."""
    told = in_ranks("learned", [0.003, 0.006, 0.012], [None] * 3, 24, None, None, [0, 1, 2], None, 240, turns)
    assert [each["difference"] < 1e-14 for each in told] == [True] * 3
    shares = told[0]["shares"]
    assert all(each["shares"] == shares for each in told) and shares[-1][0] > shares[-1][1] > shares[-1][2]


@pytest.mark.parametrize("workers", [None, [0, 1, 2]])
def test_the_shares_of_a_plan_are_made_anew_where_that_is_asked_for(workers):
    told = in_ranks("learned", [0.003, 0.006, 0.012], [None] * 3, 20, None, None, workers, 6)
    assert [each["difference"] < 1e-14 for each in told] == [True] * 3
    shares = told[0]["shares"]
    assert all(each["shares"] == shares for each in told) and shares[:6] == [[20, 20, 20]] * 6
    assert shares[-1][0] > shares[-1][1] > shares[-1][2]
    if workers:  # the sampler draws micro-batches of at most 10
        assert [each["parts"][-1] for each in told] == [-(-share // 10) for share in shares[-1]]
