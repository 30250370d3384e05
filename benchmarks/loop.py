"""What the accumulating loop costs beside a hand-written one and other libraries' loops, and how right each gradient is.

    python benchmarks/loop.py [--output benchmarks/results/loop.json]

All systems run in turns in one process, each just after the loop by hand; medians of many. The plainest hand-written
loop is what the others are compared with: split, forward, backward on loss / steps, one step, one zero_grad.
Ours runs with rescue on. All run under the C allocator's defaults; what the steady allocator, which our loop turns on for
models on a CPU, costs any loop in the process is measured apart. Composer needs an environment of its own, which side_by_side.py builds:
of it the gradients alone are told. Libraries that are not installed are listed as such: pip install accelerate lightning transformers.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
if __name__ == "__main__":  # not for who only wants the table
    os.environ.setdefault("AUTOACCUM_MALLOC", "default")

import torch
from gradients import Case, Recorder, errors, mse, network, token_mean
from torch import nn

import autoaccum
from autoaccum.devices import malloc
from autoaccum.plan.arithmetic import micro_batches
from autoaccum.plan.plan import Plan
from autoaccum.plan.record import PlannedDevice
from autoaccum.window.start import WindowStart

STEPS = 8
MICRO_BATCH = 32
LIBRARIES = ("accelerate", "lightning", "transformers")
COMPOSER = Path(__file__).resolve().parent.parent / ".venv" / "peers" / "composer" / "bin" / "python"


def plan(target: int, micro_batch: int) -> Plan:
    """A plan as it would come out, without measuring: this is about the loop alone."""
    sizes = micro_batches(target, -(-target // micro_batch))
    here = PlannedDevice("cpu", "cpu", None, 0, 0)
    return Plan(target, sizes[0], len(sizes), sizes, target, (target,), 0, 1, sizes[0], None, here, {}, 0, 0, None, 0, None, (), 0.0, {}, "")


# -- the loops: each takes a model, an optimizer, a loss and the window's micro-batches, and makes one step --


def hand_written(model, optimizer, steps):
    def window(pieces, loss):
        for piece in pieces:
            (loss(model, piece) / len(pieces)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return window


def ours(model, optimizer, steps):
    loops = {}

    def window(pieces, loss):
        samples = sum(len(piece[0]) for piece in pieces)
        if samples not in loops:
            loops[samples] = autoaccum.Accumulator(model, optimizer, plan(samples, max(len(piece[0]) for piece in pieces)))
        loops[samples].step_micro(pieces, loss)

    return window


def with_accelerate(model, optimizer, steps):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=steps)
    model, optimizer = accelerator.prepare(model, optimizer)

    def window(pieces, loss):
        for piece in pieces:
            with accelerator.accumulate(model):
                accelerator.backward(loss(model, piece))
                optimizer.step()
                optimizer.zero_grad()

    def epoch(windows, loss):  # through its own loader, which tells of the epoch's end: that flushes a short last window
        window(accelerator.prepare(torch.utils.data.DataLoader([piece for pieces in windows for piece in pieces], batch_size=None)), loss)

    window.epoch = epoch
    return window


def with_fabric(model, optimizer, steps):
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1, precision="64-true" if next(model.parameters()).dtype == torch.float64 else "32-true")
    model, optimizer = fabric.setup(model, optimizer)

    def window(pieces, loss):
        for index, piece in enumerate(pieces):
            with fabric.no_backward_sync(model, enabled=index < len(pieces) - 1):
                fabric.backward(loss(model, piece) / steps)
        optimizer.step()
        optimizer.zero_grad()

    return window


class Lossy(nn.Module):
    """The Trainer wants the loss from the model."""

    def __init__(self, model, loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, inputs, targets):
        return {"loss": self.loss(self.model, (inputs, targets))}


class LossyWithCount(Lossy):
    """As models of Transformers do: divides by the labels of the whole window, which the Trainer counts."""

    def forward(self, inputs, targets, labels=None, num_items_in_batch=None, **_):
        loss = self.loss(self.model, (inputs, targets))
        return {"loss": loss if num_items_in_batch is None else loss * (targets != -100).sum() / num_items_in_batch}


def with_trainer(model, optimizer, windows, loss, steps, told=None, *, takes_count=False):
    """HF's Trainer over the samples of the windows in order. told: seconds from `on_step_begin` to `on_step_end`, batches fetched before."""
    import transformers

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *args, **given):
            torch.set_num_threads(1)  # whatever it set

        def on_step_begin(self, *args, **given):
            self.started = time.perf_counter()

        def on_step_end(self, *args, **given):
            if told is not None:
                told.append(time.perf_counter() - self.started)

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(named)

    inputs, targets = (torch.cat([piece[field] for pieces in windows for piece in pieces]) for field in (0, 1))
    named = [{"inputs": one, "targets": other, **({"labels": other} if takes_count else {})} for one, other in zip(inputs, targets)]
    module = (LossyWithCount if takes_count else Lossy)(model, loss)
    settings = transformers.TrainingArguments(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=len(windows[0][0][0]), gradient_accumulation_steps=steps, max_steps=len(windows), use_cpu=True,
        max_grad_norm=0.0, report_to=[], disable_tqdm=True, logging_strategy="no", save_strategy="no", lr_scheduler_type="constant", remove_unused_columns=False,
    )  # fmt: skip
    optimizers = (optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0))
    InOrder(module, settings, train_dataset=named, optimizers=optimizers, callbacks=[Clock()]).train()


