"""In a real Trainer: every optimizer step is over the target, its gradient that of the whole window, and all is put back."""

import copy
import logging
import pickle
import warnings

import lightning
import pytest
import torch
import torchmetrics
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import autoaccum
from autoaccum.devices.cpu import Cpu
from autoaccum.integrations.lightning import EffectiveBatch
from tests.data.test_lengths import Hungry, Texts, padded
from tests.data.test_lengths import loss as masked
from tests.digest import digest
from tests.plans import by_hand
from tests.tuner.test_in_place import limit_for

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")


class Module(lightning.LightningModule):
    def __init__(self, inner=None, loss=None, lr=0.0, loader=None):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(8, 1).double() if inner is None else inner
        self._loss, self._lr, self._own = loss or (lambda model, batch: nn.functional.mse_loss(model(batch[0]), batch[1])), lr, loader
        self.seen, self.gradients, self.samples, self.total = [], [], [], None

    def training_step(self, batch, batch_idx):
        found = self._loss(self.inner, batch)
        self.log("train_loss", found)
        self._saw(batch)
        return found

    def _saw(self, batch):
        if torch.is_grad_enabled():  # not when the first windows are looked at
            self.seen.append(len(batch[0]))

    def on_before_optimizer_step(self, optimizer):
        self.gradients.append(torch.cat([each.grad.flatten().clone() for each in self.inner.parameters()]))
        self.samples.append(sum(self.seen))
        self.seen.clear()

    def configure_optimizers(self):
        self.total = self.trainer.estimated_stepping_batches
        return torch.optim.AdamW(self.parameters(), lr=self._lr)

    def train_dataloader(self):
        return self._own


def data(samples):
    drawn = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(samples, 8, dtype=torch.float64, generator=drawn), torch.randn(samples, 1, dtype=torch.float64, generator=drawn))


def trainer(tmp_path, *callbacks, **given):
    settings = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return lightning.Trainer(default_root_dir=tmp_path, callbacks=list(callbacks), **{**settings, "max_epochs": 1, **given})


@pytest.mark.parametrize("where", ["passed in", "the model's"])
@pytest.mark.parametrize(("target", "most", "last"), [(120, 50, 23), (22, 4, 7), (24, 24, 5)])
def test_every_step_is_the_whole_windows_gradient(tmp_path, target, most, last, where):
    pairs = data(2 * target + last)
    loader = DataLoader(pairs, batch_size=7)
    model = Module(loader=loader)
    callback = EffectiveBatch(target, max_micro_batch=most)
    made = trainer(tmp_path, callback)
    made.fit(model, *([loader] if where == "passed in" else []))
    assert callback.plan.micro_batch <= most and callback.plan.target_batch == target
    assert model.samples == [target, target, last] and made.global_step == 3
    assert made.accumulate_grad_batches == 1 and made._accelerator_connector.use_distributed_sampler
    assert model.total == 3  # what a schedule is made for
    whole = Module()
    for start, ours in zip((0, target, 2 * target), model.gradients):
        whole.zero_grad()
        whole._loss(whole.inner, pairs[start : min(start + target, len(pairs))]).backward()
        theirs = torch.cat([each.grad.flatten() for each in whole.inner.parameters()])
        assert (ours - theirs).norm() / theirs.norm() < 1e-13


def test_nothing_is_left_of_tuning_and_training_survives_the_limit(tmp_path):
    texts = Texts(100, 120)
    model = Module(Hungry(32), masked, lr=1e-6)
    allowed = limit_for(90)

    class Watched(EffectiveBatch):
        def on_fit_start(self, trainer, pl_module):
            before = digest(pl_module), repr(trainer.optimizers[0].state_dict())
            super().on_fit_start(trainer, pl_module)
            assert (digest(pl_module), repr(trainer.optimizers[0].state_dict())) == before
            device = Cpu()
            device.prepare()
            self.cap = device.capped(allowed)
            self.cap.__enter__()

        def teardown(self, trainer, pl_module, stage):
            self.cap.__exit__(None, None, None)
            super().teardown(trainer, pl_module, stage)

    callback = Watched(30, batch=autoaccum.worst_case(texts, collate=padded), memory_limit=allowed)
    made = trainer(tmp_path, callback, max_epochs=5, gradient_clip_val=1.0)
    made.fit(model, DataLoader(texts, batch_size=3, shuffle=True, collate_fn=padded))
    assert callback.plan.accumulation_steps > 1
    assert model.samples == [30, 30, 30, 10] * 5 and made.global_step == 20


