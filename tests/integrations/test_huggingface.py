"""On a real Trainer: what it was tuned with is what it trains with, and nothing is left changed."""

import contextlib
import warnings

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

import autoaccum
from autoaccum.devices.cpu import Cpu
from autoaccum.integrations import huggingface
from tests.digest import digest
from tests.plans import by_hand
from tests.tuner.test_in_place import limit_for

transformers.logging.set_verbosity_error()


class Texts(torch.utils.data.Dataset):
    """Token lists of unlike lengths, one of them the longest by far."""

    def __init__(self, samples=100, usual=8, longest=24):
        self.ids = [[(7 * index + at) % 50 + 1 for at in range(longest if index == samples // 2 else 2 + index % usual)] for index in range(samples)]

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def padded(samples):
    most = max(len(each["input_ids"]) for each in samples)
    return {
        "input_ids": torch.tensor([each["input_ids"] + [0] * (most - len(each["input_ids"])) for each in samples]),
        "labels": torch.tensor([each["labels"] + [-100] * (most - len(each["labels"])) for each in samples]),
    }


def gpt2(width=32, positions=64):
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=positions, n_embd=width, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


class Line(nn.Module):
    """A model that knows nothing of Transformers, with a mean over samples, in double precision."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(3, 1).double()

    def forward(self, inputs, targets):
        return {"loss": nn.functional.mse_loss(self.inner(inputs)[:, 0], targets)}


class Pairs(torch.utils.data.Dataset):
    def __init__(self, samples):
        drawn = torch.Generator().manual_seed(1)
        self.inputs, self.targets = torch.randn(samples, 3, dtype=torch.float64, generator=drawn), torch.randn(samples, dtype=torch.float64, generator=drawn)

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        return {"inputs": self.inputs[index], "targets": self.targets[index]}


class Steps(TrainerCallback):
    """What every optimizer step saw: the gradient, and the samples that went through the model since the last one."""

    def __init__(self, model, keep=True):
        self._keep = keep
        self.gradients, self.samples, self.largest, self._since = [], [], 0, 0
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, model, args, kwargs):
        if not model.training:  # it is only being asked what it makes of num_items_in_batch
            return
        size = len(next(each for each in kwargs.values() if isinstance(each, torch.Tensor)))
        self._since, self.largest = self._since + size, max(self.largest, size)

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        if self._keep:
            self.gradients.append(torch.cat([each.grad.flatten().clone() for each in model.parameters() if each.grad is not None]))
        self.samples.append(self._since)
        self._since = 0


def trainer(tmp_path, model, data, collator=None, **given):
    settings = {"max_grad_norm": 0.0, "learning_rate": 1e-3, "per_device_train_batch_size": 5, "per_device_eval_batch_size": 3, "remove_unused_columns": False}
    settings |= {"use_cpu": True, "report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "seed": 3, **given}
    return Trainer(model, TrainingArguments(output_dir=str(tmp_path), **settings), train_dataset=data, eval_dataset=data, data_collator=collator)


def left_of(of):
    arguments = {name: value for name, value in vars(of.args).items() if not name.startswith("_")}
    return digest(of.model), repr(arguments), of.optimizer, of.lr_scheduler, of._train_batch_size, dict(vars(of.model)), torch.get_rng_state().tolist()


def deep():
    """About four MiB for every sample of 256 tokens."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=256, n_embd=96, n_layer=2, n_head=2, resid_pdrop=0.1))


def lora(model):
    return get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"], lora_dropout=0.0, fan_in_fan_out=True))


@pytest.mark.parametrize(
    ("settings", "wrap"), [({}, nn.Identity()), ({}, lora), ({"gradient_checkpointing": True, "max_grad_norm": 1.0, "optim": "adafactor"}, nn.Identity())]
)
def test_tuning_leaves_the_trainer_as_it_was_and_training_survives_the_limit(tmp_path, settings, wrap):
    made = trainer(tmp_path, wrap(deep()), Texts(100, 8, 256), padded, max_steps=8, **settings)
    trainer(tmp_path, gpt2(), Texts(), padded, max_steps=1, **settings).train()  # what a Trainer imports and compiles when it first trains
    before = left_of(made)
    allowed = limit_for(150)
    plan = huggingface.tune(made, target_batch=30, memory_limit=allowed)
    assert left_of(made) == before
    assert sum(plan.micro_batches) == 30 and (plan.accumulation_steps > 1 or settings or wrap is lora)
    assert plan.shapes["input_ids"] == (plan.micro_batch, 256)  # the longest sample, not the first
    plan.apply(made)
    assert made.args.per_device_eval_batch_size == 3 and made.args.max_steps == 8
    steps = Steps(made.model, keep=False)
    made.add_callback(steps)
    device = Cpu()
    device.prepare()
    with device.capped(allowed):
        made.train()
    # Four windows an epoch: three whole ones, and ten samples that are left.
    assert steps.samples == [30, 30, 30, 10] * 2 and steps.largest <= plan.micro_batch
    assert made.state.global_step == 8


def whole_gradients(model, data, windows, collate):
    """Of the windows, each at once, with the optimizer's plain SGD in between left out: weights must not move."""
    found = []
    for indices in windows:
        model.zero_grad()
        model(**collate([data[index] for index in indices]))["loss"].backward()
        found.append(torch.cat([each.grad.flatten().clone() for each in model.parameters() if each.grad is not None]))
    model.zero_grad()
    return found


@pytest.mark.parametrize(("target", "most"), [(22, 4), (20, 5), (24, 7)])
def test_a_mean_over_samples_is_exact_in_uneven_windows_and_in_the_smaller_last_one(tmp_path, target, most):
    """22 = 4 + 4 + 4 + 4 + 3 + 3, then a last window of another size: the Trainer alone divides every mean by the micro-batches' number."""
    model, data = Line(), Pairs(2 * target + 7)
    made = trainer(tmp_path, model, data, torch.utils.data.default_collate, learning_rate=0.0, num_train_epochs=1, lr_scheduler_type="constant")
    plan = autoaccum.tune(
        model, torch.optim.SGD(model.parameters()), lambda model, batch: model(**batch)["loss"], data[:8], target_batch=target, max_micro_batch=most
    )
    plan.apply(made)
    read = []
    made.data_collator = lambda samples: read.append([each["inputs"] for each in samples]) or torch.utils.data.default_collate(samples)
    steps = Steps(model)
    made.add_callback(steps)
    made.train()
    assert steps.samples == [target, target, 7]
    place = {tuple(inputs.tolist()): index for index, inputs in enumerate(data.inputs)}
    order = [place[tuple(inputs.tolist())] for samples in read for inputs in samples]
    assert sorted(order) == list(range(len(data)))
    expected = whole_gradients(Line(), data, [order[:target], order[target : 2 * target], order[2 * target :]], torch.utils.data.default_collate)
    for ours, whole in zip(steps.gradients, expected):
        assert (ours - whole).norm() / whole.norm() < 1e-12


@pytest.mark.parametrize("wrap", ["plain", "lora", "compiled"])
def test_a_mean_over_tokens_is_exact_whatever_the_micro_batches(tmp_path, wrap):
    model = gpt2()
    if wrap == "lora":
        model = lora(model)
        for name, each in model.named_parameters():  # LoRA begins at zero, where half of its gradients are
            if "lora_B" in name:
                nn.init.normal_(each)
    data = Texts()
    compiling = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if wrap == "compiled" else {}
    made = trainer(tmp_path, model, data, padded, learning_rate=0.0, max_steps=1, lr_scheduler_type="constant", **compiling)
    plan = huggingface.tune(made, target_batch=25, max_micro_batch=7)
    assert plan.micro_batches == (7, 6, 6, 6) and not any("mean over" in each for each in plan.warnings)
    plan.apply(made)
    order = [index for piece in list(plan.batch_sampler(data, seed=3))[:4] for index in piece]
    steps = Steps(model)
    made.add_callback(steps)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        made.train()
    assert steps.samples == [25]
    model.zero_grad()
    model(**padded([data[index] for index in order])).loss.backward()
    whole = torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None])
    assert (steps.gradients[0] - whole).norm() / whole.norm() < 2e-6  # GPT-2 computes its loss in single precision
    # Transformers counts the first label of every text for this model, whose loss leaves it out.
    assert any("the Trainer alone would divide this window's loss by 128 labels" in str(each.message) for each in told)


class Classified(Texts):
    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": index % 2}


def classes(samples):
    most = max(len(each["input_ids"]) for each in samples)
    ids = torch.tensor([each["input_ids"] + [0] * (most - len(each["input_ids"])) for each in samples])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": torch.tensor([each["labels"] for each in samples])}


def masked(samples):
    found = padded(samples)
    return {
        **found,
        "attention_mask": (found["input_ids"] != 0).long(),
        "labels": torch.where(found["input_ids"] % 3 == 1, found["labels"], torch.full_like(found["labels"], -100)),
    }


TINY = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64}
BERT = BertConfig(**TINY, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=0)


