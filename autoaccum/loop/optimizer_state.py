"""What an optimizer's state takes, before it is there and once it is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from autoaccum.window import Job

# Tensors as large as the parameter, for each parameter: https://docs.pytorch.org/docs/stable/optim.html, the sources of each class.
_COPIES = {
    "Adam": 2,
    "AdamW": 2,
    "SparseAdam": 2,
    "Adamax": 2,
    "NAdam": 2,
    "RAdam": 2,
    "Adadelta": 2,
    "Rprop": 2,
    "Adagrad": 1,
    "RMSprop": 1,
    "ASGD": 1,
    "Muon": 1,
}
_ASSUMED_COPIES = 2  # of an optimizer that is not torch's


def resident_bytes(jobs: Sequence[Job]) -> int:
    """Bytes of the tensors in the optimizers' states now."""
    storages: dict[int, int] = {}
    for job in jobs:
        for tensor in (each for optimizer in job.optimizers for state in list(optimizer.state.values()) for each in _tensors(state)):
            if tensor.layout != torch.strided or tensor.device != job.device:
                continue
            # A wrapper around other tensors has no storage of its own.
            wraps = hasattr(tensor, "__tensor_flatten__")
            storages[id(tensor) if wraps else tensor.untyped_storage().data_ptr()] = tensor.nbytes if wraps else tensor.untyped_storage().nbytes()
    return sum(storages.values())


def expected_bytes(jobs: Sequence[Job]) -> int:
    """Bytes of all states after the first step, as far as their classes say; twice the trained bytes for a class that is not torch's."""
    return sum(_expected(optimizer) for job in jobs for optimizer in job.optimizers)


def _expected(optimizer: torch.optim.Optimizer) -> int:
    total = 0
    for group in optimizer.param_groups:
        trained = sum(parameter.nbytes for parameter in group["params"] if parameter.requires_grad)
        total += int(_copies(optimizer, group) * trained)
    return total


def _copies(optimizer: torch.optim.Optimizer, group: dict[str, object]) -> float:
    names = [base.__name__ for base in type(optimizer).__mro__ if base.__module__.startswith("torch.optim")]
    name = names[0] if names and names[0] != "Optimizer" else ""
    if name == "SGD":
        return 1.0 if group.get("momentum") else 0.0
    if name == "LBFGS":
        history = group.get("history_size")
        return 2.0 * (history if isinstance(history, int) else 100) + 3.0  # old directions and steps, and the last gradient, direction and loss
    if name == "Adafactor":
        return 0.1  # a row and a column for each matrix
    if name not in _COPIES:
        return float(_ASSUMED_COPIES)
    return float(_COPIES[name] + bool(group.get("amsgrad")) + bool(group.get("centered")) + bool(name == "RMSprop" and group.get("momentum")))


def _tensors(state: object) -> Iterable[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict):
        for each in state.values():
            yield from _tensors(each)
    elif isinstance(state, (list, tuple)):
        for each in state:
            yield from _tensors(each)
