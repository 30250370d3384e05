"""Training with an effective batch in tokens: every step is the mean over the tokens of its window, in double precision."""

import warnings
from functools import partial

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

import autoaccum
from autoaccum.errors import JobError, PlanError, UsageError
from tests import command_line
from tests.ranked import Bigrams, in_ranks, of_labels, put_together, ragged
from tests.tuner.test_in_place import limit_for

DATA = ragged()


def tuned(loss=of_labels, target=150, batch=None, **given):
    model = Bigrams().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    batch = autoaccum.worst_case(DATA, collate=put_together) if batch is None else batch
    plan = autoaccum.tune(model, optimizer, loss, batch, target_tokens=target, max_micro_batch=4, **given)
    return model, optimizer, plan


def gradient(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def errors(model, optimizer, plan, loader, order, loss=of_labels, collate=put_together, **given):
    """The relative gradient error of every window, and its samples. `given` goes to the loop."""
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(gradient(model).clone()))
    loop, found, start = autoaccum.Accumulator(model, optimizer, plan, **given), [], 0
    for window in plan.windows(loader, count=given.get("count")):
        result = loop.step(window, loss)
        model.zero_grad()
        of_labels(model, put_together([DATA[index] for index in order[start : start + window.samples]])).backward()
        found.append((float((gradient(model) - seen[-1]).norm() / gradient(model).norm()), window.samples, result))
        model.zero_grad()
        start += window.samples
    assert start == len(DATA)
    return found


def test_a_plan_of_tokens_says_what_it_counts():
    _, _, plan = tuned()
    assert (plan.target_tokens, plan.micro_tokens, plan.target_batch, plan.micro_batch) == (150, 48, 13, 4)  # 13 of the longest, 12 tokens each
    assert str(plan).startswith("150 tokens a step, in micro-batches of up to 48 (4 x 12)     about 4 a step on cpu")
    assert autoaccum.Plan.from_dict(plan.as_dict()) == plan


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_any_loader_is_regrouped_into_windows_of_tokens(batch_size):
    model, optimizer, plan = tuned()
    found = errors(model, optimizer, plan, DataLoader(DATA, batch_size=batch_size, collate_fn=put_together), range(len(DATA)))
    assert max(error for error, _, _ in found) < 1e-14
    assert all(150 <= result.count < 162 for _, _, result in found[:-1])
    assert len({samples for _, samples, _ in found}) > 1


@pytest.mark.parametrize("workers", [0, 2])
def test_the_sampler_fills_micro_batches_with_like_lengths(workers):
    model, optimizer, plan = tuned()
    sampler = plan.batch_sampler(DATA, seed=3, tokens=lambda sample: len(sample["ids"]))
    order = torch.randperm(len(DATA), generator=torch.Generator().manual_seed(3)).tolist()
    loader = DataLoader(DATA, batch_sampler=sampler, collate_fn=put_together, num_workers=workers)
    found = errors(model, optimizer, plan, loader, order)
    assert max(error for error, _, _ in found) < 1e-14
    plain = tuned()
    in_order = errors(*plain, DataLoader(DATA, batch_size=7, collate_fn=put_together), range(len(DATA)))
    assert sum(result.micro_batches for _, _, result in found) < 0.7 * sum(result.micro_batches for _, _, result in in_order)


def end_to_end(samples):
    """One after the other, without padding: what models with variable-length attention take."""
    ids = torch.cat([sample["ids"] for sample in samples])[None]
    return {"ids": ids, "labels": ids.clone()}


def test_samples_put_one_after_the_other_fill_the_budget_by_their_sum():
    model, optimizer, plan = tuned()
    sampler = plan.batch_sampler(DATA, seed=3, tokens=[len(sample["ids"]) for sample in DATA], padded=False)
    order = torch.randperm(len(DATA), generator=torch.Generator().manual_seed(3)).tolist()
    loader = DataLoader(DATA, batch_sampler=sampler, collate_fn=end_to_end)
    assert all(part["ids"].numel() <= 48 for window in plan.windows(loader) for part in window.parts)
    sampler.set_epoch(0)
    found = errors(model, optimizer, plan, loader, order)
    assert max(error for error, _, _ in found) < 1e-14
    assert all(result.micro_batches == 4 for _, _, result in found[:-1])  # 150 to 161 tokens in 48s


