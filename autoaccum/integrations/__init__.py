"""Plans for live objects of other frameworks: one file for each framework, the only one that imports it.

It exports `of(live)`, which finds the file for an object; users import the files by name.
It imports the doorstep and the rooms from `data` to `virtual`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from autoaccum.errors import MissingExtra, UsageError

LIMITS = ("memory_limit", "headroom", "max_micro_batch", "equal")  # of the keywords of `tune`, those that hold while a plan is learned, too
# The framework's package -> the module here.
_FILES = {"transformers": "huggingface", "lightning": "lightning", "pytorch_lightning": "lightning", "accelerate": "accelerate"}


def of(live: Any) -> Any:
    """The module here for an object of a framework. Raises `UsageError` for any other object."""
    for base in type(live).__mro__:
        file = _FILES.get(base.__module__.partition(".")[0])
        if file is not None:
            return import_module(f"autoaccum.integrations.{file}")
    raise UsageError(f"a plan can be applied to a transformers.Trainer, an accelerate.Accelerator or a lightning.Trainer, not to a {type(live).__name__}")


def needed(package: str, extra: str) -> Any:
    """Imports and returns the framework's package. Raises `MissingExtra` with the command that installs it."""
    try:
        return import_module(package)
    except ImportError:
        raise MissingExtra(f"{package} is not installed: pip install 'autoaccum[{extra}]'") from None


def not_remembered(request: dict[str, Any]) -> None:
    """Raises `UsageError` for `cache=True`, and for `target_tokens`, because frameworks count samples.

    A framework's settings change the memory, but the key of the reading cache does not contain them.
    """
    if request.get("target_tokens") is not None:
        raise UsageError("frameworks count samples, not tokens: give target_batch, or train with autoaccum.Accumulator in a loop of your own")
    if request.get("cache"):
        raise UsageError("readings of a framework's own loop are not remembered, because its settings are not known here: leave cache=True out")
