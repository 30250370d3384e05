"""The accumulating loop: one exact optimizer step per window."""

import copy
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import autoaccum
from tests import jobs
from tests.plans import by_hand


@pytest.fixture
def job():
    torch.manual_seed(0)
    return jobs.small(data=torch.utils.data.TensorDataset(*jobs.pairs(250)))


@pytest.fixture
def plan(job):
    return autoaccum.tune(job, target_batch=100, max_micro_batch=40)


@pytest.mark.parametrize(
    "given, named",
    [
        ({"optimizer": torch.optim.RMSprop}, "in the optimizer: tune again"),
        ({"autocast": torch.bfloat16}, "in autocast: tune again"),
        ({"max_grad_norm": 1.0}, "in max_grad_norm: tune again"),
        ({"scaler": torch.amp.GradScaler("cpu")}, "in the scaler: tune again"),
        ({"autocast": torch.bfloat16, "max_grad_norm": 1.0}, "in autocast and in max_grad_norm: tune again"),
    ],
)
def test_the_warning_names_what_differs_from_the_measured_job(job, plan, given, named):
    optimizer = given.pop("optimizer", type(job.optimizer))(job.model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=named):
        autoaccum.Accumulator(autoaccum.Job(job.model, optimizer, jobs.mse, job.batch, **given), plan)


def test_steps_equal_those_of_the_whole_batch_also_in_the_smaller_last_window(job, plan):
    model = copy.deepcopy(job.model).double()
    by_hand = torch.optim.SGD(model.parameters(), lr=0.1)
    job = autoaccum.Job(job.model.double(), torch.optim.SGD(job.model.parameters(), lr=0.1), jobs.mse, job.batch)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        loop = autoaccum.Accumulator(job, plan)
    assert "differs from what the plan was measured with, in the model's parameters and in the optimizer:" in str(told[0].message)
    inputs, targets = (each.double() for each in jobs.pairs(250))
    for start in (0, 100, 200):
        batch = inputs[start : start + 100], targets[start : start + 100]
        result = loop.step(batch)
        loss = jobs.mse(model, batch)
        loss.backward()
        by_hand.step()
        by_hand.zero_grad()
        assert result.loss == pytest.approx(loss.item(), rel=1e-12) and result.samples == len(batch[0])
    assert result.micro_batches == 2  # 50 samples by at most 34
    for ours, theirs in zip(job.model.parameters(), model.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


def test_model_optimizer_and_plan_are_enough_with_a_loss_per_step(job, plan):
    loop = autoaccum.Accumulator(job.model, job.optimizer, plan)
    assert loop.step(jobs.pairs(100), jobs.mse).micro_batches == 3
    with pytest.raises(autoaccum.UsageError, match=r"step\(batch, loss\)"):
        loop.step(jobs.pairs(100))


def test_a_loader_that_gives_too_little_is_caught_the_second_time(job, plan):
    loop = autoaccum.Accumulator(job, plan)
    loop.step(jobs.pairs(32))
    with pytest.raises(autoaccum.PlanError, match=r"gives 32 samples a step, this plan needs 100"):
        loop.step(jobs.pairs(32))


def test_the_last_window_of_each_epoch_is_no_such_loader(job, plan):
    loop = autoaccum.Accumulator(job, plan)
    for _ in range(3):
        assert loop.step(jobs.pairs(100)).samples == 100
        assert loop.step(jobs.pairs(50)).samples == 50


def test_the_scheduler_counts_windows_and_the_norm_is_that_of_the_summed_gradient():
    model = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    job = autoaccum.Job(model, optimizer, jobs.mse, jobs.pairs(8), scheduler=scheduler, max_grad_norm=1e-9)
    loop = autoaccum.Accumulator(job, autoaccum.tune(job, target_batch=12, max_micro_batch=5))
    batch = jobs.pairs(12)
    jobs.mse(model, batch).backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    optimizer.zero_grad()
    assert loop.step(batch).grad_norm == pytest.approx(float(norm), rel=1e-5)
    assert scheduler.get_last_lr() == [0.5]


@pytest.mark.parametrize("wrong", [lambda job, plan: autoaccum.Accumulator(job, job.optimizer), lambda job, plan: autoaccum.Accumulator(job.model, plan)])
def test_arguments_in_the_wrong_place_are_told(job, plan, wrong):
    with pytest.raises(autoaccum.UsageError, match="Plan"):
        wrong(job, plan)


@pytest.mark.slow
def test_freed_memory_goes_back_while_training_as_it_did_while_measuring(job, plan):
    """Where a plan needs it, the allocator is steady in the loop too: what a window took is gone after it."""
    from autoaccum.devices.cpu import Cpu
    from tests.tuner.test_in_place import limit_for

    hungry = jobs.hungry(mib=2)
    loop = autoaccum.Accumulator(hungry, autoaccum.tune(hungry, target_batch=60, max_micro_batch=20, memory_limit=limit_for(200)))
    loop.step(torch.zeros(60, 1))
    before = Cpu().held_bytes()
    for _ in range(5):
        loop.step(torch.zeros(60, 1))
    assert abs(Cpu().held_bytes() - before) < 8 * 2**20


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (DataLoader(torch.zeros(300, 8), batch_size=32), r"DataLoader is not one batch: for window in plan\.windows\(loader\)"),
        (iter([torch.zeros(100, 8)]), "is not one batch"),
        (jobs.pairs(240), r"gives 240 samples a step, this plan needs 100: loop over plan\.windows\(loader\)"),
        (jobs.pairs(0), "no samples"),
        ({"inputs": torch.zeros(100, 8), "targets": torch.zeros(99, 1)}, "inputs has 100 samples, targets has 99"),
        (object(), r"plan\.windows\(loader, samples=\.\.\.\)"),
    ],
)
def test_what_is_no_window_is_told_and_nothing_has_happened(job, plan, given, says):
    before = [p.clone() for p in job.model.parameters()]
    with pytest.raises(autoaccum.PlanError, match=says):
        autoaccum.Accumulator(job, plan).step(given)
    assert all(torch.equal(a, b) for a, b in zip(before, job.model.parameters()))