def pair(model, batch):
    return F.cross_entropy(model(batch["ids"]).flatten(0, 1), batch["labels"].flatten(), reduction="sum"), (batch["labels"] != -100).sum()


def not_padding(batch):
    return (batch["labels"] >= 0).sum()


@pytest.mark.parametrize(("loss", "given"), [(pair, {}), (of_labels, {"count": not_padding})])
def test_a_pair_and_a_count_of_ones_own_are_per_token_too(loss, given):
    model, optimizer, plan = tuned(loss, **given)
    found = errors(model, optimizer, plan, DataLoader(DATA, batch_size=7, collate_fn=put_together), range(len(DATA)), loss, **given)
    assert max(error for error, _, _ in found) < 1e-14


def test_by_hand_the_weights_are_by_tokens():
    model, _, plan = tuned()
    for window in plan.windows(DataLoader(DATA, batch_size=7, collate_fn=put_together)):
        for micro in plan.split(window):
            (of_labels(model, micro.batch) * micro.weight).backward()
        break
    seen = gradient(model).clone()
    model.zero_grad()
    of_labels(model, put_together(DATA[: window.samples])).backward()
    assert float((gradient(model) - seen).norm()) < 1e-14


def test_a_mean_over_samples_is_told():
    def by_sample(model, batch):
        losses = F.cross_entropy(model(batch["ids"]).flatten(0, 1), batch["labels"].flatten(), reduction="none").view(batch["labels"].shape)
        return (losses.sum(1) / (batch["labels"] != -100).sum(1)).mean()

    with pytest.warns(
        UserWarning, match=r"a scalar is taken for the mean over the labels of its batch.*return .loss_sum, count., with the labels that it counts"
    ):
        tuned(by_sample)


def test_a_scalar_of_a_batch_without_labels_is_asked_about():
    def loss(model, batch):
        return model(batch).mean()

    with pytest.raises(JobError, match=r"a target in tokens needs a loss per token, and this one is a scalar of a batch without 'labels'.*give count="):
        tuned(loss, batch=torch.ones(4, 12, dtype=torch.long))
    model, optimizer, plan = tuned(loss, batch=torch.ones(4, 12, dtype=torch.long), count=lambda batch: batch.numel())  # the remedy
    loop = autoaccum.Accumulator(model, optimizer, plan, count=lambda batch: batch.numel())
    windows = plan.windows(torch.utils.data.DataLoader(torch.ones(40, 12, dtype=torch.long), batch_size=8), count=lambda batch: batch.numel())
    assert [loop.step(window, loss).count for window in windows] == [156, 156, 156, 12]


def test_a_step_of_other_tokens_than_the_target_is_told():
    model, optimizer, plan = tuned()
    loop = autoaccum.Accumulator(model, optimizer, plan)
    with pytest.raises(PlanError, match=r"a step of more tokens than the target of 150: loop over loop.windows"):
        loop.step(put_together(DATA), of_labels)
    loop.step(put_together(DATA[:5]), of_labels)
    with pytest.raises(PlanError, match=r"a step of fewer tokens than the target of 150: loop over loop.windows"):
        loop.step(put_together(DATA[:5]), of_labels)


def test_a_window_of_tokens_that_runs_out_of_memory_runs_again_smaller():
    model, optimizer, plan = tuned()
    ran = []

    def loss(model, batch):
        ran.append(batch["ids"].numel())
        if ran[-1] > 40:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return of_labels(model, batch)

    sampler = plan.batch_sampler(DATA, seed=3, tokens=lambda sample: len(sample["ids"]))
    order = torch.randperm(len(DATA), generator=torch.Generator().manual_seed(3)).tolist()
    found = errors(model, optimizer, plan, DataLoader(DATA, batch_sampler=sampler, collate_fn=put_together), order, loss)
    assert max(error for error, _, _ in found) < 1e-14 and any(result.rescued for _, _, result in found)


