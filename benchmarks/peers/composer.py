"""Composer's `device_train_microbatch_size="auto"`: halved whenever a batch runs out of memory.

It is meant for GPUs and refuses a CPU; on a simulated device that check is taken away, nothing else. Its package asks for
torch below 2.7.1 and a torchvision of that time: it is installed without its dependencies, the ones that its trainer uses beside
it, and an empty torchvision in the place of the real one, of which only its vision algorithms make use.
"""

import importlib.machinery
import sys
import types

PACKAGES = (
    "torchmetrics",
    "tabulate",
    "coolname",
    "py-cpuinfo",
    "psutil",
    "requests",
    "tqdm",
    "pyyaml",
    "pillow",
    "importlib-metadata",
    "packaging",
    "mosaicml-cli",
)
ALONE = ("composer", "torch_optimizer", "pytorch_ranger")  # without what they ask for
SYSTEMS = ("Composer",)


class _Absent(types.ModuleType):
    __path__ = []  # noqa: RUF012

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def _without_torchvision():
    for name in ("", ".transforms", ".transforms.functional", ".datasets", ".models", ".models.resnet", ".ops", ".utils"):
        absent = _Absent("torchvision" + name)
        absent.__spec__ = importlib.machinery.ModuleSpec(absent.__name__, None)
        sys.modules[absent.__name__] = absent


def run(system, work):
    import torch

    _without_torchvision()
    import composer
    from composer.trainer import trainer as inner
    from work import in_pieces

    class Model(composer.ComposerModel):
        def __init__(self):
            super().__init__()
            self.net = work.model

        def forward(self, batch):
            if size() != told[-1]:
                told.append(size())
                work.found(in_pieces(work.target, size()), goes_on=True)
            return self.net(**batch)

        def loss(self, outputs, batch):
            return outputs

    class Told(composer.Callback):
        def batch_end(self, state, logger):
            work.step_was_made(work.target)

    def size():
        return int(trainer.state.device_train_microbatch_size)

    if work.device is not None:
        inner._is_auto_microbatching = lambda asked, device: asked == "auto"
    told = [0]
    trainer = composer.Trainer(
        model=Model(), train_dataloader=work.loader(work.target), optimizers=work.optimizer(), max_duration=f"{work.windows}ba", callbacks=[Told()],
        device_train_microbatch_size="auto", device="cpu" if work.place == "cpu" else "gpu", progress_bar=False, log_to_console=False, dist_timeout=10.0, seed=0,
    )  # fmt: skip
    torch.set_num_threads(1)
    trainer.fit()
    return size()


def accumulate(case, model, optimizer):
    """An epoch of the case's windows, in micro-batches of a given size: all windows but the last are full."""
    import torch

    _without_torchvision()
    import composer

    class Model(composer.ComposerModel):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, batch):
            return self.net, batch

        def loss(self, outputs, batch):
            return case.loss(*outputs)

    whole = [tuple(torch.cat(pieces) for pieces in zip(*window)) for window in case.windows]
    trainer = composer.Trainer(
        model=Model(), train_dataloader=torch.utils.data.DataLoader(whole, batch_size=None), optimizers=optimizer, max_duration="1ep", precision="fp32", device="cpu",
        device_train_microbatch_size=len(case.windows[0][0][0]), progress_bar=False, log_to_console=False, dist_timeout=10.0, seed=0,
    )  # fmt: skip
    trainer.fit()
