"""A Trainer that learns its micro-batches while it trains: every step is the whole window's gradient, and what runs out is rescued."""

import pytest
import torch
import transformers
from transformers import Trainer, TrainingArguments

import autoaccum
from autoaccum.integrations.huggingface import EffectiveBatch
from tests.integrations.test_huggingface import Line, Pairs, Steps, Texts, gpt2, padded

transformers.logging.set_verbosity_error()


def arguments(folder, **given):
    return TrainingArguments(folder, use_cpu=True, report_to=[], save_strategy="no", logging_strategy="no", max_grad_norm=0.0, **given)


def whole_gradients(model, batches, loss):
    return [torch.cat([each.flatten() for each in torch.autograd.grad(loss(model, batch), list(model.parameters()))]) for batch in batches]


def test_every_step_is_the_whole_windows_gradient_from_the_first_on(tmp_path):
    data, model = Pairs(260), Line()
    steps, callback = Steps(model), EffectiveBatch(60)
    given = arguments(str(tmp_path), num_train_epochs=3, learning_rate=0.0, train_sampling_strategy="sequential")
    trainer = Trainer(model, given, train_dataset=data, callbacks=[callback, steps])
    trainer.train()
    assert steps.samples == [60, 60, 60, 60, 20] * 3
    windows = [{"inputs": data.inputs[start : start + 60], "targets": data.targets[start : start + 60]} for start in range(0, 260, 60)]
    wanted = whole_gradients(model, windows, lambda model, batch: model(**batch)["loss"]) * 3
    for ours, theirs in zip(steps.gradients, wanted):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert callback.plan.micro_batches == (60,) and not callback.plan.learning


def test_means_over_tokens_and_an_out_of_memory_in_mid_window(tmp_path):
    model, failed = gpt2().double(), []
    inner = model.transformer.forward

    def forward(*args, **settings):
        ids = settings.get("input_ids", args[0] if args else None)
        if len(ids) > 9 and model.training:
            failed.append(len(ids))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return inner(*args, **settings)

    model.transformer.forward = forward
    steps, callback = Steps(model, keep=True), EffectiveBatch(24)
    given = arguments(str(tmp_path), num_train_epochs=2, learning_rate=0.0, train_sampling_strategy="sequential")
    trainer = Trainer(model, given, train_dataset=Texts(96), data_collator=padded, callbacks=[callback, steps])
    trainer.train()
    assert len(steps.gradients) == 8 and 0 < len(failed) < 4 and callback.plan.micro_batch <= 9
    model.transformer.forward = inner
    texts = Texts(96)
    batches = [padded([texts[index] for index in range(start, start + 24)]) for start in range(0, 96, 24)]
    for ours, theirs in zip(steps.gradients, whole_gradients(model, batches, lambda model, batch: model(**batch).loss) * 2):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-7)  # Transformers takes this loss in single precision


def test_tune_measures_before_training_as_before(tmp_path):
    callback = EffectiveBatch(24, tune=True, max_micro_batch=8)
    Trainer(gpt2(), arguments(str(tmp_path), max_steps=2), train_dataset=Texts(48), data_collator=padded, callbacks=[callback]).train()
    assert callback.plan.micro_batches == (8, 8, 8) and callback.plan.trials


def test_a_callback_that_comes_too_late_says_so(tmp_path):
    trainer = Trainer(gpt2(), arguments(str(tmp_path), max_steps=2), train_dataset=Texts(48), data_collator=padded)
    trainer.add_callback(EffectiveBatch(24))
    with pytest.raises(autoaccum.UsageError, match="when the Trainer is made"):
        trainer.train()
    with pytest.raises(autoaccum.UsageError, match="target_batch must be"):
        EffectiveBatch(0)
