"""What every rank of a framework's data-parallel job runs: started by tests.ranked, as torchrun would."""

import os
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Sampler, TensorDataset

from autoaccum.devices.cpu import Cpu


def linear():
    torch.manual_seed(0)
    return nn.Linear(8, 1).double()


def data(samples):
    drawn = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(samples, 8, dtype=torch.float64, generator=drawn), torch.randn(samples, 1, dtype=torch.float64, generator=drawn))


class InOrder(Sampler):
    """An order that somebody made: what it gives is regrouped as it comes."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return self.samples

    def __iter__(self):
        return iter(range(self.samples))


def mse(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def flat(model):
    return torch.cat([each.grad.flatten().clone() for each in model.parameters()])


def apart(gradients, pairs, target):
    """Of every window from the whole batch's gradient, relatively."""
    whole, found = linear(), []
    for start, ours in zip(range(0, len(pairs), target), gradients):
        whole.zero_grad()
        mse(whole, pairs[start : start + target]).backward()
        found.append(((ours - flat(whole)).norm() / flat(whole).norm()).item())
    return found


def accelerate(target, most, folder, left):
    from accelerate import Accelerator

    from autoaccum.integrations import accelerate as ours

    accelerator, model = Accelerator(cpu=True), linear()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    pairs = data(2 * target + left)
    plan = ours.tune(accelerator, model, optimizer, mse, pairs[:8], target_batch=target, max_micro_batch=most)
    loader = DataLoader(pairs, batch_sampler=plan.batch_sampler(pairs, shuffle=False))
    gradients, samples, since = [], [], 0
    for micro in ours.micro_batches(accelerator, plan, loader):
        with accelerator.accumulate(model):
            since += micro.samples
            accelerator.backward(mse(model, micro.batch) * micro.weight)
            if accelerator.sync_gradients:
                gradients.append(flat(model))
                samples, since = [*samples, since], 0
            optimizer.step()
            optimizer.zero_grad()
    return {"apart": apart(gradients, pairs, target), "samples": samples, "sizes": plan.micro_batches}


def accelerate_resumed(target, most, folder, steps):
    """Three epochs of windows of 2 targets and 7 samples. It saves after `steps` windows, or, if a checkpoint is there, goes on from it."""
    from accelerate import Accelerator

    from autoaccum.integrations import accelerate as ours

    accelerator, model, pairs = Accelerator(cpu=True), linear(), data(2 * target + 7)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    plan = ours.tune(accelerator, model, optimizer, mse, pairs[:8], target_batch=target, max_micro_batch=most)
    loader = DataLoader(pairs, batch_sampler=plan.batch_sampler(pairs, seed=3))
    position, checkpoint = ours.Position(), Path(folder) / "checkpoint"
    accelerator.register_for_checkpointing(position)
    if checkpoint.exists():
        accelerator.load_state(checkpoint)
    samples, since, saves = [], 0, not checkpoint.exists()
    for _ in range(position.epoch, 3):
        for micro in ours.micro_batches(accelerator, plan, loader, position=position):
            with accelerator.accumulate(model):
                since += micro.samples
                accelerator.backward(mse(model, micro.batch) * micro.weight)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                samples, since = [*samples, since], 0
                if saves and len(samples) == steps:
                    accelerator.save_state(checkpoint)
    return {"parameters": [value for each in model.parameters() for value in each.flatten().tolist()], "samples": samples}