def test_micro_batches_run_as_they_came_and_one_too_large_is_cut(job, plan):
    loop = autoaccum.Accumulator(job, plan)
    result = loop.step_micro(jobs.pairs(size) for size in (20, 40, 10, 30))
    assert result.samples == 100 and result.micro_batches == 5  # the 40 as 20 + 20: the plan's are of 34 at most


def test_settings_belong_to_the_job_where_one_is_given(job, plan):
    with pytest.raises(autoaccum.UsageError, match="takes autocast and max_grad_norm from the job"):
        autoaccum.Accumulator(job, plan, autocast=torch.bfloat16, max_grad_norm=1.0)
    with pytest.raises(autoaccum.UsageError, match="grow_after must be"):
        autoaccum.Accumulator(job, plan, grow_after=0)


def test_the_splitter_of_the_job_cuts_windows_too(plan):
    class Pairs:
        def __init__(self, inputs, targets):
            self.inputs, self.targets = inputs, targets

    def split(batch, sizes):
        return [Pairs(*each) for each in zip(batch.inputs.split(list(sizes)), batch.targets.split(list(sizes)))]

    def loss(model, batch):
        return jobs.mse(model, (batch.inputs, batch.targets))

    job = jobs.small(loss, Pairs(*jobs.pairs(8)), split=split)
    loop = autoaccum.Accumulator(job, plan)
    windows = plan.windows([Pairs(*jobs.pairs(100))], samples=lambda batch: len(batch.inputs))
    assert [loop.step(window).micro_batches for window in windows] == [3]


