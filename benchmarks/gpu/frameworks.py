"""On a CUDA card: GPT-2 in Transformers' Trainer, bf16: samples per second at an effective batch of 512, as everyone finds it. Raw JSON out.

    python benchmarks/gpu/frameworks.py --output benchmarks/results/gpu_frameworks.json

One run of each way, each in a process of its own: autoaccum with the fewest steps and with `objective="throughput"`, the Trainer's
`auto_find_batch_size` (whose accumulation is then set by hand, rounded up), Lightning's BatchSizeFinder on the same model, and the best of
micro-batches picked by hand (powers of two that divide the target). Records the card, the driver and the versions; a library that is not
installed is listed with the reason. Needs no network; takes about six minutes. `--tiny --device cpu` tries it out without a card.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also where the package is not installed

TARGET, LENGTH, WINDOWS = 512, 512, 4


def built(tiny: bool, device: str) -> tuple[Any, Any]:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    small = {"vocab_size": 64, "n_positions": 32, "n_embd": 32, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**small) if tiny else GPT2Config()).to(device)
    length, vocabulary = (32, 64) if tiny else (LENGTH, 50257)
    ids = torch.randint(0, vocabulary, (target(tiny) * WINDOWS, length))
    return model, [{"input_ids": each, "labels": each} for each in ids]


def target(tiny: bool) -> int:
    return 16 if tiny else TARGET


def trained(model: Any, data: Any, folder: str, tiny: bool, device: str, tune: dict[str, Any] | None = None, **arguments: Any) -> dict[str, Any]:
    """Samples per second of the windows after the first, and what each optimizer step saw."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    ends: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            ends.clear()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if device == "cuda":
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    given = {"per_device_train_batch_size": target(tiny), "bf16": not tiny, "use_cpu": device == "cpu", "num_train_epochs": 1, "report_to": "none"}
    quiet = {"save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "dataloader_drop_last": True}
    trainer = Trainer(model, TrainingArguments(folder, **{**given, **quiet, **arguments}), train_dataset=data, callbacks=[Clock()])
    found: dict[str, Any] = {}
    if tune is not None:
        from autoaccum.integrations import huggingface

        started = time.perf_counter()
        plan = huggingface.tune(trainer, target_batch=target(tiny), **tune)
        found = {"micro_batches": plan.micro_batches, "tuning_seconds": time.perf_counter() - started, "trials": [vars(each) for each in plan.trials]}
        plan.apply(trainer)
    started = time.perf_counter()
    trainer.train()
    whole = trainer._train_batch_size * trainer.args.gradient_accumulation_steps if tune is None else target(tiny)
    rate = whole * (len(ends) - 1) / (ends[-1] - ends[0]) if len(ends) > 1 else None
    if device == "cuda":
        found["peak_reserved_bytes"] = torch.cuda.max_memory_reserved()
    return {
        **found, "micro_batch": trainer._train_batch_size, "accumulation_steps": trainer.args.gradient_accumulation_steps, "effective_batch": whole,
        "samples_per_second": rate, "training_seconds": time.perf_counter() - started, "windows": len(ends),
    }  # fmt: skip


def by_lightning(model: Any, data: Any, folder: str, tiny: bool, device: str) -> dict[str, Any]:
    """The size that it finds; trained in the Trainer, as all others are."""
    import lightning
    import torch
    from lightning.pytorch.callbacks import BatchSizeFinder

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net, self.batch_size = model, 2

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(**batch).loss

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(data, batch_size=self.batch_size)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=5e-5)

    class Stop(lightning.pytorch.Callback):  # type: ignore[misc]
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            trainer.should_stop = True

    module = Module()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    precision = "32-true" if tiny else "bf16-mixed"
    started = time.perf_counter()
    finder = BatchSizeFinder(mode="binsearch", max_trials=12)
    trainer = lightning.Trainer(
        accelerator="cpu" if device == "cpu" else "gpu",
        devices=1,
        max_steps=1,
        precision=precision,
        callbacks=[finder, Stop()],
        default_root_dir=folder,
        **quiet,
    )
    trainer.fit(module)
    took, size = time.perf_counter() - started, min(module.batch_size, target(tiny))
    ran = trained(model, data, folder, tiny, device, per_device_train_batch_size=size, gradient_accumulation_steps=-(-target(tiny) // size))
    return {"found": module.batch_size, "tuning_seconds": took, **ran}


def way(name: str, tiny: bool, device: str) -> dict[str, Any]:
    model, data = built(tiny, device)
    with tempfile.TemporaryDirectory() as folder:
        if name == "autoaccum":
            return trained(model, data, folder, tiny, device, {})
        if name == "autoaccum, throughput":
            return trained(model, data, folder, tiny, device, {"objective": "throughput"})
        if name == "Lightning, binsearch":
            return by_lightning(model, data, folder, tiny, device)
        if name == "HF, auto_find_batch_size":
            found = trained(model, data, folder, tiny, device, auto_find_batch_size=True)
            size = found["micro_batch"]
            again = trained(model, data, folder, tiny, device, per_device_train_batch_size=size, gradient_accumulation_steps=-(-target(tiny) // size))
            return {"found": size, "tuning_seconds": found["training_seconds"], **again}
        size = int(name.split()[-1])
        return trained(model, data, folder, tiny, device, per_device_train_batch_size=size, gradient_accumulation_steps=target(tiny) // size)


@click.command()
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--tiny", is_flag=True, help="A model that trains anywhere, to try this file out.")
@click.option("--child", hidden=True)
def main(output: Path, device: str, tiny: bool, child: str | None) -> None:
    if child is not None:
        output.write_text(json.dumps(way(child, tiny, device)))
        return
    import torch

    names = ["autoaccum", "autoaccum, throughput", "HF, auto_find_batch_size", "Lightning, binsearch"]
    names += [f"by hand, {size}" for size in ((4, 8) if tiny else (16, 32, 64, 128, 256))]
    rows = []
    for name in names:
        with tempfile.NamedTemporaryFile("r", suffix=".json") as answer:
            command = [sys.executable, __file__, "--output", answer.name, "--device", device, "--child", name, *(["--tiny"] if tiny else [])]
            started = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
            text = Path(answer.name).read_text()
        row = json.loads(text) if done.returncode == 0 and text else {"failed": done.stderr.strip().splitlines()[-1:]}
        rows.append({"way": name, "seconds": time.perf_counter() - started, **row})
        print(name, {key: row.get(key) for key in ("micro_batch", "effective_batch", "samples_per_second", "failed")}, flush=True)
        versions = {}
        for package in ("torch", "transformers", "accelerate", "lightning"):
            try:
                versions[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                versions[package] = None
        machine: dict[str, Any] = {"python": platform.python_version(), **versions}
        if device == "cuda":
            card = torch.cuda.get_device_properties(0)
            asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            driver = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
            machine |= {"card": card.name, "total_bytes": card.total_memory, "driver": driver}
        # After each, so that a time limit loses nothing.
        output.write_text(json.dumps({"machine": machine, "target": target(tiny), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
