"""One sample twenty times as long as the median: whose answer survives the epoch, and what became of the effective batch?

    python benchmarks/longest_sample.py [--output benchmarks/results/longest_sample.json]

Every system in a process of its own, with the same model, data, optimizer and limit (real memory of a CPU, enforced), asked as its
documentation says, for an effective batch of 60 where it can be asked. Needs the extras huggingface and lightning.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

TARGET, SAMPLES, LONGEST, ROOM_MIB = 60, 600, 600, 250
WIDTH, KIB = 8, 16


def child(name: str) -> None:
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, Dataset

    import autoaccum
    from autoaccum.devices.cpu import Cpu

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")

    class Texts(Dataset):
        """Lengths from 20 to 40, and one of 600 in the last third."""

        def __init__(self) -> None:
            numbers = random.Random(0)
            self.lengths = [numbers.randint(20, 40) for _ in range(SAMPLES)]
            self.lengths[2 * SAMPLES // 3] = LONGEST

        def __len__(self) -> int:
            return SAMPLES

        def __getitem__(self, index):
            return {"inputs": torch.full((self.lengths[index], WIDTH), 0.1 + index / SAMPLES)}

    def padded(samples):
        found = [each["inputs"] for each in samples]
        return {"inputs": nn.utils.rnn.pad_sequence(found, batch_first=True), "targets": torch.tensor([float(len(each)) for each in found])}

    class Net(nn.Module):
        """Keeps 16 KiB for every position of every sample, the padded ones too."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.inner = nn.Linear(WIDTH, KIB * 256)

        def forward(self, inputs, targets):
            kept = self.inner(inputs).exp().mean(-1) * (inputs[..., 0] != 0)
            return {"loss": nn.functional.mse_loss(kept.sum(-1), targets)}

    data, model, device = Texts(), Net(), Cpu()
    device.prepare()
    seen: list[int] = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(len(kwargs["inputs"])), with_kwargs=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-7)
    steps: list[int] = []  # samples that each optimizer step saw
    since = 0

    def stepped(*_: object) -> None:
        nonlocal since
        steps.append(sum(seen[since:]))
        since = len(seen)

    def loss(model, batch):
        return model(**batch)["loss"]

    def ours(batch, **given):
        job = autoaccum.Job(model, optimizer, loss, batch)
        plan = autoaccum.tune(job, target_batch=TARGET, memory_limit=device.held_bytes() + ROOM_MIB * 2**20)
        seen.clear()
        found["micro_batch"] = plan.micro_batch
        loop = autoaccum.Accumulator(job, plan, **given)
        for window in plan.windows(DataLoader(data, batch_sampler=plan.batch_sampler(data, shuffle=False), collate_fn=padded)):
            steps.append(loop.step(window).samples)  # a window that was rescued went through the model more than once

    def with_lightning(mode):
        import lightning as library
        from lightning.pytorch.callbacks import BatchSizeFinder

        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

        class Module(library.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.net, self.batch_size = model, 2

            def training_step(self, batch, batch_idx):
                return loss(self.net, batch)

            def train_dataloader(self):
                return DataLoader(data, batch_size=self.batch_size, collate_fn=padded)

            def configure_optimizers(self):
                return optimizer

            def on_train_start(self):
                seen.clear()
                steps.clear()
                found["micro_batch"] = self.batch_size

            def on_train_batch_end(self, *_):
                stepped()

        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            library.Trainer(accelerator="cpu", max_epochs=1, callbacks=[BatchSizeFinder(mode=mode, max_trials=12)], **quiet).fit(Module())

    def with_trainer(tuned):
        import transformers
        from transformers import Trainer, TrainerCallback, TrainingArguments

        transformers.logging.set_verbosity_error()

        class Steps(TrainerCallback):
            def on_train_begin(self, *_, **__):
                nonlocal since
                found["begun"] = found.get("begun", 0) + 1
                seen.clear()
                steps.clear()
                since = 0

            def on_step_end(self, *_, **__):
                stepped()

        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder, num_train_epochs=1, per_device_train_batch_size=TARGET, auto_find_batch_size=not tuned, use_cpu=True, report_to="none", max_grad_norm=0.0,
                save_strategy="no", logging_strategy="no", disable_tqdm=True, remove_unused_columns=False, train_sampling_strategy="sequential",
            )  # fmt: skip
            trainer = Trainer(model, arguments, train_dataset=data, data_collator=padded, optimizers=(optimizer, None), callbacks=[Steps()])
            if tuned:
                from autoaccum.integrations import huggingface

                plan = huggingface.tune(trainer, target_batch=TARGET, memory_limit=device.held_bytes() + ROOM_MIB * 2**20)
                plan.apply(trainer)
            trainer.train()
            found["micro_batch"] = trainer._train_batch_size

    systems = {
        "autoaccum, worst_case": lambda: ours(autoaccum.worst_case(data, collate=padded), on_oom="raise"),
        "autoaccum, an ordinary batch, rescued": lambda: ours(padded([data[index] for index in range(8)])),
        "autoaccum, an ordinary batch, on_oom=raise": lambda: ours(padded([data[index] for index in range(8)]), on_oom="raise"),
        "autoaccum in HF Trainer": lambda: with_trainer(True),
        "HF Trainer, auto_find_batch_size": lambda: with_trainer(False),
        "Lightning, power": lambda: with_lightning("power"),
        "Lightning, binsearch": lambda: with_lightning("binsearch"),
    }
    if name == "list":
        print(json.dumps(list(systems)))
        return
    if "HF" in name:
        import transformers  # noqa: F401 - what a library itself takes is no part of the limit
        from transformers import Trainer  # noqa: F401
    if "Lightning" in name:
        pass
    found: dict[str, object] = {"system": name, "survived": True, "error": None}
    started = time.perf_counter()
    with device.capped(device.held_bytes() + ROOM_MIB * 2**20):
        try:
            systems[name]()
        except Exception as error:
            found.update(survived=False, error=f"{type(error).__name__}: {str(error).splitlines()[0][:160]}")
    found.update(
        seconds=round(time.perf_counter() - started, 1), optimizer_steps=len(steps), samples_of_steps=sorted(set(steps[:-1] or steps)), samples=sum(steps)
    )
    print("told:" + json.dumps(found), flush=True)