def lightning_resumed(target, most, folder, steps):
    """The same with Lightning, whose seed of the order is another one in each run."""
    import logging

    import lightning as library

    from autoaccum.integrations.lightning import EffectiveBatch

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    world, samples, seen = int(os.environ.get("WORLD_SIZE", "1")), [], []

    class Module(library.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = linear()

        def training_step(self, batch, batch_idx):
            if torch.is_grad_enabled():  # not when the first windows are looked at
                seen.append(len(batch[0]))
            return mse(self.net, batch)

        def on_train_start(self):
            seen.clear()

        def on_before_optimizer_step(self, optimizer):
            samples.append(sum(seen))
            seen.clear()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.1)

    checkpoint = Path(folder) / f"step={steps}.ckpt"
    resumed = checkpoint if checkpoint.exists() else None
    writes = library.pytorch.callbacks.ModelCheckpoint(folder if resumed is None else None, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = library.Trainer(
        accelerator="cpu", strategy="ddp" if world > 1 else "auto", devices=world, max_epochs=3, default_root_dir=folder, logger=False,
        callbacks=[EffectiveBatch(target, max_micro_batch=most), *([writes] if resumed is None else [])], enable_checkpointing=resumed is None,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    torch.manual_seed(11 if resumed is None else 12)
    model = Module()
    trainer.fit(model, DataLoader(data(2 * target + 7), batch_size=5, shuffle=True), ckpt_path=resumed)
    return {"parameters": [value for each in model.parameters() for value in each.flatten().tolist()], "samples": samples}


def lightning(target, most, folder, left):
    import logging

    import lightning as library

    from autoaccum.integrations.lightning import EffectiveBatch

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    gradients, samples, seen = [], [], []

    class Module(library.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = linear()

        def training_step(self, batch, batch_idx):
            seen.append(len(batch[0]))
            return mse(self.net, batch)

        def on_train_start(self):
            seen.clear()

        def on_before_optimizer_step(self, optimizer):
            gradients.append(flat(self.net))
            samples.append(sum(seen))
            seen.clear()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    callback = EffectiveBatch(target, max_micro_batch=most)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = library.Trainer(accelerator="cpu", strategy="ddp", devices=2, max_epochs=1, default_root_dir=folder, callbacks=[callback], **quiet)
    pairs = data(2 * target + left)
    trainer.fit(Module(), DataLoader(pairs, batch_size=5, sampler=InOrder(len(pairs)) if left % 2 == 0 else None))
    return {"apart": apart(gradients, pairs, target), "samples": samples, "sizes": callback.plan.micro_batches, "steps": trainer.global_step}


def huggingface(target, most, folder, left):
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from autoaccum.integrations import huggingface as ours
    from tests.integrations.test_huggingface import Line, Pairs

    model, pairs, read = Line(), Pairs(2 * target), []

    def collated(samples):
        read.append([tuple(each["inputs"].tolist()) for each in samples])
        return torch.utils.data.default_collate(samples)

    gradients = []

    class Steps(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **_):
            gradients.append(flat(model))

    arguments = TrainingArguments(
        folder, use_cpu=True, num_train_epochs=1, learning_rate=0.0, max_grad_norm=0.0, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
        remove_unused_columns=False,
    )  # fmt: skip

    class OwnMean(Trainer):
        """Its loss is its own mean, whatever the Trainer counts."""

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs)["loss"]

    made = OwnMean if left else Trainer
    trainer = made(model, arguments, train_dataset=pairs, data_collator=collated, callbacks=[Steps()])
    trainer.model_accepts_loss_kwargs = bool(left)  # as for a model whose forward takes **kwargs
    plan = ours.tune(trainer, target_batch=target, max_micro_batch=most, batch=pairs[:8])
    plan.apply(trainer)
    read.clear()
    Cpu().prepare()
    trainer.train()
    place = {tuple(inputs.tolist()): index for index, inputs in enumerate(pairs.inputs)}
    steps = [
        [place[each] for samples in read[start : start + len(plan.micro_batches)] for each in samples] for start in range(0, len(read), len(plan.micro_batches))
    ]
    return {
        "read": steps,
        "gradients": [each.tolist() for each in gradients],
        "sizes": plan.micro_batches,
    }


PROGRAMS = {each.__name__: each for each in (accelerate, accelerate_resumed, lightning, lightning_resumed, huggingface)}
