"""A plan in tokens that is learned in the first windows of training: every step is the mean over the tokens of its window."""

import pytest
import torch
from torch.utils.data import DataLoader

import autoaccum
from autoaccum.errors import PlanError, UsageError
from tests.devices.fresh import fresh
from tests.loop.test_rescue import TEXT
from tests.loop.test_tokens import DATA, end_to_end, gradient, not_padding, pair
from tests.ranked import Bigrams, of_labels, put_together


def windows_and_errors(loss=of_labels, batch_size=40, collate=put_together, target=150, **given):
    """What learns, and of every window its result and its relative gradient error."""
    model = Bigrams().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(gradient(model).clone()))
    loop, found, start = autoaccum.Accumulator(model, optimizer, target_tokens=target, **given), [], 0
    for window in loop.windows(DataLoader(DATA, batch_size=batch_size, collate_fn=collate)):
        result = loop.step(window, loss)
        model.zero_grad()
        of_labels(model, put_together(DATA[start : start + window.samples])).backward()
        found.append((result, float((gradient(model) - seen[-1]).norm() / gradient(model).norm())))
        model.zero_grad()
        start += window.samples
    assert start == len(DATA)
    return loop, found


@pytest.mark.parametrize("batch_size", [1, 7, 200])
@pytest.mark.parametrize(("loss", "given"), [(of_labels, {}), (pair, {}), (of_labels, {"count": not_padding})])
def test_every_window_is_exact_from_the_first_on(batch_size, loss, given):
    loop, found = windows_and_errors(loss, batch_size, max_micro_batch=4, **given)
    assert max(error for _, error in found) < 1e-14
    assert all(150 <= result.count < 162 for result, _ in found[:-1])
    assert not loop.plan.learning and loop.plan.micro_tokens <= 4 * 12 and loop.plan.target_tokens == 150


def test_without_a_limit_a_window_becomes_one_micro_batch():
    loop, found = windows_and_errors(batch_size=200)
    assert [result.micro_batches for result, _ in found[2:]] == [1] * len(found[2:])
    assert str(loop.plan).startswith("150 tokens a step, in micro-batches of up to ")


def test_what_runs_out_is_refused_and_the_window_runs_again():
    ran = []

    def loss(model, batch):
        ran.append(batch["ids"].numel())
        if ran[-1] > 70:
            raise torch.OutOfMemoryError(TEXT)
        return of_labels(model, batch)

    loop, found = windows_and_errors(loss, 200)
    assert max(error for _, error in found) < 1e-14
    assert sum(result.rescued is not None for result, _ in found) <= 2 and sum(tokens > 70 for tokens in ran) <= 3
    assert not loop.plan.learning and loop.plan.micro_tokens <= 72


def test_a_split_of_ones_own_and_batches_that_nobody_can_cut():
    def split(batch, sizes):
        return [dict(zip(batch, pieces)) for pieces in zip(*(field.split(list(sizes)) for field in batch.values()))]

    for given in ({"split": split}, {"split": split, "samples": lambda batch: len(batch["ids"])}):
        _, found = windows_and_errors(batch_size=40, max_micro_batch=4, **given)
        assert max(error for _, error in found) < 1e-14
    model = Bigrams().double()
    loop = autoaccum.Accumulator(model, torch.optim.SGD(model.parameters()), target_tokens=60, samples=lambda batch: int((batch["ids"] > 0).sum()) // 4 + 1)
    results = [
        loop.step(window, lambda model, batch: of_labels(model, batch)) for window in loop.windows(DataLoader(DATA, batch_size=5, collate_fn=end_to_end))
    ]
    assert all(result.count >= 60 for result in results[:-1]) and not loop.plan.learning


def test_under_a_real_limit_it_fills_what_fits():
    """A token takes 8 KiB in forward and backward: 60 MiB hold about 31 samples of 128 tokens, and a window has about 115 of those."""
    seen = fresh(
        """
import json, random
import torch
from torch import nn
import autoaccum
from tests.loop.test_learner import limit_above

torch.set_num_threads(1)

class Hungry(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, ids):
        return (self.weight * torch.ones(ids.numel(), 1024)).exp().mean()

draw = random.Random(0)
data = [torch.ones(draw.choice([20, 60, 128]), dtype=torch.long) for _ in range(1400)]

def collate(samples):
    ids = nn.utils.rnn.pad_sequence(samples, batch_first=True)
    return {"ids": ids, "labels": nn.utils.rnn.pad_sequence(samples, batch_first=True, padding_value=-100)}

def learned(limit):
    model = Hungry()
    loop = autoaccum.Accumulator(model, torch.optim.Adam(model.parameters()), target_tokens=8192, memory_limit=limit)
    loader = torch.utils.data.DataLoader(data, batch_size=512, collate_fn=collate)
    return loop, [loop.step(window, lambda model, batch: model(batch["ids"])) for window in loop.windows(loader)]

learned(None)  # libraries load
loop, results = learned(limit_above(60))
plan = loop.plan
print(json.dumps({
    "learning": plan.learning, "windows": plan.learned_windows, "tokens": plan.micro_tokens, "peak": plan.peak_bytes, "budget": plan.budget_bytes,
    "rescued": sum(each.rescued is not None for each in results), "steps": [each.micro_batches for each in results],
}))
"""
    )
    assert not seen["learning"] and seen["rescued"] <= 1 and seen["windows"] <= 8 and seen["peak"] <= seen["budget"], seen
    assert 20 * 128 <= seen["tokens"] <= 32 * 128 and max(seen["steps"][8:]) <= 6, seen


def test_refused_in_a_sentence_with_the_way_out():
    model = Bigrams()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with pytest.raises(UsageError, match="target_batch=8 and target_tokens=90 both say how much one step sees: give one"):
        autoaccum.Accumulator(model, optimizer, target_batch=8, target_tokens=90)
    with pytest.raises(UsageError, match="equal=True makes micro-batches of equal samples, and with target_tokens they are filled by tokens: leave equal out"):
        autoaccum.Accumulator(model, optimizer, target_tokens=90, equal=True)
    with pytest.raises(UsageError, match="cache=True keeps micro-batches of samples, and with target_tokens they are filled by tokens: leave cache out"):
        autoaccum.Accumulator(model, optimizer, target_tokens=90, cache=True)
    loop = autoaccum.Accumulator(model, optimizer, target_tokens=90)
    assert str(loop.plan).startswith("90 tokens a step, in micro-batches that the first windows will show")
    with pytest.raises(
        PlanError, match=r"still learned, so it does not know yet how many tokens share a micro-batch: give loop.windows a loader with a batch_size"
    ):
        loop.plan.batch_sampler(DATA, tokens=lambda sample: len(sample["ids"]))
    with pytest.raises(PlanError, match="what counts as a token is not known, because the batch has no tensor under 'labels'"):
        next(iter(loop.windows(DataLoader(torch.ones(50, 3), batch_size=10))))
    for window in loop.windows(DataLoader(DATA, batch_size=200, collate_fn=put_together)):  # the first remedy
        loop.step(window, of_labels)
    assert not loop.plan.learning
    loader = DataLoader(DATA, batch_sampler=loop.plan.batch_sampler(DATA, tokens=lambda sample: len(sample["ids"])), collate_fn=put_together)  # the second
    assert all(loop.step(window, of_labels).micro_batches <= 2 for window in loop.windows(loader))
