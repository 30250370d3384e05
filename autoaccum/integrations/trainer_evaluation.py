"""The evaluation of a Trainer: one batch of its evaluation set through its own `prediction_step`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch.utils.data import ConcatDataset, IterableDataset

from autoaccum.data import lengths
from autoaccum.errors import AutoaccumWarning, UsageError
from autoaccum.integrations import trainer_loader, trainer_samples
from autoaccum.probe import Evaluation


def evaluation_of(trainer: Any, length: lengths.Length | None) -> Evaluation:
    """What `Trainer.evaluate` runs for one batch, on the longest samples of the evaluation set, or of the training set if there is none.

    length: the length of a sample, as in `worst_case`.
    Raises `UsageError` for an evaluation set that is a stream. Warns if the Trainer keeps the results of all batches on the device.
    """
    given = trainer.eval_dataset
    named = dict(given) if isinstance(given, Mapping) and not hasattr(given, "column_names") else None
    first = next(iter(named)) if named else None
    loader = trainer.get_train_dataloader() if given is None else trainer.get_eval_dataloader(first)
    trainer_loader.forget(trainer, loader)
    data = ConcatDataset(list(named.values())) if named else loader.dataset
    if isinstance(data, IterableDataset):
        raise UsageError("the Trainer's evaluation set is a stream, whose longest sample nobody knows: leave evaluate=True out")
    make_batch, collate = trainer_samples.cuttable(data, length, loader.collate_fn)
    loss_only = True if trainer.compute_metrics is None else trainer.args.prediction_loss_only
    if not loss_only and trainer.args.eval_accumulation_steps is None and not trainer.args.batch_eval_metrics:
        warnings.warn(
            "the Trainer keeps the predictions of the whole evaluation set on the device (compute_metrics without eval_accumulation_steps), and eval_batch "
            "was measured with those of one batch: "
            + (
                "keep less of them with preprocess_logits_for_metrics"  # on a CPU there is nowhere else to move them
                if trainer.args.device.type == "cpu"
                else "set eval_accumulation_steps=1"
            ),
            AutoaccumWarning,
            stacklevel=4,
        )

    def run(model: Any, batch: Any) -> Any:
        inputs = batch if collate is None else collate(list(batch))
        return trainer.prediction_step(model, dict(inputs) if isinstance(inputs, Mapping) else inputs, loss_only)

    return Evaluation(run, make_batch, len(data))
