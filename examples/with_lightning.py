"""A Lightning Trainer at an effective batch of 50, whatever fits: `pip install 'autoaccum[lightning]'`.

python examples/with_lightning.py
"""

import logging

import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset

from autoaccum.integrations.lightning import EffectiveBatch

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        return torch.nn.functional.mse_loss(self.net(inputs), targets)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def on_train_epoch_end(self):
        print(f"epoch {self.current_epoch + 1}: {self.trainer.global_step} optimizer steps")


torch.set_num_threads(1)
lightning.seed_everything(0, verbose=False)
inputs = torch.randn(220, 8)
loader = DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=32, shuffle=True)  # of any batch size

effective = EffectiveBatch(50, max_micro_batch=16)
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
trainer = lightning.Trainer(accelerator="cpu", max_epochs=3, callbacks=[effective], **quiet)
trainer.fit(Module(), loader)
print(effective.plan)
