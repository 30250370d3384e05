"""A plan that is learned in the first windows of training: exact from the first on, as few steps as `tune` finds, and what runs out is rescued."""

import copy
import json
import subprocess
import sys
import warnings

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import autoaccum
from autoaccum.data import Window
from autoaccum.devices.cpu import Cpu
from tests import jobs
from tests.devices.fresh import fresh
from tests.loop.test_rescue import TEXT, Trap
from tests.plans import by_hand

MIB = 2**20


@pytest.fixture(scope="module", autouse=True)
def libraries_are_loaded():
    """A first optimizer imports a compiler, which takes memory once."""
    loop = autoaccum.Accumulator(jobs.hungry(mib=2), target_batch=4)
    for _ in range(3):
        loop.step(torch.zeros(4, 1))


def loop_of(job, target, above_mib=None, **given):
    """Learns under a limit of so many MiB above what is held now."""
    limit = None if above_mib is None else limit_above(above_mib)
    return autoaccum.Accumulator(job, target_batch=target, memory_limit=limit, **given)


def limit_above(mib):
    cpu = Cpu()
    cpu.release()
    return int((cpu.held_bytes() + mib * MIB) / 0.97)


def loader(samples, of=40):
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*jobs.pairs(samples, 6)), batch_size=of)


def double(seed=0):
    """A model without dropout, in double precision."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 12), Trap(), nn.Tanh(), nn.Linear(12, 1)).double()


def doubled(batch):
    return tuple(each.double() for each in batch)


@settings(max_examples=6, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    traps=st.dictionaries(
        st.integers(0, 19), st.lists(st.tuples(st.sampled_from(["forward", "backward"]), st.integers(0, 2)), min_size=1, max_size=1), max_size=4
    ),
    target=st.integers(30, 120),
    kind=st.sampled_from(["mean", "sum and count", "count", "closure"]),
)
def test_windows_that_learn_equal_one_big_batch_each_wherever_memory_runs_out(traps, target, kind):
    torch.manual_seed(9)
    data = [doubled(jobs.pairs(target if index % 10 < 9 else 17, 6)) for index in range(20)]
    model = double()
    straight = copy.deepcopy(model)
    optimizers = [
        torch.optim.LBFGS(each.parameters(), max_iter=2) if kind == "closure" else torch.optim.AdamW(each.parameters(), lr=1e-2) for each in (model, straight)
    ]

    def loss(model, batch):
        error = (model(batch[0]) - batch[1]) ** 2
        if kind == "sum and count":
            return (error * (batch[0][:, :1] > 0)).sum(), (batch[0][:, :1] > 0).sum()
        if kind == "count":
            return (error * (batch[0][:, :1] > 0)).sum() / (batch[0][:, :1] > 0).sum().clamp(min=1)
        return error.mean()

    counts = {"count": lambda batch: float((batch[0][:, :1] > 0).sum())} if kind == "count" else {}
    loop, trap = autoaccum.Accumulator(model, optimizers[0], target_batch=target, **counts), model[1]
    for index, batch in enumerate(data):
        trap.forwards, trap.set = 0, list(traps.get(index, ())) if kind != "closure" else []
        result = loop.step(batch, loss)
        assert result.samples == len(batch[0])

        def closure(batch=batch):
            optimizers[1].zero_grad()
            returned = loss(straight, batch)
            value = returned[0] / returned[1] if isinstance(returned, tuple) else returned
            value.backward()
            return value

        optimizers[1].step(closure)
    assert not loop.plan.learning
    for ours, theirs in zip(model.parameters(), straight.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-8 if kind == "closure" else 1e-12)  # LBFGS divides by differences of gradients


LIMITED = """
import json, sys, torch
torch.set_num_threads(1)
import autoaccum
from autoaccum.devices.cpu import Cpu
from tests import jobs
cpu, job = Cpu(), jobs.hungry(mib=2)
cpu.prepare()
for _ in range(2):  # a first optimizer imports a compiler, which takes memory once
    job.loss(job.model, torch.zeros(1, 1)).backward()
    job.optimizer.step()
    job.optimizer.zero_grad()
cpu.release()
limit = cpu.held_bytes() + 100 * 2**20
if sys.argv[1] == "tune":
    plan, results = autoaccum.tune(job, target_batch=120, memory_limit=limit), []
else:
    loop = autoaccum.Accumulator(job, target_batch=120, memory_limit=limit)
    results = [loop.step(torch.zeros(120, 1)) for _ in range(6)]
    plan = loop.plan
