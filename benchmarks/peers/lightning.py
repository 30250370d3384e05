"""Lightning's `Tuner.scale_batch_size`, with its defaults. It leaves accumulation alone: `target // size` is set afterwards, by hand."""

PACKAGES = ("lightning",)
SYSTEMS = ("Lightning, power", "Lightning, binsearch")


def run(system, work):
    import tempfile

    import lightning
    import torch
    from lightning.pytorch.tuner import Tuner
    from work import accumulated

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.batch_size = work.model, 2

        def training_step(self, batch, index):
            return self.net(**batch)

        def train_dataloader(self):
            return work.loader(self.batch_size)

        def configure_optimizers(self):
            return work.optimizer()

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    folder = tempfile.TemporaryDirectory()  # where the tuner raises, its checkpoint stays behind
    trainer = lightning.Trainer(default_root_dir=folder.name, accelerator="cpu" if work.place == "cpu" else "gpu", devices=1, **quiet)
    module = Module()
    found = Tuner(trainer).scale_batch_size(module, mode=system.split()[-1])
    torch.set_num_threads(1)
    work.train(accumulated(work.target, found))
    return found
