"""The attributes of a module or another object, restored after other code has changed them."""

from __future__ import annotations

import copy
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
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


@contextmanager
def own_attributes_kept(item: Any) -> Iterator[None]:
    """Restores the attributes of an object at the end. Containers that hold only numbers and text (what it has logged) get their contents back."""
    before = dict(vars(item))
    contents = {name: copy.deepcopy(value) for name, value in before.items() if isinstance(value, (dict, list, deque)) and _is_plain(value)}
    try:
        yield
    finally:
        vars(item).clear()
        vars(item).update({**before, **contents})


def _is_plain(value: Any) -> bool:
    """True for numbers, text, and containers of them."""
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple, deque)):
        return all(map(_is_plain, value))
    return isinstance(value, (str, int, float, type(None)))
