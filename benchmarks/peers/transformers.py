"""HF Trainer's `auto_find_batch_size`: training begins anew at nine tenths, and accumulation is left as it was."""

PACKAGES = ("transformers", "accelerate")
SYSTEMS = ("HF Trainer",)


def run(system, work):
    import tempfile

    import torch
    import transformers
    from work import as_it_is

    transformers.logging.set_verbosity_error()

    class Lossy(torch.nn.Module):
        """The Trainer wants the loss in a dict."""

        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, inputs, targets):
            return {"loss": self.model(inputs, targets=targets)}

    class Told(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__):
            torch.set_num_threads(1)
            work.found([trainer._train_batch_size])

        def on_step_end(self, *_, **__):
            work.step_was_made(trainer._train_batch_size)

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder, max_steps=work.windows, per_device_train_batch_size=work.target, auto_find_batch_size=True, use_cpu=work.place == "cpu", report_to="none", disable_tqdm=True,
            save_strategy="no", logging_strategy="no", remove_unused_columns=False, dataloader_drop_last=True, max_grad_norm=0.0,
        )  # fmt: skip
        trainer = transformers.Trainer(
            Lossy(work.model), arguments, train_dataset=work.samples, data_collator=as_it_is, optimizers=(work.optimizer(), None), callbacks=[Told()]
        )
        trainer.train()
    return trainer._train_batch_size
