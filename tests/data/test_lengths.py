"""Samples of unlike lengths: the worst batch, plans per length, and micro-batches by length."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

import autoaccum
from autoaccum.data import lengths
from autoaccum.devices.cpu import Cpu
from tests.plans import by_hand
from tests.tuner.test_in_place import limit_for

MIB = 2**20
WIDTH = 8


class Texts:
    """One sample is twenty times as long as the median."""

    def __init__(self, samples=240, longest=600):
        numbers = random.Random(0)
        self.lengths = [numbers.randint(20, 40) for _ in range(samples)]
        self.lengths[samples // 3] = longest

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        return torch.full((self.lengths[index], WIDTH), 0.1 + index / len(self))


def padded(samples):
    return nn.utils.rnn.pad_sequence(samples, batch_first=True), torch.tensor([float(len(each)) for each in samples])


class Hungry(nn.Module):
    """Keeps `kib` KiB for every position of every sample."""

    def __init__(self, kib=16):
        super().__init__()
        self.inner = nn.Linear(WIDTH, kib * 256)

    def forward(self, inputs):
        return self.inner(inputs).exp().mean(-1)


def loss(model, batch):
    inputs, targets = batch
    mask = inputs[..., 0] != 0
    return F.mse_loss((model(inputs) * mask).sum(-1), targets)


def job(batch, kib=16):
    torch.manual_seed(0)
    model = Hungry(kib)
    return autoaccum.Job(model, torch.optim.SGD(model.parameters(), lr=1e-6), loss, batch)


def test_the_worst_batch_has_the_longest_samples_first():
    texts = Texts()
    inputs, of = autoaccum.worst_case(texts, 5, collate=padded)
    assert of.tolist() == sorted(texts.lengths, reverse=True)[:5] and inputs.shape == (5, 600, WIDTH)
    make_batch = autoaccum.worst_case(DataLoader(texts, batch_size=2, collate_fn=padded))
    assert torch.equal(make_batch(5)[0], inputs) and len(make_batch(300)[0]) == 300
    by_hand = autoaccum.worst_case(texts, 3, collate=padded, length=lambda sample: -len(sample))
    assert by_hand[1].tolist() == sorted(texts.lengths)[:3]
    assert autoaccum.worst_case(texts, 2, collate=padded, length=range(240))[1].tolist() == [texts.lengths[239], texts.lengths[238]]


def test_a_stream_is_gone_through_once_and_gives_its_longest():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([{"ids": [1] * n, "text": "x"} for n in (3, 9, 5, 9, 1)])

    assert [len(each["ids"]) for each in autoaccum.worst_case(Stream(), 3, collate=list)] == [9, 9, 5]
    with pytest.raises(autoaccum.PlanError, match=r"worst_case\(stream, n="):
        autoaccum.worst_case(Stream())


def test_data_that_gives_no_worst_batch_is_refused():
    with pytest.raises(autoaccum.PlanError, match="no samples"):
        autoaccum.worst_case([], 3)
    with pytest.raises(autoaccum.PlanError, match="2 lengths were given for 240 samples"):
        autoaccum.worst_case(Texts(), 3, length=[1, 2])
    with pytest.raises(autoaccum.PlanError, match="give collate=, as your DataLoader has"):
        autoaccum.worst_case(Texts(), 3)
    with pytest.raises(autoaccum.PlanError, match="whole batches"):
        autoaccum.worst_case(DataLoader(Texts(), batch_size=None), 3)


@pytest.mark.slow
def test_after_tuning_on_the_worst_batch_an_epoch_survives_under_the_limit():
    """On an ordinary batch the answer would be several times as large, and the long sample would end the epoch."""
    texts = Texts()
    allowed = limit_for(250)
    worst = job(autoaccum.worst_case(texts, collate=padded))
    plan = autoaccum.tune(worst, target_batch=60, memory_limit=allowed)
    mild = autoaccum.tune(job(padded([texts[index] for index in range(8)])), target_batch=60, memory_limit=allowed)
    assert plan.micro_batch < mild.micro_batch
    device = Cpu()
    device.prepare()
    for chosen, survives in ((plan, True), (mild, False)):
        trained = job(padded([texts[0]]))
        loop = autoaccum.Accumulator(trained, chosen, on_oom="raise")
        loader = DataLoader(texts, batch_sampler=chosen.batch_sampler(texts), collate_fn=padded)
        steps = 0
        try:
            with device.capped(allowed):
                for window in chosen.windows(loader):
                    loop.step(window)
                    steps += 1
        except RuntimeError as error:
            assert not survives and "alloc" in str(error)
        assert (steps == 4) == survives
        del trained, loop


@pytest.mark.slow
def test_a_plan_for_every_length_in_one_search():
    def make_batch(n, length):
        return torch.full((n, length, WIDTH), 0.1), torch.zeros(n)

    plan = autoaccum.tune(job(make_batch), target_batch=96, memory_limit=limit_for(90), lengths=[50, 600, 200])
    assert [length for length, _ in plan.per_length] == [50, 200, 600]
    sizes = [each.micro_batch for _, each in plan.per_length]
    assert sizes[0] > sizes[1] > sizes[2] == plan.micro_batch
    for length, each in plan.per_length:
        assert sum(each.micro_batches) == 96 and each.trials[-1].full and each.trials[-1].outcome == "fits"
        assert each.shapes["batch[0]"] == (each.micro_batch, length, WIDTH)
        # What fitted longer samples is where the search for shorter ones begins.
        assert all(trial.micro_batch > plan.micro_batch for trial in each.trials if length < 600 and not trial.full)
    assert plan.for_length(1).micro_batch == plan.for_length(50).micro_batch == sizes[0] and plan.for_length(51).micro_batch == sizes[1]
    with pytest.raises(autoaccum.PlanError, match="the longest that was planned is 600, not 601"):
        plan.for_length(601)
    assert "up to 200 long: 96 = " in plan.explain()


def test_plans_per_length_are_saved(tmp_path):
    plan = lengthy(60, {50: 30, 600: 4})
    plan.save(tmp_path / "plan.json")
    assert autoaccum.Plan.load(tmp_path / "plan.json") == plan


def test_tensors_are_brought_to_a_length():
    batch = {"ids": torch.arange(12).reshape(2, 6), "mask": torch.ones(2, 6), "label": torch.zeros(2), "name": "x"}
    at = lengths.AtLength(batch)
    at.length = 8
    found = at(3)
    assert found["ids"].shape == (3, 8) and found["ids"][0].tolist() == [0, 1, 2, 3, 4, 5, 0, 1] and found["label"].shape == (3,)
    at.length = 4
    assert at(1)["ids"].tolist() == [[0, 1, 2, 3]]
    with pytest.raises(autoaccum.JobError, match=r"ids has 6, mask has 5"):
        lengths.AtLength({"ids": torch.zeros(2, 6), "mask": torch.zeros(2, 5)})(2)
    for wrong in ([0], 600, []):
        with pytest.raises(autoaccum.UsageError, match="lengths must be a list of whole numbers"):
            autoaccum.tune(job(padded([Texts()[0]])), target_batch=4, lengths=wrong)
    with pytest.raises(autoaccum.JobError, match=r"make_batch\(n, length\), and this one does not"):
        autoaccum.tune(job(autoaccum.worst_case(Texts(), collate=padded)), target_batch=4, lengths=[60])


def lengthy(target, sizes):
    """A plan with lengths, as if they had been measured."""
    from dataclasses import replace

    plans = [(length, by_hand(None, target, size)) for length, size in sorted(sizes.items())]
    return replace(plans[-1][1], per_length=tuple(plans))


@given(of=st.lists(st.integers(1, 600), min_size=1, max_size=200), target=st.integers(1, 90), sizes=st.tuples(*[st.integers(1, 40)] * 3))
def test_every_window_has_the_target_and_no_micro_batch_more_than_its_longest_allows(of, target, sizes):
    small, middle, large = sorted(sizes)
    plan = lengthy(target, {50: large, 200: middle, 600: small})
    sampler = plan.batch_sampler(of, shuffle=True, seed=3, length=of)
    seen, window = [], []
    for piece in sampler:
        assert len(piece) <= plan.for_length(max(of[index] for index in piece)).micro_batch
        window += piece
        if sampler.in_window == 0:
            assert len(window) == min(target, len(of) - len(seen))
            seen, window = seen + window, []
    assert sorted(seen) == list(range(len(of)))


def test_the_gradient_of_windows_by_length_is_that_of_the_whole_batch():
    texts = Texts(90, 300)
    plan = lengthy(30, {30: 12, 60: 8, 300: 3})
    trained = job(padded([texts[0]]), kib=1)
    trained.model.double()
    whole = job(padded([texts[0]]), kib=1)
    whole.model.double()

    def in_double(model, batch):
        return loss(model, (batch[0].double(), batch[1].double()))

    sampler = plan.batch_sampler(texts, length=texts.lengths)
    windows = [[]]
    for piece in sampler:
        windows[-1] += piece
        if sampler.in_window == 0:
            windows.append([])
    sampler.set_epoch(0)
    loop = autoaccum.Accumulator(trained, plan)
    ran = [loop.step(window, in_double) for window in plan.windows(DataLoader(texts, batch_sampler=sampler, collate_fn=padded))]
    assert [each.samples for each in ran] == [30, 30, 30] and max(each.micro_batches for each in ran) < 6
    for indices in windows[:-1]:
        whole.optimizer.zero_grad()
        in_double(whole.model, padded([texts[index] for index in indices])).backward()
        whole.optimizer.step()
    for ours, theirs in zip(trained.model.parameters(), whole.model.parameters()):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=0)


def test_a_sample_that_is_longer_than_was_planned_is_named():
    plan = lengthy(4, {30: 4, 60: 2})
    with pytest.raises(autoaccum.PlanError, match="sample 2 has a length of 61, and the longest that was planned is 60"):
        list(plan.batch_sampler([1, 2, 3], length=[10, 20, 61]))
    with pytest.raises(autoaccum.PlanError, match="the plan knows no lengths"):
        by_hand(None, 4, 2).batch_sampler([1, 2, 3], length=[10, 20, 61])


def test_what_runs_out_by_length_is_rescued_in_smaller_pieces_of_each():
    texts = Texts(60, 300)
    plan = lengthy(30, {60: 12, 300: 4})
    seen = []

    def runs_out(model, batch):
        seen.append(len(batch[0]))
        if len(batch[0]) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return loss(model, batch)

    loop = autoaccum.Accumulator(job(padded([texts[0]]), kib=1), plan)
    results = [
        loop.step(window, runs_out)
        for window in plan.windows(DataLoader(texts, batch_sampler=plan.batch_sampler(texts, length=texts.lengths), collate_fn=padded))
    ]
    assert [each.samples for each in results] == [30, 30] and any(each.rescued for each in results)
    assert max(seen[-5:]) <= 6


def picture(height, width):
    return torch.zeros(3, height, width), torch.zeros(4)


def framed(samples):
    """Padded to the tallest and to the widest of the batch."""
    height, width = (max(pixels.shape[place] for pixels, _ in samples) for place in (1, 2))
    pixels = [F.pad(each, (0, width - each.shape[2], 0, height - each.shape[1])) for each, _ in samples]
    return torch.stack(pixels), torch.stack([boxes for _, boxes in samples])


PICTURES = [picture(19, 19) for _ in range(20)] + [picture(90, 4), picture(4, 90)]


@given(sizes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=20), n=st.integers(2, 6))
def test_no_batch_that_a_loader_can_give_is_larger_than_the_worst_case(sizes, n):
    pictures = [picture(*size) for size in sizes]
    worst = autoaccum.worst_case(pictures, n, collate=framed)[0]
    most = min(n, len(sizes))
    tallest, widest = max(height for height, _ in sizes), max(width for _, width in sizes)
    assert len(worst) == n
    if most >= 2:
        assert tuple(worst.shape[2:]) == (tallest, widest)


@pytest.mark.parametrize(
    "data",
    [PICTURES, iter(PICTURES), [{"image": pixels, "boxes": boxes} for pixels, boxes in PICTURES]],
    ids=["dataset", "stream", "fields"],
)
def test_portrait_and_landscape_together_are_larger_than_any_square(data):
    def collate(samples):
        return framed([sample if isinstance(sample, tuple) else (sample["image"], sample["boxes"]) for sample in samples])

    assert autoaccum.worst_case(data, 8, collate=collate)[0].shape == (8, 3, 90, 90)


def test_a_length_of_two_dimensions_and_pictures_that_are_not_tensors():
    class Picture:
        def __init__(self, width, height):
            self.size = (width, height)  # as PIL has it

    def collate(samples):
        return torch.zeros(len(samples), max(each.size[1] for each in samples), max(each.size[0] for each in samples))

    pictures = [Picture(19, 19), Picture(90, 4), Picture(4, 90), Picture(20, 20)]
    assert autoaccum.worst_case(pictures, 3, collate=collate).shape == (3, 90, 90)
    assert autoaccum.worst_case(pictures, 3, collate=collate, length=lambda each: each.size).shape == (3, 90, 90)
    assert autoaccum.worst_case(pictures, 3, collate=collate, length=[each.size for each in pictures]).shape == (3, 90, 90)
    assert autoaccum.worst_case(pictures, 1, collate=collate).shape in {(1, 20, 20), (1, 90, 4), (1, 4, 90)}


def test_samples_of_unlike_buckets_are_never_put_together():
    """A loader that batches videos of one resolution and one number of frames."""
    clips = [torch.zeros(frames, side, side) for frames, side in [(4, 32), (4, 32), (16, 8), (16, 8), (8, 20), (8, 20)]]
    worst = autoaccum.worst_case(clips, 2, bucket=lambda clip: tuple(clip.shape), collate=torch.stack)
    assert worst.shape == (2, 4, 32, 32)


def test_texts_cost_no_second_batch():
    """Tokens, labels and mask vary together: one dimension."""
    made = []

    def collate(samples):
        made.append(len(samples))
        return {name: torch.nn.utils.rnn.pad_sequence([torch.tensor(each[name]) for each in samples], batch_first=True) for name in samples[0]}

    texts = [{"ids": [1] * length, "labels": [1] * length} for length in (3, 9, 5)]
    assert autoaccum.worst_case(texts, collate=collate)(2)["ids"].shape == (2, 9) and made == [2]