def table(document: dict) -> str:
    """For the README."""
    lines = ["| | micro-batch | samples an optimizer step saw | the epoch |", "| --- | --- | --- | --- |"]
    for row in document["rows"]:
        steps = [size for size in row.get("samples_of_steps", []) if size]
        again = f", begun {row['begun']} times" if row.get("begun", 1) > 1 else ""
        ends = "whole" + again if row["survived"] else f"out of memory after {row['samples']} samples"
        lines.append(f"| {row['system']} | {row.get('micro_batch', '')} | {', '.join(map(str, steps))} | {ends} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child")
    given = parser.parse_args()
    if given.child:
        child(given.child)
        return
    here = [sys.executable, __file__, "--child"]
    names = json.loads(subprocess.run([*here, "list"], capture_output=True, text=True, check=True).stdout)
    rows = []
    for name in names:
        done = subprocess.run([*here, name], capture_output=True, text=True, timeout=600, check=False)
        told = [line for line in done.stdout.splitlines() if line.startswith("told:")]
        died = {"system": name, "survived": False, "error": f"the process ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}"}
        row = json.loads(told[0].removeprefix("told:")) if told else died
        row["whole_epoch_at_the_target"] = bool(row["survived"] and row["samples_of_steps"] == [TARGET] and row["samples"] == SAMPLES)
        rows.append(row)
        print(f"{name:45} {'survived' if row['survived'] else 'failed':9} micro-batch {row.get('micro_batch', '-')!s:5} "
              f"samples a step {row.get('samples_of_steps')} of {row.get('samples')}  {row.get('seconds', '')} s  {row['error'] or ''}")  # fmt: skip
    versions = {name: importlib.metadata.version(name) for name in ("torch", "lightning", "transformers", "accelerate")}
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version(), **versions}
    job = {"target": TARGET, "samples": SAMPLES, "longest": LONGEST, "room_mib": ROOM_MIB}
    if given.output:
        given.output.write_text(json.dumps({"machine": machine, "job": job, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