@pytest.mark.parametrize(("kind", "data", "collate"), [(BertForSequenceClassification, Classified(), classes), (BertForMaskedLM, Texts(), masked)])
@pytest.mark.parametrize("equal", [False, True])
def test_models_that_take_num_items_and_leave_it_unused_are_exact_too(tmp_path, kind, data, collate, equal):
    """The Trainer believes them, and its gradient and its loss are those of the window times the number of its micro-batches."""
    torch.manual_seed(0)
    model = kind(BERT).double()
    made = trainer(tmp_path, model, data, collate, learning_rate=0.0, max_steps=5, lr_scheduler_type="constant", logging_strategy="steps", logging_steps=1)
    assert made.model_accepts_loss_kwargs
    plan = huggingface.tune(made, target_batch=30, max_micro_batch=7, equal=equal)
    assert plan.accumulation_steps == 5 and not plan.warnings, plan.warnings
    plan.apply(made)
    read = []
    made.data_collator = lambda samples: read.append(samples) or collate(samples)
    steps = Steps(model)
    made.add_callback(steps)
    made.train()
    order = [sample for samples in read for sample in samples]
    ends = [30, 60, 90, 100]
    for start, end, ours, logged in zip([0, *ends], ends, steps.gradients, made.state.log_history):
        model.zero_grad()
        loss = model(**collate(order[start:end])).loss
        loss.backward()
        whole = torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None])
        assert (ours - whole).norm() / whole.norm() < 1e-10
        assert float(logged["loss"]) == pytest.approx(loss.item(), rel=1e-3)