print(json.dumps({"plan": plan.as_dict(), "steps": [each.micro_batches for each in results], "rescued": sum(each.rescued is not None for each in results)}))
"""


def in_its_own_process(what):
    done = subprocess.run([sys.executable, "-c", LIMITED, what], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout), done.stderr


def test_under_a_real_limit_it_settles_at_the_plan_that_tune_finds_and_says_so_once():
    (learned, said), (tuned, _) = in_its_own_process("learn"), in_its_own_process("tune")
    steps = tuned["plan"]["accumulation_steps"]
    assert 4 < steps < 20 and abs(learned["plan"]["accumulation_steps"] - steps) <= 1  # two processes differ by a few MiB
    assert learned["rescued"] == 0 and learned["steps"][2:] == [learned["plan"]["accumulation_steps"]] * 4
    assert not learned["plan"]["learning"] and learned["plan"]["learned_windows"] in (3, 4)
    assert learned["plan"]["peak_bytes"] <= learned["plan"]["budget_bytes"]
    assert said.count("learned in ") == 1


def test_no_sample_is_computed_twice_unless_something_ran_out():
    seen = []

    def loss(model, batch):
        seen.extend(batch[0][:, 0].tolist())
        return jobs.mse(model, batch)

    loop = autoaccum.Accumulator(jobs.small(loss), target_batch=100)
    data = jobs.pairs(600)
    for window in loop.windows(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), batch_size=32)):
        loop.step(window)
    assert seen == data[0][:, 0].tolist()


def test_a_size_that_ran_out_is_refused_from_then_on_and_the_window_is_exact():
    """The allocator fails above 30 samples, where the line sees nothing coming."""
    sizes = []

    def loss(model, batch):
        sizes.append(len(batch[0]))
        if len(batch[0]) > 30:
            raise torch.OutOfMemoryError(TEXT)
        return jobs.mse(model, batch)

    loop = autoaccum.Accumulator(jobs.small(loss), target_batch=120)
    results = [loop.step(jobs.pairs(120)) for _ in range(8)]
    refused = [size for size in sizes if size > 30]
    assert refused and len(refused) == len(set(refused))
    assert loop.plan.micro_batch <= 30 and loop.plan.smallest_refused > 30 and results[-1].rescued is None
    assert "the window ran again, whole, as" in str(next(each.rescued for each in results if each.rescued))


def test_where_the_smallest_runs_out_the_error_comes_through_and_nothing_is_changed():
    def loss(model, batch):
        raise torch.OutOfMemoryError(TEXT)

    job = jobs.small(loss)
    before = copy.deepcopy(job.model.state_dict())
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory") as raised:
        autoaccum.Accumulator(job, target_batch=16).step(jobs.pairs(16))
    assert any("not even a micro-batch of 1 sample fits" in note for note in raised.value.__notes__)
    assert all(torch.equal(before[name], each) for name, each in job.model.state_dict().items())


def test_the_state_of_the_optimizer_is_counted_before_it_is_there():
    """Adam's two copies of 16 MiB are known before the first step: its window is cut by the 112 MiB that later ones have, not by the 144 of now.

    A sample takes about 4 MiB, so that 36 would fit into 144. In a process of its own: where other tests ran, the C library keeps what they freed.
    """
    seen = fresh(
        """
import json
import torch
from torch import nn
import autoaccum
from tests import jobs
from tests.loop.test_learner import loop_of

torch.set_num_threads(1)
loop = loop_of(jobs.hungry(mib=2), 4)
for _ in range(3):  # libraries load
    loop.step(torch.zeros(4, 1))
model, seen = nn.Sequential(nn.Linear(2048, 2048), jobs.Hungry(1.0)), []

def loss(model, batch):
    seen.append(len(batch[0]))
    return model[1](len(batch[0])) + model[0](batch[0]).mean()

job = autoaccum.Job(model, torch.optim.Adam(model.parameters()), loss, torch.zeros(4, 2048))
loop = loop_of(job, 120, above_mib=160)
results = [loop.step((torch.zeros(120, 2048),))]
first = max(seen)
results += [loop.step((torch.zeros(120, 2048),)) for _ in range(7)]
told = {"first": first, "last": results[-1].micro_batches, "peak": loop.plan.peak_bytes, "budget": loop.plan.budget_bytes, "learning": loop.plan.learning}
print(json.dumps({**told, "rescued": sum(each.rescued is not None for each in results)}))
"""
    )
    assert 15 <= seen["first"] < 34 and seen["last"] <= 6 and seen["peak"] <= seen["budget"], seen
    assert seen["rescued"] <= 1 and not seen["learning"], seen  # the next larger size may be within what two processes differ by


def test_the_plans_peak_is_that_of_its_own_micro_batches(tmp_path):
    """Above 20 samples the loss reads a file of 160 MiB through a mapping, which counts as held memory and which no limit on data refuses."""
    (tmp_path / "large").write_bytes(bytes(160 * MIB))
    seen = fresh(
        f"""
