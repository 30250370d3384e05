"""The place of a checkpoint in the data: a Trainer finds it by counting steps, so it goes on only in windows of the same target."""

from __future__ import annotations

import warnings
from typing import Any

from autoaccum.errors import AutoaccumWarning, UsageError
from autoaccum.integrations import needed

_transformers: Any = needed("transformers", "huggingface")
_NAME = "autoaccum"


class Place(_transformers.TrainerCallback):  # type: ignore[misc] # Transformers is not typed here
    """Writes the target batch into each checkpoint of the Trainer, and compares it where training goes on from one."""

    def __init__(self, target_batch: int) -> None:
        self.target_batch = target_batch

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Raises `UsageError` if the checkpoint was written in windows of another target."""
        before = (state.stateful_callbacks.get(_NAME) or {}).get("target_batch", self.target_batch) if state.global_step else self.target_batch
        if before != self.target_batch:
            raise UsageError(
                f"the checkpoint was written after {state.global_step} windows of {before} samples, and windows here have {self.target_batch}: a Trainer finds "
                f"its place by counting steps, so it would read samples twice or never; go on with target_batch={before}, or load the checkpoint's weights "
                "into the model and train without resume_from_checkpoint"
            )
        # https://github.com/huggingface/transformers: the order of each epoch is drawn from torch's random numbers, of which a checkpoint has later ones.
        if state.global_step and state.epoch and state.epoch % 1 and state.epoch > 1 and not getattr(args.accelerator_config, "use_seedable_sampler", True):
            warnings.warn(
                f"with use_seedable_sampler=False a Trainer draws another order for the epoch in which it goes on ({state.epoch:.2f} epochs were done), so samples of "
                "this epoch come twice or never, also without autoaccum: set it to True in accelerator_config before a run whose checkpoints shall go on exactly",
                AutoaccumWarning,
                stacklevel=2,
            )
        state.stateful_callbacks[_NAME] = {"target_batch": self.target_batch}


def attach(trainer: Any, target_batch: int) -> None:
    """Adds the callback to the Trainer, or replaces that of an earlier plan."""
    trainer.remove_callback(Place)
    trainer.add_callback(Place(target_batch))