def test_a_stream_comes_in_windows_too(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([pairs[index] for index in range(50)])

    pairs = data(50)
    model = Module()
    trainer(tmp_path, EffectiveBatch(20, max_micro_batch=7)).fit(model, DataLoader(Stream(), batch_size=8))
    assert model.samples == [20, 20, 10]


def test_a_plan_that_was_made_before_is_applied(tmp_path):
    plan, model = by_hand(None, 20, 7), Module()
    made = trainer(tmp_path)
    plan.apply(made)
    made.fit(model, DataLoader(data(40), batch_size=8, shuffle=True))
    assert model.samples == [20, 20]
    assert trainer(tmp_path, **by_hand(None, 24, 8).to_lightning()).accumulate_grad_batches == 3


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"accumulate_grad_batches": 2}, "both say how to accumulate"),
        ({"overfit_batches": 2}, "overfit_batches takes batches"),
        ({"limit_train_batches": 0.5}, "ends inside a window"),
    ],
)
def test_what_would_not_be_exact_is_refused(tmp_path, given, said):
    made = trainer(tmp_path, EffectiveBatch(20, max_micro_batch=7, tune=True), **given)
    with pytest.raises(autoaccum.UsageError, match=said):
        made.fit(Module(), DataLoader(data(40), batch_size=8))
    assert made.accumulate_grad_batches == given.get("accumulate_grad_batches", 1)


@pytest.mark.parametrize(
    ("given", "samples"),
    [
        ({"shuffle": True, "drop_last": True}, [22, 22]),
        ({"sampler": torch.utils.data.SubsetRandomSampler(range(30))}, [22, 8]),
        ({"sampler": torch.utils.data.WeightedRandomSampler(torch.ones(46), num_samples=60)}, [22, 22, 16]),
        ({"sampler": torch.utils.data.RandomSampler(range(46), num_samples=25)}, [22, 3]),
        ({"sampler": torch.utils.data.SubsetRandomSampler(range(30)), "drop_last": True}, [22, 6]),
    ],
)
def test_the_loaders_own_order_and_length_are_kept(tmp_path, given, samples):
    model = Module()
    made = trainer(tmp_path, EffectiveBatch(22, max_micro_batch=4))
    made.fit(model, DataLoader(data(46), batch_size=7, **given))
    assert model.samples == samples and model.total == made.global_step == len(samples)


def test_a_loader_that_is_made_anew_for_every_epoch_is(tmp_path):
    made_with = []

    class Reloading(Module):
        def train_dataloader(self):
            made_with.append(self.trainer.current_epoch)
            return DataLoader(data(22 + 2 * self.trainer.current_epoch), batch_size=7)

    model = Reloading()
    trainer(tmp_path, EffectiveBatch(22, max_micro_batch=4), max_epochs=3, reload_dataloaders_every_n_epochs=1).fit(model)
    assert model.samples == [22, 22, 2, 22, 4] and {0, 1, 2} <= set(made_with)


def test_a_smaller_last_window_of_batches_that_cannot_be_joined_is_whole(tmp_path):
    """Padded to unlike lengths, in an order of the user's own: 20 samples in batches of 8, 8 and 4."""
    texts, seen = Texts(44, 60), []

    class Counting(Module):
        def training_step(self, batch, batch_idx):
            if torch.is_grad_enabled():
                seen.append(len(batch[0]))
            return self.inner(batch[0][:, :1, 0].double().expand(-1, 8)).mean()

    loader = DataLoader(texts, batch_size=8, sampler=torch.utils.data.SubsetRandomSampler(range(44)), collate_fn=padded)
    trainer(tmp_path, EffectiveBatch(24, max_micro_batch=8, tune=True)).fit(Counting(), loader)
    assert seen[-6:] == [8, 8, 8, 8, 8, 4]
    seen.clear()
    trainer(tmp_path, EffectiveBatch(24, max_micro_batch=8), max_epochs=3).fit(Counting(), loader)  # learned
    assert sum(seen) == 3 * 44 and seen[-6:] == [8, 8, 8, 8, 8, 4]


