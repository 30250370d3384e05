"""How right the gradient is, for each form of loss in each framework, with autoaccum and without.

    python benchmarks/loss_forms.py [--output benchmarks/results/loss_forms.json]

Twenty texts of unlike lengths are one window, in micro-batches of at most 5, padded to their own longest; the right gradient is that of the
twenty at once, in double precision. The worst of five draws counts. Whoever uses autoaccum writes what its documentation says for
the form; whoever does not, what the library's documentation says. Two rules are run by hand: optax's MultiSteps averages the gradients of
micro-batches, torchtitan divides sums by the window's label tokens. Needs accelerate, lightning and transformers.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, SequentialSampler

import autoaccum

SAMPLES, MOST, DRAWS, IGNORED = 20, 5, 5, -100
CLASS_WEIGHTS = torch.tensor([0.1, 1.0, 2.0, 5.0], dtype=torch.float64)


class Tagger(nn.Module):
    """Four scores for every token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(30, 6), nn.Linear(6, 4)
        self.double()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.embedding(ids)))


class Texts(torch.utils.data.Dataset):
    """unlabelled: how many of the first texts have no label at all."""

    def __init__(self, draw: int, unlabelled: int = 0) -> None:
        generator = torch.Generator().manual_seed(draw)
        self.samples = []
        for index, length in enumerate(torch.randint(2, 30, (SAMPLES,), generator=generator).tolist()):
            ids = torch.randint(1, 30, (length,), generator=generator)
            hidden = torch.rand(length, generator=generator) < 0.3
            hidden[0] = False  # every labelled text has a label
            labels = torch.where(hidden | torch.tensor(index < unlabelled), IGNORED, ids % 4)
            self.samples.append({"ids": ids, "labels": labels, "score": torch.randn((), dtype=torch.float64, generator=generator)})

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.samples[index]


