"""A window is the same samples on any ranks; a run goes on with other ranks where it stopped; loaders of both kinds resume exactly."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

import autoaccum
from autoaccum.data.sampler import WindowSampler
from autoaccum.distributed.fleet import Fleet
from autoaccum.distributed.speed_curves import AffineCurve
from tests.ranked import fleet_plan

SAMPLES, TARGET = 1003, 120
ONE = [AffineCurve(40, 0.02, 0.002)]
THREE = [AffineCurve(40, 0.02, 0.002), AffineCurve(35, 0.02, 0.004), AffineCurve(4, 0.02, 0.009)]
SIX = [AffineCurve(64, 0.02, 0.002)] * 2 + [AffineCurve(8, 0.05, 0.012)] * 4
NONE_FIRST = [AffineCurve(0, 0.0, 0.0), AffineCurve(9, 0.02, 0.01)]


class Numbers(Dataset):
    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        return index


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def samplers(curves, samples=SAMPLES, target=TARGET, **given):
    fleet = Fleet.planned(curves, target)

    def cuts(of):
        return [tuple(size for size in fleet.sizes(rank, of) if size) for rank in range(len(curves))]

    return [WindowSampler(samples, target, cuts, rank=rank, **{"seed": 5, **given}) for rank in range(len(curves))]


def windows(ranks):
    """Every window's indices, the ranks' parts in order; stand-ins left out."""
    read = [iter(each) for each in ranks]
    found = []
    for cuts in zip(*(list(each.windows(each.done)) for each in ranks)):
        parts = []
        for (_, _, sizes), indices in zip(cuts, read):
            for size in sizes:
                micro = next(indices)
                assert len(micro) == max(size, 1)
                parts += micro if size else []
        found.append(parts)
    for indices in read:
        assert next(indices, None) is None
    return found


@pytest.mark.parametrize("curves", [THREE, SIX, NONE_FIRST])
def test_windows_are_the_same_on_any_ranks_and_every_sample_comes_once(curves):
    alone, shared = windows(samplers(ONE)), windows(samplers(curves))
    assert alone == shared and sorted(flat(shared)) == list(range(SAMPLES))
    assert [len(each) for each in shared] == [120] * 8 + [43]


@given(st.integers(1, 60), st.integers(1, 25), st.lists(st.integers(0, 9), min_size=1, max_size=4), st.booleans())
@settings(deadline=None, max_examples=150)
def test_every_sample_comes_once_whatever_the_numbers(samples, target, most, drop_last):
    if not any(most):
        return
    shared = windows(samplers([AffineCurve(each, 0.1, 0.1 * (1 + rank)) for rank, each in enumerate(most)], samples, target, drop_last=drop_last))
    kept = samples // target * target if drop_last else samples
    assert len(flat(shared)) == len(set(flat(shared))) == kept


def test_a_run_moves_from_three_to_six_ranks_in_mid_epoch():
    alone, three = windows(samplers(ONE)), samplers(THREE)
    read = [iter(each) for each in three]
    for sampler, indices in zip(three, read):
        for _, _, sizes in list(sampler.windows(0))[:3]:
            for _ in sizes:
                next(indices)
    states = [each.state_dict() for each in three]
    assert states[0] == states[1] == states[2]
    assert not {"rank", "world_size"} & set(states[0])
    six = samplers(SIX)
    for each in six:
        each.load_state_dict(states[0])
    assert alone[:3] + windows(six) == alone


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_stateful_loader_resumes_exactly(workers, rank):
    def loader():
        return StatefulDataLoader(Numbers(), batch_sampler=samplers(THREE)[rank], num_workers=workers)

    everything = [batch.tolist() for batch in loader()]
    for cut in (0, 1, 3, 7, len(everything) - 1):
        first = loader()
        read = iter(first)
        head = [next(read).tolist() for _ in range(cut)]
        state = first.state_dict()
        del read
        second = loader()
        second.load_state_dict(state)
        assert head + [batch.tolist() for batch in second] == everything, cut


@pytest.mark.parametrize("workers", [0, 2])
def test_windows_know_what_was_trained_on_not_what_was_read_ahead(workers):
    def made():
        plan = fleet_plan(1, 3, [70, 35, 15], [35, 35, 4])
        return plan.windows(DataLoader(Numbers(), batch_sampler=plan.batch_sampler(Numbers(), seed=5), num_workers=workers))

    def indices(window):
        return torch.cat(list(window.parts)).tolist()

    everything = [indices(window) for window in made()]
    assert len(made()) == len(everything) == 9
    first, head = made(), []
    for window in first:
        head.append(indices(window))
        if len(head) == 4:
            break
    state = first.state_dict()
    assert (state["epoch"], state["done"]) == (0, 480)
    second = made()
    second.load_state_dict(state)
    assert head + [indices(window) for window in second] == everything
    assert (second.state_dict()["epoch"], second.state_dict()["done"]) == (1, 0)
    assert [indices(window) for window in second] != everything  # the next epoch has another order


def test_an_epoch_that_was_left_early_is_not_gone_on_with():
    (sampler,) = samplers(ONE)
    first = list(sampler)
    sampler.set_epoch(0)
    next(iter(sampler))
    second = list(sampler)
    assert len(second) == len(first) and second != first
    sampler.set_epoch(1)
    assert list(sampler) == second


def test_a_state_of_something_else_is_refused():
    (sampler,) = samplers(ONE)
    state = sampler.state_dict()
    for name, value in (("length", 7), ("seed", 1), ("target", 60)):
        with pytest.raises(autoaccum.PlanError, match=f"the state is of {name} {value}"):
            sampler.load_state_dict({**state, name: value})
    inside = {**state, "in_window": 1}
    plan = fleet_plan(0, 3, [70, 35, 15], [35, 35, 4])
    loader = DataLoader(Numbers(), batch_sampler=plan.batch_sampler(Numbers(), seed=5))
    loader.batch_sampler.load_state_dict(inside)
    with pytest.raises(autoaccum.PlanError, match="inside a window"):
        next(iter(plan.windows(loader)))


def test_loaders_that_do_not_give_every_rank_the_same_are_refused():
    plan = fleet_plan(1, 3, [70, 35, 15], [35, 35, 4])
    with pytest.raises(autoaccum.PlanError, match="every rank in an order of its own"):
        plan.windows(DataLoader(Numbers(), batch_size=8, shuffle=True))
    split = torch.utils.data.DistributedSampler(Numbers(), num_replicas=3, rank=1)
    with pytest.raises(autoaccum.PlanError, match="DistributedSampler already"):
        plan.windows(DataLoader(Numbers(), batch_size=8, sampler=split))
    with pytest.raises(autoaccum.PlanError, match="drop_last=True"):
        plan.windows(DataLoader(Numbers(), batch_sampler=plan.batch_sampler(Numbers())), drop_last=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_that_read_the_same_stream_keep_their_own_part(workers):
    parts = []
    for rank in range(3):
        plan = fleet_plan(rank, 3, [70, 35, 15], [35, 35, 4])
        parts.append(
            [
                torch.cat(list(window.parts)).tolist() if window.parts else []
                for window in plan.windows(DataLoader(Numbers(), batch_size=32, num_workers=workers))
            ]
        )
    together = [flat(of) for of in zip(*parts)]
    assert [len(each) for each in together] == [120] * 8 + [43] and flat(together) == list(range(SAMPLES))
    assert [len(each) for each in parts[0]][:8] == [70] * 8


@settings(max_examples=40, deadline=None)
@given(
    ahead=st.lists(st.integers(0, 12), min_size=3, max_size=3),
    after=st.integers(0, 7),
    shares=st.sampled_from([THREE[::-1], [ONE[0], *THREE[:2]], [*THREE[:2], AffineCurve(0, 0.0, 0.0)]]),
)
def test_new_shares_begin_at_a_window_that_no_rank_has_read(ahead, after, shares):
    """Loaders read ahead unlike far; the parts of every window are its samples, whichever shares they were cut by."""
    ranks, new = samplers(THREE), Fleet.planned(shares, TARGET)
    drawn = [iter(each) for each in ranks]
    held = [[next(each)] for each in drawn]
    sizes = [each.windows(0) for each in ranks]
    found = []
    for number in range(9):
        if number == after:
            for rank in range(3):
                held[rank] += itertools.islice(drawn[rank], ahead[rank])
            place = max(each.unread for each in ranks)
            assert {each.share_from(place, new.cuts) for each in ranks} == {1}
        parts = []
        for rank in range(3):
            start, _, cut = next(sizes[rank])
            assert ranks[rank].version((0, start)) == (number >= after and (0, start) >= place)
            for size in cut:
                micro = held[rank].pop(0) if held[rank] else next(drawn[rank])
                assert len(micro) == max(size, 1)
                parts += micro if size else []
        found += parts
    assert found == torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(5)).tolist()
    assert all(next(each, None) is None for each in drawn) and not any(held)
    with pytest.raises(autoaccum.PlanError, match="are read up to"):
        ranks[0].share_from((0, 0), new.cuts)
    ranks[0].set_epoch(0)  # back to where the old shares were: all is read with the last ones
    assert ranks[0].version((0, 0)) == 1