def test_the_budget_is_what_fits():
    """Under a real limit: fewer of the longest samples, and windows of shorter ones fill the same tokens."""

    class Hungry(Bigrams):
        def forward(self, ids):
            return super().forward(ids) + (self.embed.weight.sum() * torch.ones(*ids.shape, 2**17 // 8, dtype=torch.float64)).exp().mean(2, keepdim=True)

    model = Hungry().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    allowed = limit_for(150)
    plan = autoaccum.tune(model, optimizer, of_labels, autoaccum.worst_case(DATA, collate=put_together), target_tokens=600, memory_limit=allowed)
    assert plan.accumulation_steps > 1 and plan.micro_tokens == 12 * plan.micro_batch < 600
    loop = autoaccum.Accumulator(model, optimizer, plan)
    sampler = plan.batch_sampler(DATA, tokens=lambda sample: len(sample["ids"]))
    from autoaccum.devices.cpu import Cpu

    with Cpu().capped(allowed), warnings.catch_warnings():
        warnings.simplefilter("error")
        results = [loop.step(window, of_labels) for window in plan.windows(DataLoader(DATA, batch_sampler=sampler, collate_fn=put_together))]
    assert len(results) > 1 and not any(result.rescued for result in results)


def test_len_of_a_dict_is_not_its_tokens():
    _, _, plan = tuned()
    with pytest.raises(PlanError, match=r"a sample has the fields \['ids'\], and len counts those: tokens=lambda sample: len\(sample\['ids'\]\)"):
        plan.batch_sampler(DATA, tokens=len)
    plan.batch_sampler(DATA, tokens=lambda sample: len(sample["ids"]))  # the remedy
    plan.batch_sampler([sample["ids"] for sample in DATA], tokens=len)
    with pytest.raises(PlanError, match="the plan counts tokens: give tokens="):
        plan.batch_sampler(DATA)
    with pytest.raises(TypeError, match=r"windows of tokens cannot be counted before the samples are read: use plan.batch_sampler"):
        len(plan.windows(DataLoader(DATA, batch_size=7, collate_fn=put_together)))
    assert len(plan.windows(DataLoader(DATA, batch_sampler=plan.batch_sampler(DATA, tokens=lambda sample: len(sample["ids"])), collate_fn=put_together))) > 5


def test_padding_free_batches_are_measured_and_trained():
    """make_batch puts samples one after the other, so that the first dimension does not count them."""
    for collate in (end_to_end, lambda samples: {name: value[0] for name, value in end_to_end(samples).items()}):

        def loss(model, batch):
            return F.cross_entropy(model(batch["ids"]).reshape(-1, 31), batch["labels"].reshape(-1))

        model, optimizer, plan = tuned(loss, batch=autoaccum.worst_case(DATA, collate=collate))
        assert (plan.micro_tokens, plan.micro_batch) == (48, 4)
        sampler = plan.batch_sampler(DATA, tokens=lambda sample: len(sample["ids"]), padded=False, shuffle=False)
        found = errors(model, optimizer, plan, DataLoader(DATA, batch_sampler=sampler, collate_fn=collate), range(len(DATA)), loss)
        assert max(error for error, _, _ in found) < 1e-14


def test_prompts_without_labels_count_in_memory_only_and_a_mix_up_is_told():
    answered = [len(sample["ids"]) // 2 + 1 for sample in DATA]

    def prompted(samples):
        batch = put_together(samples)
        for row, sample in zip(batch["labels"], samples):
            row[: len(sample["ids"]) - len(sample["ids"]) // 2 - 1] = -100
        return batch

    _, _, plan = tuned(batch=autoaccum.worst_case(DATA, collate=prompted))

    def size(sample):
        return len(sample["ids"])

    right = DataLoader(DATA, batch_sampler=plan.batch_sampler(DATA, tokens=answered, length=size), collate_fn=prompted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        windows = list(plan.windows(right))
    assert all(part["ids"].numel() <= plan.micro_tokens for window in windows for part in window.parts)
    assert all(150 <= sum(int((part["labels"] != -100).sum()) for part in window.parts) < 157 for window in windows[:-1])
    with pytest.warns(UserWarning, match=r"counts .* in the first window, and its batches have .* labels.*the whole length as length="):
        list(plan.windows(DataLoader(DATA, batch_sampler=plan.batch_sampler(DATA, tokens=size), collate_fn=prompted)))


def test_a_sample_longer_than_planned_is_told_before_training():
    _, _, plan = tuned()
    with pytest.raises(PlanError, match="sample 1 of 60 tokens is longer than a micro-batch of this plan, 48 tokens: tune with the longest samples"):
        plan.batch_sampler([[1] * 5, [1] * 60], tokens=len)


def test_samples_and_tokens_are_not_mixed_up():
    model = Bigrams()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    tune = partial(autoaccum.tune, model, optimizer, of_labels, put_together(DATA[:4]))
    with pytest.raises(UsageError, match="target_batch=8 and target_tokens=90 both say how much one step sees: give one"):
        tune(target_batch=8, target_tokens=90)
    with pytest.raises(UsageError, match="target_tokens must be a whole number of tokens, at least 1, not 0"):
        tune(target_tokens=0)
    by_samples, by_tokens = tune(target_batch=8), tune(target_tokens=90)
    with pytest.raises(PlanError, match="the plan counts samples: tune"):
        by_samples.batch_sampler(DATA, tokens=lambda sample: 1)
    with pytest.raises(PlanError, match="count= says where a window of tokens ends, and this plan counts samples"):
        by_samples.windows([], count=len)
    with pytest.raises(PlanError, match="counts samples, and this plan counts tokens: tune with target_batch"):
        by_tokens.to_huggingface()
    with pytest.raises(PlanError, match="frameworks count samples, and this plan counts tokens"):
        by_tokens.apply(object())


@pytest.mark.parametrize("sampled", [True, False])
def test_the_same_windows_on_three_ranks_and_on_one(sampled):
    told = in_ranks("by_tokens", sampled, 1)
    for rank in told:
        assert "raised" not in rank, rank
        assert rank["windows"] == told[0]["windows"] and rank["samples"] == len(DATA) and rank["difference"] < 1e-12
        assert rank["counts"] == told[0]["counts"] and all(150 <= count < 162 for count in rank["counts"][:-1])
        assert rank["tuned"][:3] == [150, 13, 3]
    _, _, plan = tuned()
    loader = (
        DataLoader(DATA, batch_sampler=plan.batch_sampler(DATA, seed=3, tokens=lambda sample: len(sample["ids"])), collate_fn=put_together)
        if sampled
        else DataLoader(DATA, batch_size=7, collate_fn=put_together)
    )
    assert [window.of_all for window in plan.windows(loader)] == told[0]["windows"]


JOB = """
import autoaccum, torch
def make_job():
    model = torch.nn.Sequential(torch.nn.Embedding(31, 16), torch.nn.Linear(16, 31))
    batch = {"labels": torch.ones(4, 12, dtype=torch.long)}
    loss = lambda m, b: torch.nn.functional.cross_entropy(m(b["labels"]).flatten(0, 1), b["labels"].flatten())
    data = [{"labels": torch.ones(4, 12, dtype=torch.long)}] * 20
    return autoaccum.Job(model, torch.optim.SGD(model.parameters(), lr=0.1), loss, batch, data=data)
"""


def test_on_the_command_line(tmp_path):
    (tmp_path / "job.py").write_text(JOB)
    told = command_line.document(command_line.autoaccum("train", "job.py", "--target-tokens", "150", "--max-micro-batch", "4", "--json", cwd=tmp_path))
    assert (told["target_tokens"], told["micro_tokens"]) == (150, 48)
    assert told["epochs"][0]["steps"] == 7  # 960 tokens in windows of 156
    both = command_line.autoaccum("tune", "job.py", "-b", "8", "--target-tokens", "150", cwd=tmp_path)
    assert both.returncode == 2 and "both say how much one step sees" in both.stderr
    command = command_line.autoaccum("tune", "--target-tokens", "150", "--", "python", "x.py", "{micro_batch}")
    assert command.returncode == 2 and "--target-tokens needs a JOB" in command.stderr
    numbers = command_line.autoaccum("tune", "job.py", "--target-tokens", "150", "--max-micro-batch", "4", "--format", "env", "-d", "virtual:t4", cwd=tmp_path)
    assert "export AUTOACCUM_TARGET_TOKENS=150\nexport AUTOACCUM_MICRO_TOKENS=48" in numbers.stdout
