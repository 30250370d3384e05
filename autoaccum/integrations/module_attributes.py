"""What a module holds beside its tensors, kept while something else dresses it up."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def attributes_kept(model: torch.nn.Module) -> Iterator[None]:
    """Afterwards every module of `model` has the attributes, the hooks, the parameters and the children that it had before; none is copied."""
    kept: list[tuple[torch.nn.Module, dict[str, Any], dict[str, dict[Any, Any]]]] = [
        (module, dict(vars(module)), {name: dict(held) for name, held in vars(module).items() if isinstance(held, (dict, OrderedDict))})
        for module in model.modules()
    ]
    try:
        yield
    finally:
        for module, attributes, dictionaries in kept:
            vars(module).clear()
            vars(module).update(attributes)
            for name, held in dictionaries.items():
                vars(module)[name].clear()
                vars(module)[name].update(held)
