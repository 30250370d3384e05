"""Transformers' Trainer at an effective batch of 50, whatever fits: `pip install 'autoaccum[huggingface]'`.

python examples/with_transformers.py
"""

import tempfile

import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from autoaccum.integrations import huggingface

transformers.logging.set_verbosity_error()


class Counting(torch.utils.data.Dataset):
    """Sequences that count up, of 8 to 24 numbers."""

    def __len__(self):
        return 200

    def __getitem__(self, index):
        ids = [(index + at) % 60 for at in range(8 + index % 17)]
        return {"input_ids": ids, "labels": ids}


def padded(samples):
    most = max(len(each["input_ids"]) for each in samples)
    fill = {"input_ids": 0, "labels": -100}
    return {name: torch.tensor([each[name] + [empty] * (most - len(each[name])) for each in samples]) for name, empty in fill.items()}


torch.set_num_threads(1)
torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=64, n_layer=2, n_head=2))
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(folder, num_train_epochs=3, learning_rate=3e-3, report_to="none", use_cpu=True, logging_steps=4, disable_tqdm=True)
    trainer = Trainer(model, arguments, train_dataset=Counting(), data_collator=padded)

    plan = huggingface.tune(trainer, target_batch=50, max_micro_batch=16)  # on the longest samples
    plan.apply(trainer)
    print(plan)
    trainer.train()
