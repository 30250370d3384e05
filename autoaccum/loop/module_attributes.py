"""The attributes of a module or another object, restored after other code has changed them."""

from __future__ import annotations

import copy
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch


class Contents:
    """What the lists, deques and sets hold that are attributes of a module's modules, such as outputs that a step collects."""

    def __init__(self, model: torch.nn.Module) -> None:
        found = [value for module in model.modules() for value in vars(module).values() if type(value) in (list, deque, set)]
        self._before = [(value, list(value)) for value in found]

    def put_back(self) -> None:
        for value, items in self._before:
            value.clear()
            value.update(items) if isinstance(value, set) else value.extend(items)


@contextmanager
def attributes_kept(model: torch.nn.Module) -> Iterator[None]:
    """Restores the attributes, hooks, parameters and children of every module of `model` at the end, and what its lists and sets hold. It does not copy them."""
    before: list[tuple[torch.nn.Module, dict[str, Any], dict[str, dict[Any, Any]]]] = [
        (module, dict(vars(module)), {name: dict(value) for name, value in vars(module).items() if isinstance(value, (dict, OrderedDict))})
        for module in model.modules()
    ]
    contents = Contents(model)
    try:
        yield
    finally:
        contents.put_back()
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
