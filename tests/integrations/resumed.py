"""A Trainer that writes checkpoints in the middle of an epoch, or goes on from one. Run by test_checkpoints.

python resumed.py FOLDER SAMPLES TARGET SIZES [CHECKPOINT] [NAME=VALUE ...]: sizes of micro-batches with commas, or "equal" to tune; values of training
arguments in JSON. It tells the parameters that it ends with, and what was warned of.
"""

import json
import logging
import sys
import warnings
from dataclasses import replace

import torch
import transformers

import autoaccum
from autoaccum.integrations import huggingface
from tests.plans import by_hand

logging.disable(logging.WARNING)


class Data(torch.utils.data.Dataset):
    def __init__(self, samples):
        made = torch.Generator().manual_seed(3)
        self.inputs = torch.randn(samples, 6, generator=made, dtype=torch.float64)

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        return {"inputs": self.inputs[index], "targets": self.inputs[index].sum().sin()}


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.line = torch.nn.Linear(6, 1).double()

    def forward(self, inputs, targets):
        return {"loss": ((self.line(inputs)[:, 0] - targets) ** 2).mean()}


def main(folder, samples, target, sizes, *more):
    settings = {name: json.loads(value) for name, _, value in (word.partition("=") for word in more if "=" in word)}
    checkpoint = next((word for word in more if "=" not in word), None)
    model, data = Line(), Data(int(samples))
    args = transformers.TrainingArguments(
        folder, use_cpu=True, report_to=[], num_train_epochs=3, save_strategy="steps", learning_rate=1e-2, lr_scheduler_type="constant",
        logging_strategy="no", disable_tqdm=True, remove_unused_columns=False, max_grad_norm=0.0, **{"save_steps": 6, **settings},
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=args, train_dataset=data)
    if sizes == "equal":
        plan = huggingface.tune(trainer, target_batch=int(target), equal=True, max_micro_batch=3, rank_timeout_s=60)
    else:
        cut = tuple(map(int, sizes.split(",")))
        plan = replace(by_hand(None, int(target), cut[0]), micro_batch=cut[0], micro_batches=cut, accumulation_steps=len(cut))
    plan.apply(trainer)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train(resume_from_checkpoint=checkpoint)
    except autoaccum.AutoaccumError as error:
        told = {"raised": str(error)}
    else:
        told = {"parameters": [value for parameter in model.parameters() for value in parameter.flatten().tolist()], "steps": trainer.state.global_step}
        told["warned"] = [str(each.message) for each in caught if issubclass(each.category, autoaccum.AutoaccumWarning)]
    if trainer.args.process_index == 0:
        print("told:" + json.dumps(told))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
