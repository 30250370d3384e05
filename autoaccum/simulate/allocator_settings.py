"""Settings of the caching allocator, read from `PYTORCH_CUDA_ALLOC_CONF` as torch reads them.

The grammar and the checks are those of c10/core/AllocatorConfig.cpp (torch 2.6 to 2.13).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from autoaccum.errors import UsageError
from autoaccum.units import MIB

UNLIMITED = 1 << 62
_CLASSES = 16  # classes of sizes from 1 MiB to 64 GiB; each has its own number of divisions


@dataclass(frozen=True)
class Settings:
    """Settings of the caching allocator. Sizes are in bytes.

    max_split_bytes: blocks of this size or more are never split.
    max_non_split_rounding_bytes: how many bytes a block of that size may waste.
    roundup_divisions: 16 numbers, one for each power of two from 1 MiB on.
    garbage_collection_threshold: a fraction of the memory limit; 0 turns garbage collection off.
    memory_fraction: the fraction of the card's memory that the allocator may reserve; None for no limit.
    """

    max_split_bytes: int = UNLIMITED
    max_non_split_rounding_bytes: int = 20 * MIB
    large_segment_bytes: int = 20 * MIB
    roundup_divisions: tuple[int, ...] = (0,) * _CLASSES
    garbage_collection_threshold: float = 0.0
    expandable_segments: bool = False
    memory_fraction: float | None = None
    throw_on_oom: bool = False


def settings_from_environment(environment: Mapping[str, str] | None = None) -> Settings:
    """The settings in `PYTORCH_CUDA_ALLOC_CONF` or, if that is not set, in `PYTORCH_ALLOC_CONF`.

    Torch reads the older name first too. Raises `UsageError` with the name of the variable.
    """
    variables = os.environ if environment is None else environment
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        if variables.get(name):
            try:
                return parse(variables[name])
            except UsageError as error:
                raise UsageError(f"{name}: {error}") from None
    return Settings()


def parse(text: str) -> Settings:
    """Parses a text such as `"max_split_size_mb:128,expandable_segments:True"`.

    Raises `UsageError` if torch refuses the text. Also raises it for the asynchronous backend, because there the driver's
    rules apply, and they are not simulated.
    """
    tokens = list(re.findall(r"[^,:\[\] ]+|[,:\[\]]", text))
    settings = Settings()
    index = 0
    while index < len(tokens):
        key = tokens[index]
        if index + 1 >= len(tokens) or tokens[index + 1] != ":":
            raise UsageError(f"{key!r} in {text!r} needs a value: {key}:VALUE")
        value, index = _value(tokens, index + 2, text)
        if key not in _READERS:
            raise UsageError(
                f"{key!r} is not a setting of the caching allocator; those that count here: {', '.join(name for name in _READERS if _READERS[name])}"
            )
        reader = _READERS[key]
        if reader is not None:
            settings = replace(settings, **reader(key, value))
        if index < len(tokens):
            if tokens[index] != ",":
                raise UsageError(f"a comma is missing before {tokens[index]!r} in {text!r}")
            index += 1
    if settings.max_split_bytes < settings.large_segment_bytes:
        raise UsageError(f"max_split_size_mb must be at least {settings.large_segment_bytes // MIB}, a large segment's size, in {text!r}")
    return settings


def _value(tokens: list[str], index: int, text: str) -> tuple[str | list[tuple[str, str]], int]:
    if index < len(tokens) and tokens[index] == "[":
        pairs = []
        index += 1
        while index < len(tokens) and tokens[index] != "]":
            if index + 2 >= len(tokens) or tokens[index + 1] != ":":
                raise UsageError(f"a list in {text!r} is not of the form [256:1,512:2,>:4]")
            pairs.append((tokens[index], tokens[index + 2]))
            index += 3
            if index < len(tokens) and tokens[index] == ",":
                index += 1
        if index >= len(tokens):
            raise UsageError(f"a closing bracket is missing in {text!r}")
        return pairs, index + 1
    if index >= len(tokens) or tokens[index] in ",:]":
        raise UsageError(f"a value is missing in {text!r}")
    return tokens[index], index + 1


def _mebibytes(field: str, least: int) -> Any:
    def read(key: str, value: Any) -> dict[str, int]:
        if not str(value).isdigit() or int(value) < least:
            raise UsageError(f"{key} must be a whole number of MiB, at least {least}, not {value!r}")
        return {field: min(int(value) * MIB, UNLIMITED)}

    return read


def _share(field: str) -> Any:
    def read(key: str, value: Any) -> dict[str, float]:
        try:
            share = float(value)
        except (TypeError, ValueError):
            share = -1.0
        if not 0 < share <= 1 or (share == 1 and field == "garbage_collection_threshold"):
            raise UsageError(f"{key} must lie between 0 and 1, not {value!r}")
        return {field: share}

    return read


def _flag(field: str) -> Any:
    def read(key: str, value: Any) -> dict[str, bool]:
        if value not in ("True", "False"):
            raise UsageError(f"{key} is True or False, not {value!r}")
        return {field: value == "True"}

    return read


def _divisions(key: str, value: Any) -> dict[str, tuple[int, ...]]:
    def power(text: str, *, or_zero: bool) -> int:
        number = int(text) if text.isdigit() else -1
        if number < 0 or (number == 0 and not or_zero) or number & (number - 1):
            raise UsageError(f"{key} takes powers of two{' or 0' if or_zero else ''}, not {text!r}")
        return number

    if isinstance(value, str):
        return {"roundup_divisions": (power(value, or_zero=False),) * _CLASSES}
    by_class = [0] * _CLASSES
    last, first = 0, True
    for size, count in value:
        divisions = power(count, or_zero=True)
        if size == ">":
            by_class[last:] = [divisions] * (_CLASSES - last)
            continue
        index = min(power(size, or_zero=False).bit_length() - 1, _CLASSES - 1)
        if first:
            by_class[:index] = [divisions] * index
            first = False
        by_class[index] = divisions
        last = index
    return {"roundup_divisions": tuple(by_class)}


def _backend(key: str, value: Any) -> dict[str, Any]:
    if value != "native":
        raise UsageError(f"backend:{value} leaves memory to the driver, whose rules are not known here: simulate the native backend")
    return {}


# None: accepted and ignored, because the setting changes no size.
_READERS: dict[str, Any] = {
    "max_split_size_mb": _mebibytes("max_split_bytes", 20),
    "max_non_split_rounding_mb": _mebibytes("max_non_split_rounding_bytes", 20),
    "large_segment_size_mb": _mebibytes("large_segment_bytes", 20),
    "roundup_power2_divisions": _divisions,
    "garbage_collection_threshold": _share("garbage_collection_threshold"),
    "expandable_segments": _flag("expandable_segments"),
    "per_process_memory_fraction": _share("memory_fraction"),
    "throw_on_cudamalloc_oom": _flag("throw_on_oom"),
    "backend": _backend,
    "release_lock_on_cudamalloc": None,
    "release_lock_on_hipmalloc": None,
    "pinned_use_cuda_host_register": None,
    "pinned_use_hip_host_register": None,
    "pinned_num_register_threads": None,
    "pinned_use_background_threads": None,
    "pinned_reserve_segment_size_mb": None,
    "graph_capture_record_stream_reuse": None,
}
