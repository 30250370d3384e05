"""Nothing changed: training after tuning is bit-identical to training without it."""

import os
import random
import signal
import threading

import numpy as np
import pytest
import torch
from torch import nn

import autoaccum
from autoaccum.window import snapshot
from tests.digest import digest
from tests.plans import by_hand

MIB = 2**20


class Network(nn.Module):
    """Tied weights, a frozen layer, dropout, BatchNorm, and tensors in every place where modules keep them."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Linear(8, 8)
        self.frozen.requires_grad_(False)
        self.norm, self.dropout, self.out = nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1)
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.plain = torch.zeros(3)
        self.history = [torch.zeros(2)]
        self.calls = 0

    def forward(self, inputs):
        self.calls += 1
        self.seen += 1
        self.plain.add_(inputs.mean().detach())
        self.history.append(torch.ones(2))
        self.last = inputs.sum().detach()
        return self.out(self.head(self.dropout(self.norm(self.frozen(self.embed(inputs))))))


def loss(model, batch):
    noise = random.random() + np.random.rand() + torch.rand(())
    return (model(batch[0]) - batch[1]).square().mean() * (1 + 0.01 * noise)


class Everything:
    """A job with each thing that has state."""

    def __init__(self, *, stepped, scaler=False):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        self.model = Network()
        self.optimizer = torch.optim.Adam([p for p in self.model.parameters() if p.requires_grad], lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=256.0) if scaler else None
        self.batch = torch.randn(8, 8), torch.randn(8, 1)
        if stepped:
            self.train(3)
        loss(self.model, self.batch).backward()  # gradients of the user's own are there, too

    @property
    def job(self):
        return autoaccum.Job(self.model, self.optimizer, loss, self.batch, scheduler=self.scheduler, scaler=self.scaler)

    def train(self, windows):
        plan_like = autoaccum.Accumulator(self.job, PLAN)
        for _ in range(windows):
            plan_like.step(self.batch)

    def digest(self):
        return digest(self.model, *(each for each in (self.optimizer, self.scheduler, self.scaler) if each is not None))


@pytest.fixture(scope="module", autouse=True)
def plan():
    """A plan to train by; made once, by real tuning of a throwaway job."""
    global PLAN
    model = nn.Linear(8, 1)
    job = autoaccum.Job(
        model, torch.optim.SGD(model.parameters(), lr=0.1), lambda m, b: (m(b[0]) - b[1]).square().mean(), (torch.randn(8, 8), torch.randn(8, 1))
    )
    PLAN = autoaccum.tune(job, target_batch=8, max_micro_batch=4)


pytestmark = pytest.mark.filterwarnings("ignore:the model, optimizer")


@pytest.mark.parametrize("scaler", [False, True])
@pytest.mark.parametrize("stepped", [False, True])
def test_training_after_tuning_is_bit_identical_to_training_without(stepped, scaler):
    with_tuning, without = Everything(stepped=stepped, scaler=scaler), None
    before = with_tuning.digest()
    plan = autoaccum.tune(with_tuning.job, target_batch=30, max_micro_batch=10)
    assert plan.accumulation_steps == 3
    assert with_tuning.digest() == before
    with_tuning.train(5)
    trained = values(with_tuning)
    without = Everything(stepped=stepped, scaler=scaler)
    without.train(5)
    assert trained == values(without)


def values(everything):
    """Contents alone: two jobs never share identities."""
    told = {name: tensor.clone() for name, tensor in everything.model.state_dict().items()}
    told |= {"plain": everything.model.plain, "seen": everything.model.seen, "calls": torch.tensor(everything.model.calls)}
    for index, state in enumerate(everything.optimizer.state_dict()["state"].values()):
        told |= {f"{index} {name}": value for name, value in state.items()}
    told["rng"] = torch.get_rng_state()
    numbers = {name: tensor.numpy().tobytes() for name, tensor in told.items()}
    return numbers | {"python": random.getstate(), "numpy": str(np.random.get_state()), "lr": everything.scheduler.get_last_lr()}


def test_the_test_above_fails_when_a_snapshot_forgets_the_generators(monkeypatch):
    monkeypatch.setattr(snapshot, "_rng", list)
    everything = Everything(stepped=True)
    before = everything.digest()
    autoaccum.tune(everything.job, target_batch=30, max_micro_batch=10)
    assert everything.digest() != before


def failing(everything, phase, how):
    """A loss that fails `how` in `phase`, in the second window of a trial that is not the first."""
    calls = 0

    class Fail(torch.autograd.Function):
        @staticmethod
        def forward(context, value):
            return value.clone()

        @staticmethod
        def backward(context, gradient):
            how()
            return gradient

    def bad(model, batch):
        nonlocal calls
        calls += 1
        value = loss(model, batch)
        if calls == 5 and phase == "forward":
            how()
        return Fail.apply(value) if calls == 5 and phase == "backward" else value

    if phase == "step":
        counted, real = [0], everything.optimizer.step

        def step(*arguments, **named):
            counted[0] += 1
            result = real(*arguments, **named)
            if counted[0] == 4:
                how()
            return result

        everything.optimizer.step = step

    def batch(samples):
        if phase == "batch" and samples > 1:
            torch.rand(1)
            how()
        return torch.randn(samples, 8), torch.randn(samples, 1)

    return autoaccum.Job(everything.model, everything.optimizer, bad, batch, scheduler=everything.scheduler, scaler=everything.scaler)


def raises():
    raise ValueError("a bug of the user's")


def interrupts():
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000):  # the handler runs between two bytecodes
        pass


@pytest.mark.parametrize("phase", ["batch", "forward", "backward", "step"])
@pytest.mark.parametrize("scaler", [False, True])
@pytest.mark.parametrize(("how", "expected"), [(raises, ValueError), (interrupts, KeyboardInterrupt)], ids=["raises", "interrupted"])
def test_nothing_is_changed_when_a_trial_fails(phase, how, expected, scaler):
    everything = Everything(stepped=True, scaler=scaler)
    before = None
    for _ in range(2):  # twice in a row, too
        job = failing(everything, phase, how)
        before = before or everything.digest()
        with pytest.raises(expected):
            autoaccum.tune(job, target_batch=30, max_micro_batch=10)
        assert everything.digest() == before
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
def test_an_out_of_memory_in_a_trial_changes_nothing():
    everything = Everything(stepped=True)
    grow = loss

    def hungry(model, batch):
        weight = model.out.weight.sum()
        kept = (weight * torch.ones(len(batch[0]), 4 * MIB // 4)).exp().mean()
        return grow(model, batch) + 0 * kept

    from autoaccum.devices.cpu import Cpu

    limit = Cpu().held_bytes() + 300 * MIB
    before = everything.digest()
    job = autoaccum.Job(everything.model, everything.optimizer, hungry, everything.batch, scheduler=everything.scheduler)
    plan = autoaccum.tune(job, target_batch=120, memory_limit=limit)
    assert 1 < plan.accumulation_steps < 120 and any(each.outcome == "oom" for each in plan.trials)
    assert everything.digest() == before


def test_a_second_interrupt_waits_until_the_state_is_back(monkeypatch):
    """Two Ctrl-C: the first ends the trial, the second arrives while the state is being put back."""
    everything = Everything(stepped=True)
    real, interrupted = snapshot.Snapshot.put_back, []

    def put_back(self):
        signal.raise_signal(signal.SIGINT)
        interrupted.append(True)  # reached: the signal did not interrupt the restore
        real(self)

    monkeypatch.setattr(snapshot.Snapshot, "put_back", put_back)
    before = everything.digest()
    with pytest.raises(KeyboardInterrupt):
        autoaccum.tune(failing(everything, "forward", interrupts), target_batch=30, max_micro_batch=10)
    assert interrupted and everything.digest() == before


def test_what_is_in_keep_comes_back():
    class Average:
        """An exponential moving average as people write them."""

        def __init__(self, model):
            self.shadow = [p.detach().clone() for p in model.parameters()]
            self.updates, self.generator, self.log = 0, torch.Generator().manual_seed(5), {"seen": []}

        def update(self, model):
            self.updates += 1
            self.log["seen"].append(self.updates)
            self.shadow[0] = self.shadow[0] * 0.9
            self.shadow[1].mul_(0.9)
            torch.rand(1, generator=self.generator)

    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 1))
    average = Average(model)

    def with_average(model, batch):
        average.update(model)
        return model(batch).mean()

    kept = [tensor.clone() for tensor in average.shadow]
    state = average.generator.get_state()
    job = autoaccum.Job(model, torch.optim.SGD(model.parameters(), lr=0.1), with_average, torch.randn(4, 8), keep=[average])
    autoaccum.tune(job, target_batch=12)
    assert average.updates == 0 and average.log == {"seen": []}
    assert all(torch.equal(a, b) for a, b in zip(kept, average.shadow))
    assert torch.equal(state, average.generator.get_state())


def bare(model, **given):
    """A job of one linear model whose loss does as it is told."""
    return autoaccum.Job(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), given.pop("loss"), torch.ones(4, 4), **given)


def test_a_frozen_average_in_keep_comes_back_also_where_the_model_holds_it():
    model, average = nn.Linear(4, 1), nn.Linear(4, 1).requires_grad_(False)
    model.shadow = average

    def loss(model, batch):
        with torch.no_grad():
            average.weight.lerp_(model.weight, 0.5)
        return torch.nn.functional.linear(batch, model.weight).mean()

    before = average.weight.clone()
    autoaccum.tune(bare(model, loss=loss, keep=[average]), target_batch=8)
    assert torch.equal(before, average.weight)


def test_a_frozen_parameter_that_the_job_changes_without_keep_is_told():
    model = nn.Sequential(nn.Linear(4, 1), nn.Linear(4, 1).requires_grad_(False))

    def loss(model, batch):
        with torch.no_grad():
            model[1].weight.add_(1)
        return model[0](batch).mean()

    with pytest.warns(UserWarning, match=r"put its owner into keep="):
        autoaccum.tune(bare(model, loss=loss), target_batch=8)


def test_what_nobody_may_write_is_left_alone(tmp_path):
    """A mapped file, a read-only array, and a mapping that forbids deletion."""

    class Fixed(dict):
        def clear(self):
            raise TypeError("this mapping is fixed")

    np.save(tmp_path / "table.npy", np.arange(1000.0))
    model = nn.Linear(4, 1)
    with pytest.warns(UserWarning, match="not writable"):
        model.register_buffer("table", torch.from_numpy(np.load(tmp_path / "table.npy", mmap_mode="r")))
    model.array = np.arange(3)
    model.array.setflags(write=False)
    model.fixed = Fixed(a=1)
    assert autoaccum.tune(bare(model, loss=lambda m, b: m(b).mean()), target_batch=8).effective_batch == 8


def test_gradients_that_were_there_come_back_as_the_same_objects():
    """Sparse ones, and views of one flat buffer, too."""
    model = nn.Linear(4, 1, bias=False)
    flat = torch.arange(8.0)
    model.weight.grad = flat[2:6].view(1, 4)
    table = nn.Embedding(5, 2, sparse=True)
    model.table = table
    table(torch.tensor([1])).sum().backward()
    grads = model.weight.grad, table.weight.grad
    autoaccum.tune(bare(model, loss=lambda m, b: m(b).mean()), target_batch=8)
    assert model.weight.grad is grads[0] and table.weight.grad is grads[1]
    flat[3] = 70.0
    assert model.weight.grad.tolist() == [[2.0, 70.0, 4.0, 5.0]] and table.weight.grad.to_dense()[1].tolist() == [1.0, 1.0]


def test_views_of_one_memory_come_back_whole():
    model, shared = nn.Linear(4, 1), np.arange(6.0)
    model.head, model.whole = torch.from_numpy(shared[:3]), torch.from_numpy(shared)

    def loss(model, batch):
        model.whole.mul_(2)
        model.weight.data = model.weight.data.clone()
        return model(batch).mean()

    pointer = model.weight.data_ptr()
    autoaccum.tune(bare(model, loss=loss), target_batch=8)
    assert shared.tolist() == list(range(6)) and model.weight.data_ptr() == pointer


def test_buffers_of_a_scripted_module_come_back():
    model = nn.Sequential(torch.jit.script(nn.BatchNorm1d(4)), nn.Linear(4, 1))
    before = model[0].running_mean.clone()
    autoaccum.tune(bare(model, loss=lambda m, b: m(b + torch.rand_like(b)).mean()), target_batch=8)
    assert torch.equal(before, model[0].running_mean)


def test_one_thing_that_cannot_be_put_back_does_not_keep_the_others_from_it():
    class Broken:
        def get_state(self):
            return 1

        def set_state(self, state):
            raise OSError("lost")

    model = nn.Linear(4, 1)
    job = bare(model, loss=lambda m, b: (m(b) * torch.rand(())).mean(), keep=[Broken()])
    kept = snapshot.Snapshot([job])
    before = torch.get_rng_state()
    torch.rand(3)
    with torch.no_grad():
        model.weight.add_(1)
    changed = model.weight.clone()
    with pytest.raises(autoaccum.DeviceError, match="lost"):
        kept.put_back()
    assert torch.equal(before, torch.get_rng_state()) and not torch.equal(changed, model.weight)


def test_a_copy_that_host_memory_cannot_hold_is_refused_with_the_figures(monkeypatch):
    import psutil

    everything = Everything(stepped=True)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Host", (), {"available": 100, "total": 200})())
    with pytest.raises(autoaccum.DeviceError, match=r"KiB of host memory and 100 B are free"):
        snapshot.Snapshot([everything.job])


def test_frozen_parameters_are_not_copied():
    frozen, trained = nn.Linear(1000, 1000), nn.Linear(1000, 1)
    frozen.requires_grad_(False)
    model = nn.Sequential(frozen, trained)
    job = autoaccum.Job(model, torch.optim.SGD(trained.parameters(), lr=0.1), lambda m, b: m(b).mean(), torch.randn(2, 1000))
    assert snapshot.Snapshot([job]).host_bytes == 4 * 1001


def test_tuning_works_outside_the_main_thread():
    everything, plans = Everything(stepped=False), []
    thread = threading.Thread(target=lambda: plans.append(autoaccum.tune(everything.job, target_batch=8)))
    thread.start()
    thread.join()
    assert plans[0].effective_batch == 8


class Grows(nn.Module):
    """A buffer that the first forward grows in place, as observers of quantisation-aware training do."""

    def __init__(self, shrinks=False):
        super().__init__()
        self.inner = nn.Linear(4, 1)
        self.register_buffer("seen", torch.arange(8.0) if shrinks else torch.full((1,), 7.0))

    def forward(self, x):
        if self.seen.numel() != 4:
            self.seen.resize_(4)
        self.seen.copy_(x.detach().mean(0))
        return self.inner(x)


@pytest.mark.parametrize("shrinks", [False, True])
def test_a_buffer_that_forward_resizes_comes_back_in_its_size(shrinks):
    model = Grows(shrinks)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.seen.clone()
    for _ in range(2):
        autoaccum.tune(model, optimizer, lambda model, batch: model(batch).mean(), torch.randn(4, 4), target_batch=8, max_micro_batch=4)
        assert torch.equal(model.seen, before) and model.seen.shape == before.shape
    model(torch.randn(4, 4))  # it goes on as it would have
    assert model.seen.shape == (4,)


def test_a_window_that_runs_again_starts_from_the_size_of_then():
    model = Grows()
    ran = []

    def loss(model, batch):
        ran.append(tuple(model.seen.shape))
        value = model(batch).mean()
        if len(ran) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return value

    job = autoaccum.Job(model, torch.optim.SGD(model.parameters(), lr=0.1), loss, torch.randn(4, 4))
    assert autoaccum.Accumulator(job, by_hand(job, 8, 8)).step(torch.randn(8, 4)).rescued
    assert ran[:2] == [(1,), (1,)]


@pytest.mark.filterwarnings("ignore")
def test_quantisation_aware_training_comes_back_whole():
    torch.manual_seed(0)
    model = nn.Sequential(torch.ao.quantization.QuantStub(), nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
    torch.ao.quantization.prepare_qat(model.train(), inplace=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = torch.randn(16, 3, 8, 8), torch.randint(0, 10, (16,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    autoaccum.tune(model, optimizer, lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]), batch, target_batch=60, max_micro_batch=20)
    after = model.state_dict()
    assert all(before[name].shape == after[name].shape and torch.equal(before[name], after[name]) for name in before)


def test_the_gradient_of_a_frozen_parameter_is_there_again():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    gradient = model[0].weight.grad = torch.ones(4, 4)
    model[0].requires_grad_(False)
    autoaccum.tune(model, torch.optim.SGD(model.parameters(), lr=0.1), lambda model, batch: model(batch).mean(), torch.randn(4, 4), target_batch=8)
    assert model[0].weight.grad is gradient and torch.equal(gradient, torch.ones(4, 4))


def test_a_lazy_module_is_told_and_the_remedy_works():
    model = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.Linear(4, 1))

    def loss(model, batch):
        return model(batch).mean()

    with pytest.raises(
        autoaccum.JobError, match=r"'0.weight' has no shape before the first forward .*: run the model once on a batch, and make the optimizer after"
    ):
        autoaccum.tune(model, torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1), loss, torch.randn(4, 4), target_batch=8)
    model(torch.randn(4, 4))
    assert autoaccum.tune(model, torch.optim.SGD(model.parameters(), lr=0.1), loss, torch.randn(4, 4), target_batch=8).micro_batch == 8


def test_what_cannot_be_put_back_blames_the_device_only_for_its_own_errors():
    from autoaccum import oom

    assert oom.is_of_device(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not oom.is_of_device(RuntimeError("size does not match, self was 32 bytes but src was 4 bytes"))


@pytest.mark.parametrize("nbytes", [0, 1, 4 * 4096, 3 * 4 * 4096 + 5, 2**20 + 3])
def test_a_digest_tells_any_change_of_a_storages_bytes(nbytes):
    torch.manual_seed(0)
    content = torch.randint(0, 256, (nbytes,), dtype=torch.uint8)
    storage = content.untyped_storage()
    before = snapshot.digest(storage)
    assert before.numel() <= 3 * 4096 * 4 + 2 * nbytes // (4 * 4096) and torch.equal(before, snapshot.digest(content.clone().untyped_storage()))
    for at in {0, nbytes // 2, nbytes - 1} if nbytes else ():
        content[at] ^= 1
        assert not torch.equal(before, snapshot.digest(storage))
        content[at] ^= 1
    if nbytes > 1:
        content[:2] = content[:2].flip(0)  # bytes that change places
        assert torch.equal(before, snapshot.digest(storage)) == bool(content[0] == content[1])