def _fitted(tmp_path, loader, *more, most=4, target=22, seed=7, tune=None, **given):
    """Three epochs of windows of 22 samples. loader: a function, so that nothing of an earlier run is left in it."""
    torch.manual_seed(seed)
    made_loader, model = loader(), Module(lr=0.1)
    ckpt_path = given.pop("ckpt_path", None)
    made = trainer(tmp_path, EffectiveBatch(target, max_micro_batch=most, tune=tune), *more, **{"max_epochs": 3, **given})
    made.fit(model, made_loader, ckpt_path=ckpt_path)
    return model, made


LOADERS = {
    "shuffled": lambda: DataLoader(data(46), batch_size=7, shuffle=True),
    "in order": lambda: DataLoader(data(46), batch_size=7),
    "its own order": lambda: DataLoader(data(46), batch_sampler=[list(range(start, min(start + 9, 46))) for start in range(0, 46, 9)]),
}


@pytest.mark.parametrize("before", ["learned", "measured"])
@pytest.mark.parametrize("order", LOADERS)
def test_a_checkpoint_goes_on_after_any_window_with_other_micro_batches(tmp_path, order, before):
    """Three windows an epoch, of 22, 22 and 2 samples; checkpoints after each, the last of which is an epoch's end."""
    writes = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1, save_last=True)
    whole, _ = _fitted(tmp_path, LOADERS[order], writes, enable_checkpointing=True, tune=before == "measured")
    assert len(whole.samples) == 9
    for step, most in ((1, 4), (1, 22), (2, 6), (3, 4), (3, 11), (4, 2), (5, 22), (6, 6), (8, 6)):
        gone_on, made = _fitted(tmp_path, LOADERS[order], most=most, seed=8, tune=step % 3 > 0, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert gone_on.samples == whole.samples[step:] and made.global_step == 9, (step, most)
        assert (gone_on.inner.weight - whole.inner.weight).abs().max() < 1e-14, (step, most)


def test_a_checkpoint_of_an_epochs_end_goes_on(tmp_path):
    writes = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", every_n_epochs=1, save_top_k=-1)
    whole, _ = _fitted(tmp_path, LOADERS["shuffled"], writes, enable_checkpointing=True)
    for epoch in (0, 1):
        gone_on, _ = _fitted(tmp_path, LOADERS["shuffled"], most=11, seed=8, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert gone_on.samples == [22, 22, 2] * (2 - epoch) and (gone_on.inner.weight - whole.inner.weight).abs().max() < 1e-14


def test_a_checkpoint_from_inside_a_window_begins_it_again(tmp_path):
    class Writes(lightning.pytorch.callbacks.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 8 and trainer.current_epoch == 0:  # 6 micro-batches are the first window, and this is the third of the second
                trainer.save_checkpoint(tmp_path / "inside.ckpt")

    _fitted(tmp_path, LOADERS["shuffled"], Writes(), tune=True)
    gone_on, _ = _fitted(tmp_path, LOADERS["shuffled"], most=11, seed=8, max_epochs=1, ckpt_path=tmp_path / "inside.ckpt")
    assert gone_on.samples == [22, 2]
    once, _ = _fitted(tmp_path, LOADERS["shuffled"], max_epochs=1)
    assert (gone_on.inner.weight - once.inner.weight).abs().max() < 1e-14


def test_a_checkpoint_whose_place_cannot_be_found_or_of_another_target_is_refused(tmp_path):
    inside = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, filename="inside", every_n_train_steps=1, save_top_k=1)

    def random():
        return DataLoader(data(46), batch_size=7, sampler=torch.utils.data.RandomSampler(range(46), replacement=True))

    _fitted(tmp_path, random, inside, enable_checkpointing=True, max_steps=1, tune=True)
    with pytest.raises(autoaccum.UsageError, match="written inside an epoch, after 6 micro-batches, and no place in its data"):
        _fitted(tmp_path, random, ckpt_path=inside.best_model_path)
    inside = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, filename="other", every_n_train_steps=1, save_top_k=1)
    _fitted(tmp_path, LOADERS["in order"], inside, enable_checkpointing=True, max_steps=1)
    with pytest.raises(autoaccum.PlanError, match="the state is of windows of 22, and this loop's target is 20"):
        _fitted(tmp_path, LOADERS["in order"], target=20, ckpt_path=inside.best_model_path)


def test_what_cannot_be_meant_is_told_at_once(tmp_path):
    for wrong, said in ((lambda: EffectiveBatch(0), "at least 1, not 0"), (lambda: EffectiveBatch(20, memory_limits=1), "did you mean 'memory_limit'")):
        with pytest.raises(autoaccum.UsageError, match=said):
            wrong()
    with pytest.raises(autoaccum.UsageError, match="give one"):
        trainer(tmp_path, EffectiveBatch(20), EffectiveBatch(30)).fit(Module(), DataLoader(data(40), batch_size=8))
    with pytest.warns(UserWarning, match="40 samples, fewer than the target batch of 50"):
        trainer(tmp_path, EffectiveBatch(50)).fit(Module(), DataLoader(data(40), batch_size=8))


def test_a_fast_run_is_of_one_window(tmp_path):
    model = Module()
    made = trainer(tmp_path, EffectiveBatch(20, max_micro_batch=7), fast_dev_run=True)
    made.fit(model, DataLoader(data(40), batch_size=8))
    assert model.samples == [20] and made.limit_train_batches == 1


def test_a_model_that_optimizes_by_itself_is_told_how(tmp_path):
    model = Module()
    model.automatic_optimization = False
    with pytest.raises(autoaccum.UsageError, match=r"loop over plan.split\(batch\)"):
        trainer(tmp_path, EffectiveBatch(20)).fit(model, DataLoader(data(40), batch_size=8))


class Again(torch.optim.SGD):
    """Evaluates its closure twice, which its signature does not tell."""

    def step(self, closure=None):
        with torch.enable_grad():
            closure()
            closure()
        return super().step()


class Optimized(Module):
    def __init__(self, make):
        super().__init__()
        self._make = make

    def configure_optimizers(self):
        return self._make(self.parameters())


@pytest.mark.parametrize("make", [torch.optim.LBFGS, lambda parameters: Again(parameters, lr=0.1)])
def test_an_optimizer_that_evaluates_again_is_refused_by_name_and_the_remedies_work(tmp_path, make):
    loader = DataLoader(data(40), batch_size=8)
    with pytest.raises(autoaccum.PlanError, match=r"(LBFGS|Again) evaluates the loss again .* or with autoaccum.Accumulator"):
        trainer(tmp_path, EffectiveBatch(20, max_micro_batch=7, tune=True)).fit(Optimized(make), loader)
    in_one_piece, learned = Optimized(make), Optimized(make)
    trainer(tmp_path, EffectiveBatch(20, tune=True)).fit(in_one_piece, loader)
    trainer(tmp_path, EffectiveBatch(20, max_micro_batch=7)).fit(learned, loader)  # each evaluation is of the whole window
    assert (in_one_piece.inner.weight - learned.inner.weight).abs().max() < 1e-8


def counted_mean(model, batch):
    """A mean over what the third tensor counts; nan where that is nothing."""
    return ((model(batch[0]) - batch[1]).square() * batch[2]).sum() / batch[2].sum()


def counted_data(samples, empty=()):
    counts = torch.randint(0, 4, (samples, 1), generator=torch.Generator().manual_seed(3)).double()
    counts[list(empty)] = 0
    return TensorDataset(*data(samples).tensors, counts)


@pytest.mark.parametrize("empty", [(), range(4, 8), range(5)])
@pytest.mark.parametrize("through", ["the callback", "plan.apply"])
def test_a_mean_over_something_else_than_samples_is_weighted_by_its_count(tmp_path, empty, through):
    pairs = counted_data(53, empty)
    loader, model = DataLoader(pairs, batch_size=8), Module(loss=counted_mean)
    settings = {"count": lambda batch: batch[2].sum()}
    if through == "the callback":
        made = trainer(tmp_path, EffectiveBatch(22, max_micro_batch=4, **settings))
    else:
        made = trainer(tmp_path)
        by_hand(None, 22, 4).apply(made, **settings)
    made.fit(model, loader)
    whole = Module(loss=counted_mean)
    for start, ours in zip((0, 22, 44), model.gradients):
        whole.zero_grad()
        counted_mean(whole.inner, pairs[start : min(start + 22, 53)]).backward()
        theirs = torch.cat([each.grad.flatten() for each in whole.inner.parameters()])
        assert (ours - theirs).norm() / theirs.norm() < 1e-12
    assert len(model.gradients) == 3


def test_a_mean_over_something_else_is_told_with_its_cure_and_a_window_of_nothing_is_refused(tmp_path):
    with pytest.warns(UserWarning, match="give EffectiveBatch count="):
        trainer(tmp_path, EffectiveBatch(22, max_micro_batch=4, tune=True)).fit(Module(loss=counted_mean), DataLoader(counted_data(44), batch_size=8))
    with pytest.warns(UserWarning, match="micro-batch of 1 sample is nan, .* give EffectiveBatch count="):
        trainer(tmp_path, EffectiveBatch(22, max_micro_batch=4)).fit(Module(loss=counted_mean), DataLoader(counted_data(44), batch_size=8))
    nothing = EffectiveBatch(22, plan=by_hand(None, 22, 4), count=lambda batch: batch[2].sum())
    with pytest.raises(autoaccum.PlanError, match="counts nothing in a window of 22 samples"):
        trainer(tmp_path, nothing).fit(Module(loss=counted_mean), DataLoader(counted_data(44, range(22)), batch_size=8))
    with pytest.raises(autoaccum.UsageError, match="count must be a function of a batch, not int"):
        EffectiveBatch(22, count=3)


def test_a_schedule_under_limit_train_batches_is_as_long_as_training_or_refused_with_what_works(tmp_path):
    """The limit counts micro-batches: 12 of them are 2 windows of 6, in each of 2 epochs."""
    loader = DataLoader(data(72), batch_size=7)

    def fitted(callback, **given):
        model = Module()
        made = trainer(tmp_path, callback, **given)
        made.fit(model, loader)
        return model.total, made.global_step

    with pytest.raises(
        autoaccum.UsageError, match=r"limit_train_batches=12 counts micro-batches.* give max_steps instead, or tune before and give EffectiveBatch plan="
    ):
        fitted(EffectiveBatch(24, max_micro_batch=4, tune=True), max_epochs=2, limit_train_batches=12)
    with pytest.raises(autoaccum.UsageError, match=r"ends inside a window of 7 x 2 \+ 6 x 1: give a whole number of windows, 3 for instance"):
        fitted(EffectiveBatch(20, plan=by_hand(None, 20, 7)), limit_train_batches=4)
    assert fitted(EffectiveBatch(24, plan=by_hand(None, 24, 4)), max_epochs=2, limit_train_batches=12) == (4, 4)
    assert fitted(EffectiveBatch(24, max_micro_batch=4, tune=True), max_epochs=2, max_steps=4) == (4, 4)
    assert fitted(EffectiveBatch(24, max_micro_batch=4), max_epochs=2, limit_train_batches=2) == (4, 4)  # learned: it counts windows


def test_a_window_that_runs_out_while_it_learns_runs_again_and_what_it_logged_is_taken_back(tmp_path):
    """Above five samples it runs out: gradients, hooks, and the mean that is logged over an epoch are those of whole windows."""
    pairs, ran_out, backwards, seen = data(66), [], [], []

    def loss(model, batch):
        if len(batch[0]) > 5:
            ran_out.append(len(batch[0]))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    class Hooked(Module):
        def training_step(self, batch, batch_idx):
            found = self._loss(self.inner, batch)
            self.log("train_loss", found, on_epoch=True, on_step=False)
            self.log("of_step", found)
            self.losses.append(float(found) * len(batch[0]))
            return {"loss": found, "size": len(batch[0])}

        def on_after_backward(self):
            backwards.append(1)

        def on_before_batch_transfer(self, batch, dataloader_idx):
            return [batch[0] * 2, batch[1]]

        def on_train_batch_end(self, outputs, batch, batch_idx):
            seen.append((float(outputs["loss"]), len(batch[0]), batch_idx))

        def on_train_epoch_end(self):
            seen.append(sum(self.losses) / 66)

        def _saw(self, batch): ...

        def on_before_optimizer_step(self, optimizer):
            self.gradients.append(torch.cat([each.grad.flatten().clone() for each in self.inner.parameters()]))

    class Steps(lightning.pytorch.callbacks.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            steps.append(float(trainer._results["training_step.of_step"]._forward_cache))

    steps = []
    model, callback = Hooked(loss=loss), EffectiveBatch(22)
    model.losses = []
    made = trainer(tmp_path, callback, Steps())
    made.fit(model, DataLoader(pairs, batch_size=7))
    whole = Module()
    losses = []
    for start, ours in zip((0, 22, 44), model.gradients):
        whole.zero_grad()
        inputs, targets = pairs[start : start + 22]
        losses.append(whole._loss(whole.inner, (inputs * 2, targets)))
        losses[-1].backward()
        theirs = torch.cat([each.grad.flatten() for each in whole.inner.parameters()])
        assert (ours - theirs).norm() / theirs.norm() < 1e-13
    assert ran_out and callback.plan.micro_batch <= 5 and callback.plan.learned_windows == 3
    assert seen.pop() == pytest.approx(float(sum(losses)) / 3, rel=1e-6)  # a list of the module's own has each micro-batch once
    assert [(samples, index) for _, samples, index in seen] == [(22, 0), (22, 1), (22, 2)]
    assert steps == pytest.approx([float(loss) for loss in losses], rel=1e-6)  # what is logged for a step is the window's mean
    for (ours, _, _), theirs in zip(seen, losses):
        assert ours == pytest.approx(float(theirs), rel=1e-12)
    assert float(made.callback_metrics["train_loss"]) == pytest.approx(float(sum(losses)) / 3, rel=1e-6)
    assert len(backwards) >= 3 * 5
    assert "batch_to_device" not in vars(made.strategy) and "_on_before_batch_transfer" not in vars(model)


class Counter(torchmetrics.Metric):
    """The samples that it has seen, summed in place."""

    def __init__(self):
        super().__init__()
        self.add_state("seen", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, samples):
        self.seen += samples

    def compute(self):
        return self.seen.clone()


@pytest.mark.parametrize("tune", [None, True])
def test_metrics_count_each_sample_once_whatever_ran_again_or_was_compared(tmp_path, tune):
    pairs, ran_out = data(64), []

    def loss(model, batch):
        if len(batch[0]) > 3 and torch.is_grad_enabled() and made.global_step == 1 and not tune and not ran_out:
            ran_out.append(len(batch[0]))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    class Counted(Module):
        def __init__(self):
            super().__init__(loss=loss)
            self.logged, self.kept = Counter(), Counter()

        def training_step(self, batch, batch_idx):
            self.logged(len(batch[0]))
            self.kept.update(len(batch[0]))
            self.log("seen", self.logged, on_epoch=True, on_step=False)
            return loss(self.inner, batch)

        def on_before_optimizer_step(self, optimizer): ...

    model = Counted()
    made = trainer(tmp_path, EffectiveBatch(16, max_micro_batch=4, tune=tune))
    made.fit(model, DataLoader(pairs, batch_size=7))
    assert bool(ran_out) is (tune is None)
    assert float(made.callback_metrics["seen"]) == 64 and float(model.kept.compute()) == 64


@pytest.mark.parametrize("tune", [None, True])
@pytest.mark.parametrize("length", [7, 16])
def test_the_hook_before_the_transfer_runs_on_what_the_training_step_gets(tmp_path, length, tune):
    """It adds a tensor that has no samples, once as long as a window."""
    met = []

    class Hooked(Module):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return {"inputs": batch[0], "targets": batch[1], "positions": torch.arange(length)}

        def training_step(self, batch, batch_idx):
            met.append(len(batch["positions"]))
            return nn.functional.mse_loss(self.inner(batch["inputs"]), batch["targets"])

        def on_before_optimizer_step(self, optimizer): ...

    trainer(tmp_path, EffectiveBatch(16, max_micro_batch=4, tune=tune)).fit(Hooked(), DataLoader(data(32), batch_size=7))
    assert set(met) == {length}


class Plain(lightning.LightningModule):
    """Without functions of its own, which cannot be written to a file."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 1).double()

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] * 2, *batch[1:]]

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.inner(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_module_can_be_copied_and_written_to_a_file_while_it_learns(tmp_path):
    copies = []

    class Copies(lightning.pytorch.callbacks.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer_of, pl_module._trainer = pl_module._trainer, None  # a Trainer cannot be copied, with or without autoaccum
            copies.append(copy.deepcopy(pl_module))
            copies.append(pickle.loads(pickle.dumps(pl_module)))
            pl_module._trainer = trainer_of

    trainer(tmp_path, EffectiveBatch(16), Copies()).fit(Plain(), DataLoader(data(32), batch_size=7))
    assert len(copies) == 4
    for copied in copies:
        assert copied._on_before_batch_transfer([torch.ones(2)], dataloader_idx=0)[0].tolist() == [2, 2]


def test_micro_batches_in_which_nothing_counts_teach_nothing_and_a_step_may_leave_one_out(tmp_path):
    counts = torch.ones(64, 1, dtype=torch.float64)
    counts[2:14] = 0
    pairs = TensorDataset(*data(64).tensors, counts)
    model, callback = Module(loss=counted_mean), EffectiveBatch(16, count=lambda batch: batch[2].sum(), max_micro_batch=4)
    trainer(tmp_path, callback, max_epochs=2).fit(model, DataLoader(pairs, batch_size=8))
    whole = Module(loss=counted_mean)
    for start, ours in zip((0, 16, 32, 48), model.gradients):
        whole.zero_grad()
        counted_mean(whole.inner, pairs[start : start + 16]).backward()
        theirs = torch.cat([each.grad.flatten() for each in whole.inner.parameters()])
        assert (ours - theirs).norm() / theirs.norm() < 1e-12
    assert callback.plan.micro_batches == (4, 4, 4, 4)

    class Leaves(Module):
        def training_step(self, batch, batch_idx):
            return None if batch[0].mean() > 10 else super().training_step(batch, batch_idx)

    far = TensorDataset(torch.cat([torch.full((4, 8), 20.0), torch.randn(28, 8)]).double(), torch.randn(32, 1).double())
    leaving = Leaves()
    trainer(tmp_path, EffectiveBatch(16, max_micro_batch=4)).fit(leaving, DataLoader(far, batch_size=8))
    assert all(torch.isfinite(each).all() for each in leaving.gradients)


@pytest.mark.parametrize("tune", [None, True])
def test_a_stream_of_whole_numbers_is_exact_from_the_first_window_on(tmp_path, tune):
    """Lightning reads a stream one batch ahead, so the next window is looked at while gradients of this one are held."""
    ids = torch.randint(0, 30, (360, 4), generator=torch.Generator().manual_seed(0))

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(ids)

    class Embedded(Module):
        def __init__(self):
            super().__init__(inner=nn.Embedding(30, 4).double(), loss=lambda model, batch: (model(batch).mean(1) - 1).square().mean())

        def _saw(self, batch): ...

    model = Embedded()
    trainer(tmp_path, EffectiveBatch(120, max_micro_batch=40, tune=tune)).fit(model, DataLoader(Stream(), batch_size=32))
    whole = Embedded()
    whole.inner.load_state_dict(model.inner.state_dict())  # its learning rate is 0
    assert len(model.gradients) == 3
    for start, ours in zip((0, 120, 240), model.gradients):
        whole.zero_grad()
        whole._loss(whole.inner, ids[start : start + 120]).backward()
        assert (ours - whole.inner.weight.grad.flatten()).norm() / ours.norm() < 1e-12


def test_what_only_a_measurement_can_answer_is_measured_or_refused(tmp_path):
    loader = DataLoader(data(40), batch_size=8)
    callback = EffectiveBatch(20, batch=data(40)[:8], max_micro_batch=7)
    trainer(tmp_path, callback).fit(Module(), loader)
    assert callback.plan.trials and not callback.plan.learned_windows
    with pytest.raises(autoaccum.UsageError, match="measures before training with largest: leave tune=False out"):
        trainer(tmp_path, EffectiveBatch(20, largest=True, tune=False)).fit(Module(), loader)


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_it_learns_under_lightnings_precision(tmp_path, precision):
    model = Module(
        inner=nn.Linear(8, 1), loss=lambda model, batch: nn.functional.mse_loss(model(batch[0].to(model.weight.dtype)), batch[1].to(model.weight.dtype))
    )
    callback = EffectiveBatch(22, max_micro_batch=4)
    trainer(tmp_path, callback, precision=precision, max_epochs=2).fit(model, DataLoader(data(46), batch_size=7))
    assert model.samples == [22, 22, 2] * 2 and callback.plan.micro_batches == (4, 4, 4, 4, 3, 3)


class Validated(Module):
    def __init__(self):
        super().__init__(loader=DataLoader(data(40), batch_size=4))
        self.validated = []

    def validation_step(self, batch, batch_idx):
        assert not self.training and not torch.is_grad_enabled()
        self.validated.append(len(batch[0]))
        self.log("val_loss", self.inner(batch[0]).mean())


@pytest.mark.parametrize("limited", [False, True])
def test_the_batch_of_validation_is_searched_and_set(tmp_path, limited):
    """Not where `limit_val_batches` counts batches: it would then validate on other samples."""
    module, callback = Validated(), EffectiveBatch(12, evaluate=True)
    settings = {"limit_val_batches": 2} if limited else {}
    runner = trainer(tmp_path, callback, num_sanity_val_steps=0, **settings)
    loader = DataLoader(data(30), batch_size=4)
    runner.fit(module, val_dataloaders=loader)
    assert callback.plan.eval_batch == 30
    assert module.validated == ([4, 4] if limited else [30])
    runner.validate(module, loader, verbose=False)
    assert set(module.validated[1:]) == {4} if limited else module.validated[1] == 4  # outside of fit the loader is the user's


def test_without_validation_its_batch_cannot_be_searched(tmp_path):
    with pytest.raises(autoaccum.errors.UsageError, match="there is no validation loader"):
        trainer(tmp_path, EffectiveBatch(12, evaluate=True)).fit(Module(loader=DataLoader(data(40), batch_size=4)))


def test_the_first_windows_are_looked_at_and_a_mean_over_labels_is_told(tmp_path):
    """The loader's first batch, on which it was measured, has texts of one length; later ones have not."""
    from tests.loop.test_first_windows import Reader, over_labels, over_samples, padded, texts

    alike = [torch.full((5,), 1 + index) for index in range(20)]

    class Read(lightning.LightningModule):
        def __init__(self, loss):
            super().__init__()
            self.inner, self.loss, self.logged = Reader(), loss, []

        def training_step(self, batch, batch_idx):
            found = self.loss(self.inner, batch)
            self.log("train_loss", found)
            return found

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    def told(loss, **given):
        loader = DataLoader([*alike, *texts()], batch_size=20, collate_fn=padded)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer(tmp_path, EffectiveBatch(20, max_micro_batch=6, **given)).fit(Read(loss), loader)
        return [str(each.message) for each in caught if "not over samples" in str(each.message)]

    assert len(told(over_labels)) == 1 and "give EffectiveBatch count=" in told(over_labels)[0]
    assert not told(over_samples)
    assert not told(over_labels, count=lambda batch: (batch["labels"] != -100).sum())  # the remedy