def with_lightning_trainer(model, optimizer, windows, loss, steps, told=None):
    """An epoch of the windows' micro-batches, `accumulate_grad_batches` of them a step. told: seconds of each window, batches fetched before."""
    import lightning

    class Clock(lightning.Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            if told is not None and index % steps == 0:
                told.append(0.0)
            self.started = time.perf_counter()

        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            if told is not None:
                told[-1] += time.perf_counter() - self.started

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = model

        def training_step(self, batch, index):
            return loss(self.net, batch)

        def configure_optimizers(self):
            return optimizer

    loader = torch.utils.data.DataLoader([piece for pieces in windows for piece in pieces], batch_size=None)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    precision = "64-true" if next(model.parameters()).dtype == torch.float64 else "32-true"
    trainer = lightning.Trainer(accelerator="cpu", devices=1, max_epochs=1, accumulate_grad_batches=steps, precision=precision, callbacks=[Clock()], **quiet)
    trainer.fit(Module(), loader)


LOOPS = {"by hand": hand_written, "autoaccum": ours, "accelerate": with_accelerate, "fabric": with_fabric}
TRAINERS = {"lightning": with_lightning_trainer, "transformers": with_trainer}  # who drive windows themselves


# -- speed --


def overhead(width: int, rounds: int, systems: list[str], placements: int = 7) -> dict[str, dict[str, float]]:
    """Microseconds per micro-step of each system in windows of 8, and what it takes above the loop by hand.

    Every turn of a system follows one of the loop by hand, and only those two are compared: a machine that others use, too, changes
    its pace within seconds. Medians over the turns of several placements: where a model happens to lie in memory moves its
    time by some per cent, more than what is measured here, so all models are made anew a few times.
    """
    turns = [_placed(width, max(rounds // placements, 1), systems) for _ in range(placements)]
    hand = statistics.median(beside for each in turns for pairs in each.values() for beside, _ in pairs) / STEPS * 1e6
    found = {"by hand": {"microseconds": round(hand, 2), "over_by_hand": 0.0, "share_over_by_hand": 0.0}}
    for name in systems[1:]:
        shares = [statistics.median(seconds / beside - 1 for beside, seconds in each[name]) for each in turns]
        share = statistics.median(seconds / beside - 1 for each in turns for beside, seconds in each[name])
        found[name] = {
            "microseconds": round(hand * (1 + share), 2),
            "over_by_hand": round(hand * share, 2),
            "share_over_by_hand": round(share, 4),
            "share_over_by_hand_of_placements": [round(each, 4) for each in shares],
        }
    return found


def _placed(width: int, rounds: int, systems: list[str]) -> dict[str, list[tuple[float, float]]]:
    """Of each system's turns, the median seconds of a window by hand just before, and of its own."""
    inputs, targets = torch.randn(STEPS * MICRO_BATCH, 8), torch.randn(STEPS * MICRO_BATCH, 1)
    windows = {}
    for name in systems:
        model = network(width)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        if name == "autoaccum":
            loop = autoaccum.Accumulator(model, optimizer, plan(STEPS * MICRO_BATCH, MICRO_BATCH))

            def window(loop=loop):
                loop.step((inputs, targets), mse)
        elif name in TRAINERS:
            continue
        else:
            run = LOOPS[name](model, optimizer, STEPS)

            def window(run=run):
                run(list(zip(inputs.split(MICRO_BATCH), targets.split(MICRO_BATCH))), mse)

        windows[name] = window
    torch.set_num_threads(1)  # whatever a library set
    turns = {name: [] for name in systems[1:]}
    for _ in range(rounds):
        for name in windows.keys() & turns.keys():
            beside = _median_of(windows["by hand"])
            turns[name].append((beside, _median_of(windows[name])))
    for name in TRAINERS.keys() & turns.keys():
        for _ in range(3):
            beside, told, model = _median_of(windows["by hand"], 20), [], network(width)
            TRAINERS[name](
                model, torch.optim.SGD(model.parameters(), lr=1e-3), [list(zip(inputs.split(MICRO_BATCH), targets.split(MICRO_BATCH)))] * 14, mse, STEPS, told
            )
            torch.set_num_threads(1)
            turns[name].append((beside, statistics.median(told[2:])))
    return turns


def _median_of(window, times: int = 12) -> float:
    """Seconds of a window; the first two after another system ran are its caches' business."""
    took = []
    for _ in range(times):
        started = time.perf_counter()
        window()
        took.append(time.perf_counter() - started)
    return statistics.median(took[2:])


def width_of_a_millisecond(systems: list[str]) -> int:
    """The network whose micro-step takes about one millisecond by hand, on this machine and beside the others."""
    beside = [name for name in systems if name not in TRAINERS][:3]
    return min(range(352, 736, 32), key=lambda width: abs(overhead(width, 8, beside, placements=2)["by hand"]["microseconds"] - 1000))


def snapshot_of_resnet50(windows: int = 2000) -> dict[str, float]:
    """What noting a window's start takes with ResNet-50's 53 BatchNorm layers, 159 buffers, between windows of other work."""
    widths = [64]
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        widths += [width, width, 4 * width] * blocks + [4 * width]  # the last one downsamples
    model = nn.Sequential(*(nn.BatchNorm2d(width) for width in widths))
    job = autoaccum.Job(model, torch.optim.SGD(model.parameters(), lr=0.1), mse, ())
    start, other = WindowStart([job]), network(64)
    took = []
    for _ in range(windows):
        mse(other, (torch.randn(32, 8), torch.randn(32, 1))).backward()
        began = time.perf_counter()
        start.note()
        took.append(time.perf_counter() - began)
    assert (len(widths), sum(widths)) == (53, 26_560)
    return {"layers": len(widths), "buffers": len(list(model.buffers())), "microseconds": round(statistics.median(took) * 1e6, 1)}


def price_of_the_steady_allocator(width: int) -> dict[str, float]:
    """The loop by hand under either setting, microseconds per micro-step; each in a fresh process, whose heap has no holes yet.

    glibc maps large blocks only where no hole of the heap takes them, so the setting has less to do in an old one.
    """
    found = {}
    for setting in ("default", "steady"):
        command = [sys.executable, __file__, "--by-hand", str(width)]
        finished = subprocess.run(command, env={**os.environ, "AUTOACCUM_MALLOC": setting}, capture_output=True, text=True, check=True)
        found[setting] = float(finished.stdout)
    return found


# -- gradients --


def gradient_errors(systems: list[str]) -> dict[str, dict[str, float]]:
    """Relative error of the last window's gradient against the whole batch's, in double precision."""

    def by(name: str, case: Case, model: nn.Module, optimizer: Recorder) -> None:
        if name in TRAINERS:
            TRAINERS[name](model, optimizer, case.windows, case.loss, case.steps)
            return
        run = LOOPS[name](model, optimizer, case.steps)
        if hasattr(run, "epoch"):
            run.epoch(case.windows, case.loss)
            return
        for pieces in case.windows:
            run(pieces, (case.summed or case.loss) if name == "autoaccum" else case.loss)

    found = {name: errors(partial(by, name)) for name in systems}
    if "transformers" in systems:

        def counted(case: Case, model: nn.Module, optimizer: Recorder) -> None:
            with_trainer(model, optimizer, case.windows, case.loss, case.steps, takes_count=True)

        found["transformers, num_items_in_batch"] = errors(counted, only=lambda case: case.loss is token_mean)
    return found


def composers_gradient_errors() -> tuple[str, dict[str, float]]:
    """Its version and errors, in its own environment."""
    command = [str(COMPOSER), str(Path(__file__).parent / "contestant.py"), "composer", "Composer", "gradients"]
    done = subprocess.run(command, input="{}", capture_output=True, text=True, check=True)
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("told:")).removeprefix("told:"))
    return found.pop("version"), found


def transformers_with_token_mean() -> float | None:
    """A real causal language model of Transformers, unlike lengths, `autoaccum.token_mean`: relative error in double precision."""
    if importlib.util.find_spec("transformers") is None:
        return None
    import transformers

    config = transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).double()
    ids = torch.randint(0, 40, (22, 12))
    labels = ids.clone()
    for row, length in enumerate(torch.randint(2, 12, (22,)).tolist()):
        labels[row, length:] = -100
    batch = {"input_ids": ids, "labels": labels}
    right = torch.autograd.grad(model(**batch).loss, list(model.parameters()), allow_unused=True)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    autoaccum.Accumulator(model, optimizer, plan(22, 4)).step(batch, autoaccum.token_mean)
    pairs = [(grad, first - parameter.detach()) for grad, first, parameter in zip(right, before, model.parameters()) if grad is not None]
    return float(sum((ours - grad).norm() ** 2 for grad, ours in pairs).sqrt() / sum(grad.norm() ** 2 for grad, _ in pairs).sqrt())


NAMES = {
    "by hand": "by hand", "autoaccum": "autoaccum", "accelerate": "Accelerate", "composer": "Composer", "fabric": "Lightning Fabric", "lightning": "Lightning Trainer",
    "transformers": "HF Trainer", "transformers, num_items_in_batch": "HF Trainer, model takes `num_items_in_batch`",
}  # fmt: skip


def with_composer_of(earlier, document):
    """Composer's gradients of an earlier run, where its environment is missing now: the same cases in double precision on any machine."""
    if "composer" not in earlier["gradient_errors"]:
        return document
    versions = {**document["versions"], "composer": earlier["versions"]["composer"]}
    errors = {**document["gradient_errors"], "composer": earlier["gradient_errors"]["composer"]}
    return {**document, "versions": versions, "gradient_errors": errors, "composer_of_an_earlier_run": True}


def table(document) -> str:
    """The README's table, and the figures that belong to it."""
    errors = document["gradient_errors"]
    columns = list(errors["by hand"])
    lines = [f"| | {' | '.join(columns)} | above by hand, empty micro-step | of {document['one_millisecond']['by hand']['microseconds'] / 1000:.1f} ms |"]
    lines.append("| --- |" + " --- |" * (len(columns) + 2))
    for name, shown in NAMES.items():
        if name not in errors:
            continue
        told = [_error(errors[name][column]) if column in errors[name] else "" for column in columns]
        speed = ["", ""]
        if name in document["empty"]:
            speed = [f"{document['empty'][name]['over_by_hand']:.0f} us", f"{document['one_millisecond'][name]['share_over_by_hand']:.1%}"]
        lines.append(f"| {shown} | {' | '.join(told + speed)} |")
    versions, allocator = document["versions"], document["allocator_at_one_millisecond"]
    of = {"accelerate": "Accelerate", "composer": "Composer", "lightning": "Lightning", "transformers": "Transformers"}
    lines += [
        "",
        f"Noting a window's start for a rescue takes {document['snapshot_of_resnet50']['microseconds']:.0f} microseconds with ResNet-50's 159 buffers. "
        f"Under the allocator that is made steady for a model on a CPU, a micro-step of {allocator['default'] / 1000:.1f} ms by hand takes {allocator['steady'] / 1000:.1f} ms. "
        f"{document['machine']['cores']} cores of a CPU ({document['machine']['processor']}), one thread; torch {versions['torch'].split('+')[0]}, "
        + ", ".join(f"{shown} {versions[name]}" for name, shown in of.items() if name in versions) + ".",
    ]  # fmt: skip
    return "\n".join(lines)


def _error(relative: float) -> str:
    return f"{relative:.2f}" if relative > 1e-3 else "0" if relative == 0 else f"{relative:.0e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rounds", type=int, default=84)
    parser.add_argument("--by-hand", type=int, metavar="WIDTH", help="only the loop by hand, under the allocator that AUTOACCUM_MALLOC says")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.by_hand:
        malloc.steady_malloc()
        print(overhead(asked.by_hand, 21, ["by hand", "autoaccum"])["by hand"]["microseconds"])
        return
    warnings.simplefilter("ignore")
    for name in ("lightning", "lightning.fabric", "lightning.pytorch", "accelerate", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    systems = ["by hand", "autoaccum", *(name for name in LIBRARIES if name not in missing), *(["fabric"] if "lightning" not in missing else [])]
    width = width_of_a_millisecond(systems)
    document = {
        "versions": {name: importlib.metadata.version(name) for name in ("autoaccum", "torch", "numpy", *LIBRARIES) if name not in missing},
        "machine": {"python": platform.python_version(), "cores": os.cpu_count(), "threads": 1, "processor": autoaccum.devices.get("cpu").facts.name},
        "not_installed": missing + ([] if COMPOSER.exists() else ["composer"]),
        "windows": {"steps": STEPS, "micro_batch": MICRO_BATCH, "rounds": asked.rounds, "width_of_the_millisecond": width},
        "empty": overhead(1, asked.rounds, systems),
        "one_millisecond": overhead(width, asked.rounds, systems),
        "snapshot_of_resnet50": snapshot_of_resnet50(),
        "gradient_errors": gradient_errors(systems),
        "gpt2_with_token_mean": transformers_with_token_mean(),
        "allocator_at_one_millisecond": price_of_the_steady_allocator(width),
    }
    if COMPOSER.exists():
        document["versions"]["composer"], document["gradient_errors"]["composer"] = composers_gradient_errors()
    elif asked.output and asked.output.exists():
        document = with_composer_of(json.loads(asked.output.read_text()), document)
    text = json.dumps(document, indent=2)
    print(text)
    print(table(document))
    if asked.output:
        asked.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