def padded(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    def pad(name: str, value: int) -> torch.Tensor:
        return nn.utils.rnn.pad_sequence([sample[name] for sample in samples], batch_first=True, padding_value=value)

    return {"ids": pad("ids", 0), "labels": pad("labels", IGNORED), "score": torch.stack([sample["score"] for sample in samples])}


# -- the forms of loss: as a user has it (one number), what autoaccum's loop is given, and what it is a mean over --


def score_mean(model, batch):
    real = (batch["ids"] != 0).unsqueeze(2)
    pooled = (model(batch["ids"]) * real).sum((1, 2)) / real.sum((1, 2))
    return (pooled - batch["score"]).square().mean()


def samples(batch):
    return len(batch["score"])


def token_mean(model, batch):
    return cross_entropy(model(batch["ids"]).flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED)


def token_pair(model, batch):
    return cross_entropy(model(batch["ids"]).flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED, reduction="sum"), tokens(batch)


def tokens(batch):
    return (batch["labels"] != IGNORED).sum()


def weighted_mean(model, batch):
    return cross_entropy(model(batch["ids"]).flatten(0, 1), batch["labels"].flatten(), CLASS_WEIGHTS, ignore_index=IGNORED)


def weighted_pair(model, batch):
    total = cross_entropy(model(batch["ids"]).flatten(0, 1), batch["labels"].flatten(), CLASS_WEIGHTS, ignore_index=IGNORED, reduction="sum")
    return total, class_weight(batch)


def class_weight(batch):
    return CLASS_WEIGHTS[batch["labels"][batch["labels"] != IGNORED]].sum()


def two_means(model, batch):
    return token_mean(model, batch) + score_mean(model, batch)


def two_terms(model, batch):
    return {"tokens": token_pair(model, batch), "score": score_mean(model, batch)}


def balanced(model, batch):
    """A term beside the loss that looks at all tokens of the batch at once, as a balance loss over experts does."""
    return token_mean(model, batch) + balance(model, batch)


def balance(model, batch):
    return model(batch["ids"])[batch["ids"] != 0].softmax(1).mean(0).square().sum()


def balanced_terms(model, batch):
    return {"tokens": token_pair(model, batch), "balance": balance(model, batch)}


@dataclass(frozen=True)
class Form:
    """plain: the loss as one number. given: what autoaccum's own loop gets. count: what `plain` is a mean over, or mostly."""

    plain: Callable[[Any, Any], Any]
    given: Callable[[Any, Any], Any]
    count: Callable[[Any], Any]
    unlabelled: int = 0


FORMS = {
    "mean over samples": Form(score_mean, score_mean, samples),
    "mean over label tokens": Form(token_mean, token_pair, tokens),
    "the same, 5 texts without a label": Form(token_mean, token_pair, tokens, unlabelled=5),
    "class weights": Form(weighted_mean, weighted_pair, class_weight),
    "tokens' mean + samples' mean": Form(two_means, two_terms, tokens),
    "balance term over the batch": Form(balanced, balanced_terms, tokens),
}


# -- the systems: each returns the gradient of its first step, and what was warned of --


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([torch.zeros(p.numel(), dtype=p.dtype) if p.grad is None else p.grad.flatten().clone() for p in model.parameters()])


def micro_batches(data: Texts) -> Iterator[Any]:
    return iter(DataLoader(data, batch_size=MOST, collate_fn=padded))


def plain_loop(form: Form, data: Texts):
    model = Tagger()
    job = autoaccum.Job(model, Noted(model), form.given, autoaccum.worst_case(data, collate=padded))
    plan = autoaccum.tune(job, target_batch=SAMPLES, max_micro_batch=MOST)
    loop = autoaccum.Accumulator(job, plan)
    for window in plan.windows(DataLoader(data, batch_size=SAMPLES, collate_fn=padded)):
        loop.step(window)
    return job.optimizer.seen, plan.warnings


def by_hand(form: Form, data: Texts):
    model = Tagger()
    job = autoaccum.Job(model, torch.optim.SGD(model.parameters(), lr=0.0), form.plain, autoaccum.worst_case(data, collate=padded), count=form.count)
    plan = autoaccum.tune(job, target_batch=SAMPLES, max_micro_batch=MOST)
    for window in plan.windows(DataLoader(data, batch_size=SAMPLES, collate_fn=padded)):
        for micro in plan.split(window, form.count):
            (form.plain(model, micro.batch) * micro.weight).backward()
    return flat(model), plan.warnings


class Noted(torch.optim.SGD):
    """Keeps the gradient that it is given, and moves nothing."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), lr=0.0)
        self.model, self.seen = model, None

    def step(self, closure=None):
        self.seen = flat(self.model)
        return super().step(closure)


def _trainer(form: Form, data: Texts, functions=None, **given):
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    class Plain(Trainer):
        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            if functions is not None:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            return form.plain(model, inputs)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Tagger()

        def forward(self, ids, labels=None, score=None):
            scores = self.inner(ids)
            return {"logits": scores} if functions is not None else scores

    class First(TrainerCallback):
        seen = None

        def on_pre_optimizer_step(self, args, state, control, model=None, **_):
            First.seen = flat(model)

    settings = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "max_steps": 1}
    settings |= {"max_grad_norm": 0.0, "learning_rate": 0.0, "per_device_train_batch_size": MOST, "remove_unused_columns": False, **given}
    folder = tempfile.mkdtemp()
    made = Plain(Model(), TrainingArguments(folder, **settings), train_dataset=data, data_collator=padded, callbacks=[First()], **(functions or {}))
    made.remove_callback(PrinterCallback)
    return made, First


def hf_with(form: Form, data: Texts):
    from autoaccum.integrations import huggingface

    made, first = _trainer(form, data)
    plan = huggingface.tune(made, target_batch=SAMPLES, max_micro_batch=MOST, count=form.count)
    plan.apply(made)
    made.train()
    return first.seen, plan.warnings


def hf(form: Form, data: Texts):
    made, first = _trainer(form, data, gradient_accumulation_steps=SAMPLES // MOST)
    made.train()
    return first.seen, ()


def hf_items(form: Form, data: Texts):
    """`compute_loss_func`, which divides a sum by the number that the Trainer counts. Where that is another number, there is none to run."""
    if form.plain is not token_mean:
        return None

    def divided(outputs, labels, num_items_in_batch=None):
        return cross_entropy(outputs["logits"].flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum") / num_items_in_batch

    made, first = _trainer(form, data, {"compute_loss_func": divided}, gradient_accumulation_steps=SAMPLES // MOST)
    made.train()
    return first.seen, ()


def _accelerator(steps: int = 1):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=steps)
    model = Tagger()
    return (accelerator, *accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0)))


def accelerate_with(form: Form, data: Texts):
    from autoaccum.integrations import accelerate

    accelerator, model, optimizer = _accelerator()
    make_batch = autoaccum.worst_case(data, collate=padded)
    plan = accelerate.tune(accelerator, model, optimizer, form.plain, make_batch, target_batch=SAMPLES, max_micro_batch=MOST, count=form.count)
    loader = DataLoader(data, batch_size=SAMPLES, collate_fn=padded)
    for micro in accelerate.micro_batches(accelerator, plan, loader, count=form.count):
        with accelerator.accumulate(model):
            accelerator.backward(form.plain(model, micro.batch) * micro.weight)
    return flat(model), plan.warnings


def accelerate(form: Form, data: Texts):
    accelerator, model, _ = _accelerator(SAMPLES // MOST)
    for batch in accelerator.prepare(DataLoader(data, batch_size=MOST, collate_fn=padded)):
        with accelerator.accumulate(model):
            accelerator.backward(form.plain(model, batch))
    return flat(model), ()


def _lightning(form: Form, data: Texts, callback=None, **given):
    import lightning

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.inner, self.seen = Tagger(), None

        def training_step(self, batch, batch_idx):
            return form.plain(self.inner, batch)

        def on_before_optimizer_step(self, optimizer):
            self.seen = flat(self.inner)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    settings = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    module = Module()
    made = lightning.Trainer(callbacks=[callback] if callback else [], enable_model_summary=False, max_epochs=1, **settings, **given)
    made.fit(module, DataLoader(data, batch_size=MOST, collate_fn=padded))
    return module.seen, callback.plan.warnings if callback else ()


def lightning_with(form: Form, data: Texts):
    from autoaccum.integrations.lightning import EffectiveBatch

    callback = EffectiveBatch(SAMPLES, batch=autoaccum.worst_case(data, collate=padded), max_micro_batch=MOST, count=form.count)
    return _lightning(form, data, callback)


def lightning(form: Form, data: Texts):
    return _lightning(form, data, accumulate_grad_batches=SAMPLES // MOST)


def averaged(form: Form, data: Texts):
    model = Tagger()
    for batch in micro_batches(data):
        (form.plain(model, batch) / (SAMPLES // MOST)).backward()
    return flat(model), ()


def over_tokens(form: Form, data: Texts):
    if form.plain is not token_mean:
        return None
    model, counted = Tagger(), sum(tokens(batch) for batch in micro_batches(data))
    for batch in micro_batches(data):
        (form.given(model, batch)[0] / counted).backward()
    return flat(model), ()


SYSTEMS: dict[str, Callable[[Form, Texts], Any]] = {
    "autoaccum: plain loop": plain_loop,
    "autoaccum: HF Trainer": hf_with,
    "autoaccum: Accelerate": accelerate_with,
    "autoaccum: Lightning": lightning_with,
    "autoaccum: by hand, `plan.split`": by_hand,
    "HF Trainer": hf,
    "HF Trainer, dividing by `num_items_in_batch`": hf_items,
    "Accelerate": accelerate,
    "Lightning": lightning,
    "optax's rule": averaged,
    "torchtitan's rule": over_tokens,
}


def measured(system: Callable[[Form, Texts], Any], form: Form) -> dict[str, Any] | None:
    """The worst relative error of five draws (nan is the worst), whether it was warned of, and the sentence if it was refused."""
    worst, warned = 0.0, []
    for draw in range(DRAWS):
        data = Texts(draw, form.unlabelled)
        whole = Tagger()
        form.plain(whole, padded(data.samples)).backward()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = system(form, data)
        except autoaccum.AutoaccumError as error:
            return {"refused": str(error)}
        if found is None:
            return None
        gradient, told = found
        error = float((gradient - flat(whole)).norm() / flat(whole).norm())
        worst = error if math.isnan(error) else max(worst, error)
        warned.append(list(told))
    return {
        "error": worst if math.isfinite(worst) else None,
        "warned": sum(map(bool, warned)),
        "of": DRAWS,
        "warnings": sorted({text for told in warned for text in told}),
    }


def table(document: dict[str, Any]) -> str:
    """The README's table."""
    lines = [f"| | {' | '.join(FORMS)} |", "| --- |" + " --- |" * len(FORMS)]
    for system, forms in document["forms"].items():
        lines.append(f"| {system} | {' | '.join(_told(forms[form]) for form in FORMS)} |")
    versions = ", ".join(f"{name} {version.split('+')[0]}" for name, version in document["versions"].items())
    return "\n".join([*lines, "", f"{versions}."])


def _told(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    if "refused" in found:
        return "refused"
    error = "nan" if found["error"] is None else f"{found['error']:.2f}" if found["error"] > 0.01 else f"{found['error']:.0e}"
    return error + (", warned" if found["warned"] == found["of"] else f", warned {found['warned']} of {found['of']} times" if found["warned"] else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    forms = {name: {form: measured(system, made) for form, made in FORMS.items()} for name, system in SYSTEMS.items()}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "accelerate", "lightning", "transformers")}
    document = {"samples": SAMPLES, "most": MOST, "draws": DRAWS, "forms": forms, "versions": versions}
    print(table(document))
    if asked.output:
        asked.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
