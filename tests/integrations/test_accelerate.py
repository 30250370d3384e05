"""Under `accumulate()` every window is the whole batch's gradient, whatever its micro-batches."""

import warnings

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader, TensorDataset

import autoaccum
from autoaccum.devices.cpu import Cpu
from autoaccum.integrations import accelerate
from tests import jobs
from tests.data.test_lengths import Hungry, Texts, padded
from tests.data.test_lengths import loss as masked
from tests.digest import digest
from tests.plans import by_hand
from tests.tuner.test_in_place import limit_for


@pytest.fixture(autouse=True)
def another_run():
    """Accelerate keeps one state for a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def prepared(model, **given):
    accelerator = Accelerator(cpu=True, **given)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    return (accelerator, *accelerator.prepare(model, optimizer))


def linear(dtype=torch.float64):
    torch.manual_seed(0)
    return torch.nn.Linear(8, 1).to(dtype)


def data(samples, dtype=torch.float64):
    drawn = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(samples, 8, dtype=dtype, generator=drawn), torch.randn(samples, 1, dtype=dtype, generator=drawn))


@pytest.mark.parametrize("batch_size", [120, 32])
def test_every_window_is_the_whole_batchs_gradient(batch_size):
    """120 = 50 + 50 + 20 would be off by more than a tenth in the usual loop; here 40 x 3, 39 + 39 + 38 + ..., and a last window of 23."""
    accelerator, model, optimizer = prepared(linear())
    pairs = data(263)
    plan = accelerate.tune(accelerator, model, optimizer, jobs.mse, pairs[:16], target_batch=120, max_micro_batch=50)
    assert accelerator.gradient_accumulation_steps == plan.accumulation_steps == 3
    gradients, counted, since = [], [], 0
    for micro in accelerate.micro_batches(accelerator, plan, DataLoader(pairs, batch_size=batch_size)):
        with accelerator.accumulate(model):
            since += micro.samples
            accelerator.backward(jobs.mse(model, micro.batch) * micro.weight)
            if accelerator.sync_gradients:
                gradients.append(torch.cat([each.grad.flatten().clone() for each in model.parameters()]))
                counted.append(since)
                since = 0
            optimizer.step()
            optimizer.zero_grad()
    assert counted == [120, 120, 23]
    whole = linear()
    for start, ours in zip((0, 120, 240), gradients):
        whole.zero_grad()
        jobs.mse(whole, pairs[start : min(start + 120, 263)]).backward()
        theirs = torch.cat([each.grad.flatten() for each in whole.parameters()])
        assert (ours - theirs).norm() / theirs.norm() < 1e-13


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_prepared_objects_come_back_as_they_were_and_train_under_the_limit(precision):
    accelerator, model, optimizer = prepared(Hungry(32), mixed_precision=precision)
    texts = Texts(100, 120)
    before = digest(model), repr(optimizer.state_dict())
    allowed = limit_for(90)
    make_batch = autoaccum.worst_case(texts, collate=padded)
    plan = accelerate.tune(accelerator, model, optimizer, masked, make_batch, target_batch=30, memory_limit=allowed)
    assert (digest(model), repr(optimizer.state_dict())) == before
    assert plan.accumulation_steps > 1 or precision == "bf16"
    device = Cpu()
    device.prepare()
    steps = samples = 0
    with device.capped(allowed):
        for _ in range(2):
            for micro in accelerate.micro_batches(accelerator, plan, DataLoader(texts, batch_sampler=plan.batch_sampler(texts), collate_fn=padded)):
                with accelerator.accumulate(model):
                    accelerator.backward(masked(model, micro.batch) * micro.weight)
                    optimizer.step()
                    optimizer.zero_grad()
                steps += accelerator.sync_gradients
                samples += micro.samples
    assert steps == 8 and samples == 200


def test_a_window_that_was_left_early_is_no_part_of_the_next():
    accelerator, model, _ = prepared(linear())
    pairs, plan = data(24), by_hand(None, 24, 4)
    for leaves in (True, False):
        for index, micro in enumerate(accelerate.micro_batches(accelerator, plan, DataLoader(pairs, batch_size=24))):
            with accelerator.accumulate(model):
                accelerator.backward(jobs.mse(model, micro.batch) * micro.weight)
            if leaves and index == 2:
                break
    whole = linear()
    jobs.mse(whole, pairs[:24]).backward()
    assert all(torch.allclose(ours.grad, theirs.grad, rtol=1e-12) for ours, theirs in zip(model.parameters(), whole.parameters()))


def test_what_does_not_fit_together_is_refused():
    accelerator, model, _ = prepared(linear())
    plan = by_hand(None, 24, 7)
    with pytest.raises(autoaccum.PlanError, match="as it was before prepare"):
        next(accelerate.micro_batches(accelerator, plan, accelerator.prepare(DataLoader(data(30), batch_size=4))))
    plan.apply(accelerator)
    assert accelerator.gradient_accumulation_steps == 4
    assert Accelerator(cpu=True, **by_hand(None, 24, 8).to_accelerate()).gradient_accumulation_steps == 3
    with pytest.raises(autoaccum.UsageError, match="did you mean 'memory_limit'"):
        accelerate.tune(accelerator, model, torch.optim.SGD(model.parameters()), jobs.mse, data(8)[:8], target_batch=4, memory_limits="1GiB")


@pytest.mark.parametrize("empty", [slice(4, 8), slice(0, 4), slice(0, 12)])
def test_micro_batches_in_which_nothing_counts_are_left_out(empty):
    """Their mean is nan, and 0 times nan is nan."""
    accelerator, model, optimizer = prepared(linear())
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(16, 8, dtype=torch.float64, generator=generator), torch.randn(16, 1, dtype=torch.float64, generator=generator)
    counts = torch.ones(16, 1, dtype=torch.float64)
    counts[empty] = 0

    def mean_over_counted(model, batch):
        return ((model(batch[0]) - batch[1]) ** 2 * batch[2]).sum() / batch[2].sum()

    batch = (x, y, counts)
    plan = by_hand(autoaccum.Job(model, optimizer.optimizer, mean_over_counted, batch), 16, 4)
    gradient = None
    for micro in accelerate.micro_batches(accelerator, plan, [batch], count=lambda batch: float(batch[2].sum())):
        with accelerator.accumulate(model):
            accelerator.backward(mean_over_counted(model, micro.batch) * micro.weight)
            gradient = torch.cat([each.grad.flatten().clone() for each in model.parameters()])
            optimizer.step()
            optimizer.zero_grad()
    whole = linear()
    mean_over_counted(whole, batch).backward()
    right = torch.cat([each.grad.flatten() for each in whole.parameters()])
    assert (gradient - right).norm() / right.norm() < 1e-13


def test_the_cure_that_is_told_for_a_mean_over_something_else_makes_it_exact():
    accelerator, model, optimizer = prepared(linear())
    pairs = data(24)
    counts = torch.randint(1, 5, (24, 1), generator=torch.Generator().manual_seed(3)).double()
    batch = (*pairs.tensors, counts)

    def counted_mean(model, batch):
        return ((model(batch[0]) - batch[1]).square() * batch[2]).sum() / batch[2].sum()

    def count(batch):
        return batch[2].sum()

    with pytest.warns(UserWarning, match="give tune and micro_batches count="):
        accelerate.tune(accelerator, model, optimizer, counted_mean, batch, target_batch=24, max_micro_batch=5)
    plan = accelerate.tune(accelerator, model, optimizer, counted_mean, batch, target_batch=24, max_micro_batch=5, count=count)
    assert not plan.warnings
    for micro in accelerate.micro_batches(accelerator, plan, [batch], count=count):
        with accelerator.accumulate(model):
            accelerator.backward(counted_mean(model, micro.batch) * micro.weight)
    whole = linear()
    counted_mean(whole, batch).backward()
    assert all(torch.allclose(ours.grad, theirs.grad, rtol=1e-12) for ours, theirs in zip(model.parameters(), whole.parameters()))


def test_the_first_windows_are_looked_at_and_a_mean_over_labels_is_told():
    """It was tuned on texts of one length; those of training have others."""
    from tests.loop.test_first_windows import Reader, over_labels, over_samples
    from tests.loop.test_first_windows import padded as put_together
    from tests.loop.test_first_windows import texts as ragged

    def told(loss, **given):
        accelerator, model, optimizer = prepared(Reader())
        alike = put_together([torch.full((5,), 1 + index) for index in range(8)])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            plan = accelerate.tune(accelerator, model, optimizer, loss, alike, target_batch=20, max_micro_batch=6, **given)
            for micro in accelerate.micro_batches(accelerator, plan, DataLoader(ragged(), batch_size=20, collate_fn=put_together), **given):
                with accelerator.accumulate(model):
                    accelerator.backward(loss(model, micro.batch) * micro.weight)
                    optimizer.step()
                    optimizer.zero_grad()
        return [str(each.message) for each in caught if "not over samples" in str(each.message)]

    assert len(told(over_labels)) == 1 and "give tune and micro_batches count=" in told(over_labels)[0]
    assert not told(over_samples)
    assert not told(over_labels, count=lambda batch: float((batch["labels"] != -100).sum()))  # the remedy


@pytest.mark.parametrize("kind", ["mean", "count"])
def test_without_a_plan_it_is_learned_and_every_window_is_the_whole_batchs_gradient(kind):
    accelerator, model, optimizer = prepared(linear())
    pairs, counts = data(1063), kind == "count"

    def loss(model, batch):
        error = ((model(batch[0]) - batch[1]) ** 2).flatten()
        return (error * (batch[0][:, 0] > 0)).sum() / (batch[0][:, 0] > 0).sum() if counts else error.mean()

    count = (lambda batch: float((batch[0][:, 0] > 0).sum())) if counts else None
    gradients, steps, sizes = [], [], []
    for micro in accelerate.micro_batches(accelerator, loader=DataLoader(pairs, batch_size=32), target_batch=120, count=count):
        sizes.append(micro.samples)
        with accelerator.accumulate(model):
            accelerator.backward(loss(model, micro.batch) * micro.weight)
            if accelerator.sync_gradients:
                gradients.append(torch.cat([each.grad.flatten().clone() for each in model.parameters()]))
                steps.append(micro.last)
            optimizer.step()
            optimizer.zero_grad()
    assert len(gradients) == 9 and all(steps)
    for index, gradient in enumerate(gradients):
        whole = torch.autograd.grad(loss(model, pairs[120 * index : 120 * (index + 1)]), list(model.parameters()))
        torch.testing.assert_close(gradient, torch.cat([each.flatten() for each in whole]), rtol=1e-12, atol=1e-12)
    plan = accelerate.learned_plan(accelerator)
    assert sizes[0] == 1 and plan.accumulation_steps == 1 and not plan.learning
    assert len(list(accelerate.micro_batches(accelerator, loader=DataLoader(pairs, batch_size=32), target_batch=120, count=count))) == 9


def test_a_plan_or_a_target_and_a_prepared_model():
    accelerator, *_ = prepared(linear())
    with pytest.raises(autoaccum.UsageError, match="give one of the two"):
        next(accelerate.micro_batches(accelerator, loader=[]))
    with pytest.raises(autoaccum.UsageError, match="prepared no model"):
        next(accelerate.micro_batches(Accelerator(cpu=True), loader=DataLoader(data(8)), target_batch=8))
    with pytest.raises(autoaccum.UsageError, match="no plan was learned"):
        accelerate.learned_plan(Accelerator(cpu=True))


def _trained(position, windows=None, shuffle=False, **asked):
    """Two epochs of windows of 24, 24 and 7 samples, or the first `windows` of them; the parameters after them."""
    accelerator, model, _ = prepared(linear())
    optimizer = accelerator._optimizers[0]
    optimizer.param_groups[0]["lr"] = 0.1
    done = 0
    for _ in range(position.epoch, 2):
        loader = DataLoader(data(55), batch_size=10, shuffle=shuffle)
        for micro in accelerate.micro_batches(accelerator, **asked, loader=loader, position=position):
            with accelerator.accumulate(model):
                accelerator.backward(jobs.mse(model, micro.batch) * micro.weight)
                optimizer.step()
                optimizer.zero_grad()
            done += accelerator.sync_gradients
            if done == windows:
                return model, optimizer
    return model, optimizer


@pytest.mark.parametrize("asked", [{"target_batch": 24}, {"plan": by_hand(None, 24, 10)}], ids=["learned", "planned"])
def test_a_position_is_the_place_behind_the_last_window_of_a_plain_loader(asked):
    positions = {}
    for windows in (1, 3, 4, 6):
        positions[windows] = accelerate.Position()
        _trained(positions[windows], windows, **asked)
    assert positions[4].epoch == 1 and positions[4].state_dict()["place"] == {"epoch": 1, "windows": 1}
    assert [each.state_dict()["windows"] for each in positions.values()] == [1, 3, 4, 6]
    seen = []
    for windows, position in positions.items():
        resumed = accelerate.Position()
        resumed.load_state_dict(position.state_dict())
        _trained(resumed, **asked)
        seen.append(resumed.state_dict()["windows"] - windows)
    assert seen == [5, 3, 2, 0]


def test_a_position_that_cannot_be_found_again_is_refused_with_the_remedy():
    position = accelerate.Position()
    _trained(position, 1, shuffle=True, plan=by_hand(None, 24, 10))
    with pytest.raises(autoaccum.PlanError, match=r"shuffles by itself.*plan.batch_sampler\(dataset\)"):
        position.state_dict()
    other = accelerate.Position()
    other.load_state_dict({**_of_one_window(), "target": 30})
    with pytest.raises(autoaccum.PlanError, match="windows of 30, and this loop's target is 24"):
        _trained(other, plan=by_hand(None, 24, 10))


def _of_one_window():
    position = accelerate.Position()
    _trained(position, 1, plan=by_hand(None, 24, 10))
    return position.state_dict()