def test_in_bfloat16_it_is_rehearsed_as_accelerate_will_run_it(tmp_path):
    """Autocast, and logits back in single precision; and the model gets its own forward back."""
    made = trainer(tmp_path, gpt2(), Texts(), padded, max_steps=2, bf16=True)
    seen = []
    made.compute_loss_func = lambda outputs, labels, num_items_in_batch: seen.append(outputs.logits.dtype) or outputs.logits.float().mean() / num_items_in_batch
    before = left_of(made)
    plan = huggingface.tune(made, target_batch=30, max_micro_batch=7)
    assert left_of(made) == before and set(seen) == {torch.float32}
    made.model.transformer.h[0].mlp.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    plan.apply(made)
    made.train()
    assert seen[-2:] == [torch.bfloat16, torch.float32]


def test_equal_micro_batches_come_from_the_trainers_own_loader(tmp_path):
    made = trainer(tmp_path, gpt2(), Texts(64), padded, max_steps=3)
    plan = huggingface.tune(made, target_batch=24, max_micro_batch=9, equal=True)
    assert plan.to_huggingface() == {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 3}
    plan.apply(made)
    steps = Steps(made.model)
    made.add_callback(steps)
    made.train()
    assert steps.samples == [24, 24, 16] and steps.largest == 8
    assert TrainingArguments(output_dir=str(tmp_path), **plan.to_huggingface()).train_batch_size == 8


def test_a_trainer_that_has_trained_is_tuned_as_well(tmp_path):
    made = trainer(tmp_path, gpt2(), Texts(), padded, max_steps=2)
    made.train()
    before = digest(made.model), repr(made.optimizer.state_dict())
    plan = huggingface.tune(made, target_batch=30, max_micro_batch=7)
    assert (digest(made.model), repr(made.optimizer.state_dict())) == before and plan.micro_batches == (6,) * 5


def test_max_length_is_what_is_measured(tmp_path):
    made = trainer(tmp_path, gpt2(), Texts(), padded)
    plan = huggingface.tune(made, target_batch=8, max_length=60)
    assert plan.shapes["input_ids"] == (8, 60) == plan.shapes["labels"]


def test_what_cannot_be_tuned_or_applied_is_refused(tmp_path):
    made = trainer(tmp_path, gpt2(), None, padded)
    with pytest.raises(autoaccum.UsageError, match="no train_dataset"):
        huggingface.tune(made, target_batch=8)
    by_init = Trainer(model_init=lambda: gpt2(), args=made.args, train_dataset=Texts(), data_collator=padded)
    with pytest.raises(autoaccum.UsageError, match="model_init"):
        huggingface.tune(by_init, target_batch=8)
    with pytest.raises(autoaccum.PlanError, match="this one is a stream"):
        by_hand(None, 25, 7).apply(made)
    with pytest.raises(autoaccum.UsageError, match="not to a Linear"):
        by_hand(None, 25, 7).apply(nn.Linear(1, 1))
    sorted_by_length = trainer(tmp_path, gpt2(), Texts(), padded, train_sampling_strategy="group_by_length")
    with pytest.raises(autoaccum.PlanError, match=r"one of its own \(group_by_length\)"):
        by_hand(None, 25, 7).apply(sorted_by_length)
    with contextlib.suppress(autoaccum.NothingFits):
        huggingface.tune(trainer(tmp_path, gpt2(), Texts(), padded), target_batch=8, memory_limit=limit_for(1))


def test_the_batch_of_evaluation_is_searched_with_the_longest_samples_and_set(tmp_path):
    made = trainer(tmp_path, deep(), Texts(100, 8, 256), padded, max_steps=1)
    before = left_of(made)
    plan = huggingface.tune(made, target_batch=30, memory_limit=limit_for(150), evaluate=True)
    assert left_of(made) == before
    assert plan.micro_batch < plan.eval_batch <= 100
    plan.apply(made)
    assert made.args.per_device_eval_batch_size == plan.eval_batch
    sizes = []
    made.model.register_forward_pre_hook(lambda model, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True)
    made.evaluate()
    assert sum(sizes) == 100 and max(sizes) == plan.eval_batch


def test_predictions_that_stay_on_the_device_are_told(tmp_path):
    made = trainer(tmp_path, gpt2(), Texts(), padded, max_steps=1)
    made.compute_metrics = lambda predictions: {}
    with pytest.warns(UserWarning, match="keeps the predictions of the whole evaluation set on the device.*preprocess_logits_for_metrics"):
        huggingface.tune(made, target_batch=10, evaluate=True)
    made.args.eval_accumulation_steps = 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        huggingface.tune(made, target_batch=10, evaluate=True)