import json, mmap
import torch
import autoaccum
from tests import jobs
from tests.loop.test_learner import loop_of

def loss(model, batch):
    if len(batch) > 20:
        with open({str(tmp_path / "large")!r}, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
            sum(pages[at] for at in range(0, len(pages), 4096))
    return model(len(batch))

model = jobs.Hungry(0.5)
loop = loop_of(autoaccum.Job(model, torch.optim.SGD(model.parameters()), loss, torch.zeros(4, 1)), 60, above_mib=100)
results = [loop.step(torch.zeros(60, 1)) for _ in range(8)]
seen = {{"steps": results[-1].micro_batches, "peak": loop.plan.peak_bytes, "budget": loop.plan.budget_bytes, "learning": loop.plan.learning}}
print(json.dumps({{**seen, "tried": [each.peak_bytes for each in loop.plan.trials]}}))
"""
    )
    assert seen["steps"] == 3 and not seen["learning"] and seen["peak"] <= seen["budget"] < max(filter(None, seen["tried"])), seen


def test_a_neighbour_takes_memory_and_leaves_and_both_are_followed():
    job, cpu = jobs.hungry(mib=2), Cpu()
    loop = autoaccum.Accumulator(job, target_batch=60, grow_after=3, headroom=0)
    with cpu.capped(cpu.held_bytes() + 120 * MIB):
        first = [loop.step(torch.zeros(60, 1)) for _ in range(5)]
    assert not loop.plan.learning
    with cpu.capped(cpu.held_bytes() + 40 * MIB):  # less than any size takes at which the first windows may settle
        less = [loop.step(torch.zeros(60, 1)) for _ in range(2)]
    assert less[0].rescued and less[-1].micro_batches > first[-1].micro_batches
    more = [loop.step(torch.zeros(60, 1)) for _ in range(20)]  # what ran out is tried again at the first, second, fourth look, three windows apart
    assert [each.micro_batches for each in more[-6:]] == [1] * 6  # and no size from before a rescue comes back
    assert not any(each.rescued for each in more)


@pytest.mark.parametrize("split", [None, lambda batch, sizes: list(zip(*(field.split(list(sizes)) for field in batch)))])
def test_windows_of_any_loader_and_of_the_users_own_split(split):
    job = jobs.small(split=split, samples=(lambda batch: len(batch[0])) if split else None)
    loop = autoaccum.Accumulator(job, target_batch=90)
    results = [loop.step(window) for window in loop.windows(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*jobs.pairs(940)), batch_size=32))]
    assert [each.samples for each in results] == [90] * 10 + [40]
    # The loader's batches of 32 samples can be joined, but not if only the user can count and cut them.
    assert loop.plan.micro_batches == ((90,) if split is None else (30, 30, 30)) and not loop.plan.learning


def test_batches_that_cannot_be_cut_run_as_they_are():
    loop = autoaccum.Accumulator(jobs.small(), target_batch=40)
    for _ in range(3):
        assert loop.step_micro([jobs.pairs(10) for _ in range(4)]).micro_batches == 4


def test_batches_that_nobody_can_cut_run_as_they_are_also_larger_ones_after_it_has_settled():
    """As of packed text: a batch says how many samples it holds, and there is no split."""
    loop = autoaccum.Accumulator(jobs.small(samples=lambda batch: len(batch[0])), target_batch=40)
    results = [loop.step_micro([jobs.pairs(10) for _ in range(4)]) for _ in range(4)]
    assert not loop.plan.learning and loop.plan.micro_batch == 10
    results += [loop.step_micro([jobs.pairs(25), jobs.pairs(15)]), loop.step(Window.of([jobs.pairs(30), jobs.pairs(10)], samples=lambda batch: len(batch[0])))]
    assert [each.micro_batches for each in results] == [4, 4, 4, 4, 2, 2]


def test_batch_norm_is_never_left_alone_with_one_sample():
    loop = autoaccum.Accumulator(jobs.normed(), target_batch=31)
    for samples in (31, 31, 31, 31, 5):
        loop.step(jobs.pairs(samples))
    assert not loop.plan.learning


def test_two_jobs_learn_together():
    first, second = jobs.two_in_turn()
    loop = autoaccum.Accumulator([first, second], target_batch=24)
    for _ in range(5):
        results = loop.step(first.batch_of(24))
    assert len(results) == 2 and not loop.plan.learning and loop.plan.accumulation_steps == 1


def test_only_equal_micro_batches_and_none_above_the_most_where_that_is_asked():
    loop = autoaccum.Accumulator(jobs.small(), target_batch=60, equal=True, max_micro_batch=16)
    for _ in range(4):
        loop.step(jobs.pairs(60))
    assert loop.plan.micro_batches == (15,) * 4 and not loop.plan.learning


def test_equal_micro_batches_of_a_prime_target_are_not_learned_one_by_one():
    loop = autoaccum.Accumulator(jobs.small(), target_batch=101, equal=True)
    results = [loop.step(jobs.pairs(101)) for _ in range(4)]
    assert results[0].micro_batches < 12 and loop.plan.micro_batches == (101,)


def test_the_learned_plan_is_saved_read_and_trained_with(tmp_path):
    job = jobs.small()
    loop = autoaccum.Accumulator(job, target_batch=60)
    assert loop.plan.learning and "still learning" in loop.plan.explain()
    for _ in range(4):
        loop.step(jobs.pairs(60))
    loop.plan.save(tmp_path / "plan.json")
    plan = autoaccum.Plan.load(tmp_path / "plan.json")
    assert plan == loop.plan and "learned in 3 windows" in plan.explain()
    assert autoaccum.Accumulator(job, plan).step(jobs.pairs(60)).micro_batches == 1


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda job: autoaccum.Accumulator(job.model, job.optimizer), "give target_batch="),
        (lambda job: autoaccum.Accumulator(job), "give target_batch="),
        (lambda job: autoaccum.Accumulator(job, autoaccum.tune(job, target_batch=8), target_batch=8), "leave target_batch out"),
        (lambda job: autoaccum.Accumulator(job, target_batch=0), "target_batch must be a whole number"),
        (lambda job: autoaccum.Accumulator(job, target_batch=8, memory_limit="1 MB"), "memory limit of 1 MB"),
    ],
)
def test_what_cannot_be_learned_from_is_said_in_a_sentence(make, says):
    with pytest.raises(autoaccum.UsageError, match=says):
        make(jobs.small())


def test_a_loss_that_is_a_sum_is_noticed_without_a_rehearsal():
    loop = autoaccum.Accumulator(jobs.sum_loss(), target_batch=64, max_micro_batch=16)
    with pytest.warns(UserWarning, match="is a sum over samples, and is taken for a mean"):
        for _ in range(4):
            loop.step(jobs.pairs(64))


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize(
    ("second", "says"),
    [(lambda batch: len(batch[0]), "so it is a mean, and a pair is read as"), (lambda batch: 0.37, "its second part is no count")],
    ids=["a mean and a count", "a mean and a metric"],
)
def test_a_pair_that_is_no_sum_and_count_is_noticed_wherever_the_plan_came_from(second, says, learns):
    model, data = torch.nn.Linear(8, 1).double(), [each.double() for each in jobs.pairs(64)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def loss(model, batch):
        return torch.nn.functional.mse_loss(model(batch[0]), batch[1]), second(batch)

    plan = None if learns else by_hand(None, 64, 16)
    loop = autoaccum.Accumulator(model, optimizer, plan, **({"target_batch": 64, "max_micro_batch": 16} if learns else {}))
    with pytest.warns(UserWarning, match=says):
        for _ in range(4):
            loop.step(data, loss)


def test_a_sum_and_a_count_of_their_own_are_not_suspected():
    model, data = torch.nn.Linear(8, 1).double(), [each.double() for each in jobs.pairs(64)]
    loop = autoaccum.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.01), target_batch=64, max_micro_batch=16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            loop.step(data, lambda model, batch: (torch.nn.functional.mse_loss(model(batch[0]), batch[1], reduction="sum"), len(batch[0])))


def test_padded_samples_in_the_order_of_a_learned_plan_come_in_whole_windows_until_it_has_settled():
    data = [torch.randn(5 + index % 7) for index in range(120)]

    def padded(samples):
        return torch.nn.utils.rnn.pad_sequence(samples, batch_first=True)

    model = torch.nn.Linear(1, 1)
    loop = autoaccum.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.01), target_batch=30, max_micro_batch=10)
    epochs = []
    for _ in range(2):
        loader = torch.utils.data.DataLoader(data, batch_sampler=loop.plan.batch_sampler(data), collate_fn=padded)
        epochs.append([loop.step(window, lambda model, batch: model(batch[..., None]).square().mean()).micro_batches for window in loop.windows(loader)])
    assert len(loader) == 12 and epochs[1] == [3, 3, 3, 3] and not loop.plan.learning


@pytest.mark.parametrize("left_over", [0, 1, 2])
def test_a_smaller_last_window_settles_nothing(left_over):
    """Batches of 100, 100 and 56 that cannot be joined: the last window of an epoch has one part of one sample."""

    def batches():
        for _ in range(3):
            for at, size in enumerate((100, 100, 56)):
                yield {"inputs": torch.ones(size, 1 + at)}
        if left_over:
            yield {"inputs": torch.ones(left_over, 9)}

    model = nn.Linear(1, 1)
    loop = autoaccum.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.0), target_batch=256)
    for _ in range(2):
        for window in loop.windows(list(batches())):
            loop.step(window, lambda model, batch: model(batch["inputs"].sum(1, keepdim=True)).mean())
    assert not loop.plan.learning and loop.plan.micro_batch == 86


def test_a_mean_is_not_suspected():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(10):
            torch.manual_seed(seed)
            loop = autoaccum.Accumulator(jobs.small(), target_batch=64, max_micro_batch=16)
            for _ in range(4):
                loop.step(jobs.pairs(64))


def test_batches_that_cannot_be_joined_settle_at_the_loaders_size_and_it_is_said(caplog):
    def padded(samples):
        longest = max(samples)
        return {"inputs": torch.ones(len(samples), longest)}

    model = nn.Linear(1, 1)
    loader = torch.utils.data.DataLoader([1 + index % 7 for index in range(480)], batch_size=8, collate_fn=padded, shuffle=True)
    loop = autoaccum.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.0), target_batch=30)
    for window in loop.windows(loader):
        loop.step(window, lambda model, batch: model(batch["inputs"].sum(1, keepdim=True)).mean())
    assert not loop.plan.learning and sum("cannot be joined" in record.message for record in caplog.records) == 1


def test_memory_that_runs_out_where_batches_are_joined_is_rescued():
    joins = []

    class Field(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is torch.cat and not joins:
                joins.append(True)
                raise torch.OutOfMemoryError(TEXT)
            return super().__torch_function__(function, types, args, kwargs or {})

    model = nn.Linear(1, 1)
    loop = autoaccum.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.0), target_batch=30)
    for _ in range(4):
        window = autoaccum.Window.of([torch.ones(5, 1).as_subclass(Field) for _ in range(6)])
        loop.step(window, lambda model, batch: model(batch.as_subclass(torch.Tensor)).mean())
    assert joins


@pytest.mark.parametrize("limit", ["2MiB", "40MiB"])
def test_a_limit_below_what_the_process_holds_is_refused_before_training(limit):
    with pytest.raises(autoaccum.NothingFits, match=r"raise memory_limit|--memory-limit"):
        autoaccum.Accumulator(jobs.small(), target_batch=8, memory_limit=limit)


def test_a_plan_that_was_saved_too_early_says_so(tmp_path):
    job = jobs.small()
    loop = autoaccum.Accumulator(job, target_batch=60)
    loop.step(jobs.pairs(60))
    loop.plan.save(tmp_path / "plan.json")
    with pytest.warns(UserWarning, match="still learned, after 1 windows"):
        autoaccum.Accumulator(job, autoaccum.Plan.load(tmp_path / "plan.json"))


def test_what_was_learned_is_remembered_and_the_next_run_begins_there(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOACCUM_CACHE_DIR", str(tmp_path))
    limit = limit_above(100)

    def run(mib=2):
        loop = autoaccum.Accumulator(jobs.hungry(mib), target_batch=60, memory_limit=limit, cache=True)
        return [loop.step(torch.zeros(60, 1)) for _ in range(5)], loop

    first, learned = run()
    assert not learned.plan.learning and len(list(tmp_path.glob("*.json"))) == 1
    again, remembered = run()
    assert first[0].micro_batches > again[0].micro_batches == again[-1].micro_batches == learned.plan.accumulation_steps
    assert remembered.plan.learned_windows == 2 and not any(each.rescued for each in again)
    longer, grown = run(mib=4)  # samples that take twice the memory: what is remembered is wrong, and is replaced
    assert longer[0].rescued and longer[-1].micro_batches > again[-1].micro_batches and not grown.plan.learning
    assert longer[-1].rescued is None
    once_more, _ = run(mib=4)
    assert not any(each.rescued for each in once_more) and once_more[0].micro_batches == longer[-1].micro_batches


def test_a_plan_and_a_cache_are_two_answers():
    with pytest.raises(autoaccum.UsageError, match="leave cache out"):
        autoaccum.Accumulator(jobs.small(), autoaccum.tune(jobs.small(), target_batch=8), cache=True)
