"""The attributes of a module, restored after other code has changed them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def attributes_kept(model: torch.nn.Module) -> Iterator[None]:
    """Restores the attributes, hooks, parameters and children of every module of `model` at the end. It does not copy them."""
    before: list[tuple[torch.nn.Module, dict[str, Any], dict[str, dict[Any, Any]]]] = [
        (module, dict(vars(module)), {name: dict(value) for name, value in vars(module).items() if isinstance(value, (dict, OrderedDict))})
        for module in model.modules()
    ]
    try:
        yield
    finally:
        for module, attributes, dictionaries in before:
            vars(module).clear()
            vars(module).update(attributes)
            for name, value in dictionaries.items():
                vars(module)[name].clear()
                vars(module)[name].update(value)