def time_major(samples=10):
    """Recordings with time first, their lengths, and labels that lie flat."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 4, (samples,), generator=generator)
    return torch.randn(14, samples, 5, dtype=torch.float64, generator=generator), lengths, torch.arange(int(lengths.sum()), dtype=torch.float64)


def cut_in_time(batch, sizes):
    x, lengths, labels = batch
    pieces, start, flat = [], 0, 0
    for size in sizes:
        own = lengths[start : start + size]
        pieces.append((x[:, start : start + size], own, labels[flat : flat + int(own.sum())]))
        start, flat = start + size, flat + int(own.sum())
    return pieces


def recordings(model, batch):
    x, lengths, labels = batch
    sums = torch.stack([part.sum() for part in labels.split(lengths.tolist())])
    return ((model(x).mean(0)[:, 0] - sums) ** 2).mean()


def test_time_major_data_take_split_and_samples_everywhere():
    def model_and_gradients():
        torch.manual_seed(0)
        model, seen = nn.Linear(5, 1).double(), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        optimizer.register_step_pre_hook(lambda *_: seen.append(model.weight.grad.clone()))
        return model, optimizer, seen

    batch = time_major()
    model, optimizer, _ = model_and_gradients()
    recordings(model, batch).backward()
    right = model.weight.grad
    for given in ({"split": cut_in_time}, {}):  # the sentence names what is missing
        with pytest.raises(autoaccum.PlanError, match="give samples=" if given else "give `split=`"):
            autoaccum.tune(*model_and_gradients()[:2], recordings, batch, target_batch=10, max_micro_batch=4, **given)
    both = {"split": cut_in_time, "samples": lambda batch: len(batch[1])}
    model, optimizer, seen = model_and_gradients()
    plan = autoaccum.tune(model, optimizer, recordings, batch, target_batch=10, max_micro_batch=4, **both)
    assert plan.micro_batches == (4, 3, 3)
    loop = autoaccum.Accumulator(model, optimizer, plan, **both)
    seen.clear()
    loop.step(batch, recordings)
    loop.step_micro([batch], recordings)
    for window in plan.windows([batch], **both):
        loop.step(window, recordings)
    with pytest.raises(autoaccum.PlanError, match="give samples="):
        autoaccum.Accumulator(model, optimizer, plan, split=cut_in_time).step(batch, recordings)
    assert len(seen) == 3
    for gradient in seen:
        torch.testing.assert_close(gradient, right, rtol=1e-12, atol=0)


def test_a_batch_that_only_the_user_can_cut_is_not_repeated_and_a_function_makes_more():
    model = nn.Linear(5, 1).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    both = {"split": cut_in_time, "samples": lambda batch: len(batch[1])}
    with pytest.raises(autoaccum.JobError, match=r"holds 10 samples and a trial needs .*make_batch"):
        autoaccum.tune(model, optimizer, recordings, time_major(10), target_batch=40, **both)
    assert autoaccum.tune(model, optimizer, recordings, time_major, target_batch=40, **both).micro_batches == (40,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_counts_in_half_precision_are_added_up_in_double(dtype):
    """A mask of the model's type: each count fits, and their sum does not (fp16), or is rounded (bf16)."""
    generator = torch.Generator().manual_seed(0)
    x, mask = torch.randn(12, 8192, 2, generator=generator), torch.rand(12, 8192, generator=generator) < torch.linspace(0.5, 1.0, 12)[:, None]

    def gradient(count_in):
        torch.manual_seed(0)
        model, seen = nn.Linear(2, 1).to(dtype), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        optimizer.register_step_pre_hook(lambda *_: seen.append(torch.cat([p.grad.flatten().double() for p in model.parameters()])))

        def loss(model, batch):
            errors = model(batch[0].to(dtype))[..., 0].float() ** 2
            return (errors * batch[1]).sum(), batch[1].to(count_in).sum()

        job = autoaccum.Job(model, optimizer, loss, (x, mask))
        result = autoaccum.Accumulator(job, by_hand(job, 12, 3)).step((x, mask))
        return seen[0], result.count

    (half, counted), (whole, true) = gradient(dtype), gradient(torch.int64)
    assert counted == pytest.approx(true, rel=2e-3) and true == int(mask.sum())
    assert float(half.norm() / whole.norm()) == pytest.approx(1, abs=2e-3)


def test_two_threads_in_one_accumulator_are_told():
    model = nn.Linear(8, 1)
    job = autoaccum.Job(model, torch.optim.SGD(model.parameters(), lr=0.1), jobs.mse, jobs.pairs(8))
    inside, go = threading.Event(), threading.Event()

    def slow(model, batch):
        inside.set()
        go.wait(60)
        return jobs.mse(model, batch)

    loop = autoaccum.Accumulator(job, by_hand(job, 8, 4))
    thread = threading.Thread(target=loop.step, args=(jobs.pairs(8), slow))
    thread.start()
    inside.wait(60)
    with pytest.raises(autoaccum.UsageError, match="two threads call step of one Accumulator"):
        loop.step(jobs.pairs(8))
    go.set()
    thread.join()
    assert loop.step(jobs.pairs(8)).samples == 8  # the remedy: one thread trains


def test_a_scheduler_that_raises_says_that_the_window_is_done():
    model = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    class Broken(torch.optim.lr_scheduler.LambdaLR):
        def step(self, *given):
            if hasattr(self, "ready"):
                raise ValueError("no more epochs")
            super().step(*given)

    scheduler = Broken(optimizer, lambda epoch: 1.0)
    scheduler.ready = True
    job = autoaccum.Job(model, optimizer, jobs.mse, jobs.pairs(8), scheduler=scheduler)
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match="no more epochs") as raised:
        autoaccum.Accumulator(job, by_hand(job, 8, 4)).step(jobs.pairs(8))
    assert "the weights are updated, and the window is done" in raised.value.__notes__[0] and not torch.equal(before, model.weight)
