"""Bytes to words and back. The only place where 2**30 is written."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from autoaccum.errors import UsageError

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40

_UNITS = {"": 1, "b": 1, "kib": KIB, "mib": MIB, "gib": GIB, "tib": TIB}
_UNITS |= {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
# One letter means the binary unit, as in `docker run --memory 2g` and `ulimit`.
_UNITS |= {"k": KIB, "m": MIB, "g": GIB, "t": TIB}


def parse_size(text: str | int) -> int:
    """`"512MiB"`, `"1.5GB"`, `"2g"` or bytes, as bytes.

    Raises `UsageError` for anything else, and for sizes that are not positive.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        bytes_ = text
    else:
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(text).lower())
        if not found or found[2] not in _UNITS:
            raise UsageError(f"{text!r} is not a size: write bytes, or a number with a unit such as 512MiB, 2GiB, 1.5GB")
        bytes_ = int(float(found[1]) * _UNITS[found[2]])
    if bytes_ <= 0:
        raise UsageError(f"a size must be more than nothing, not {text!r}")
    return bytes_


def parse_headroom(text: str | int, of_bytes: int) -> int:
    """Headroom in bytes: a size (`"256MiB"`, 0 allowed), or a percentage of `of_bytes` (`"3%"`).

    Raises `UsageError` for anything else, for 100 % and more, and for a size as big as the whole.
    """
    percent = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", str(text))
    if percent:
        if float(percent[1]) >= 100:
            raise UsageError(f"headroom of {text} leaves nothing: give less than 100%")
        return int(of_bytes * float(percent[1]) / 100)
    kept = 0 if str(text).strip() in ("0", "0b", "0B") else parse_size(text)
    if 0 < kept < KIB:
        raise UsageError(f"headroom of {text} is {kept} bytes: write a percentage such as 3%, or a size such as 512MiB")
    if kept >= of_bytes > 0:
        raise UsageError(f"headroom of {in_words(kept)} leaves nothing of {in_words(of_bytes)}: give less")
    return kept


def in_words(bytes_: int, unit: str | None = None) -> str:
    """`"39.4 GiB"`: one decimal, in the unit in which the figure is easiest to read."""
    unit = unit or unit_for(bytes_)
    return f"{number(bytes_, unit)} {unit}"


def number(bytes_: int, unit: str) -> str:
    """The figure alone, in `unit`: one decimal for GiB and more, none below."""
    scaled = bytes_ / _UNITS[unit.lower()]
    return f"{scaled:.1f}" if unit in ("GiB", "TiB") else f"{scaled:.0f}"


def unit_for(bytes_: int) -> str:
    """The unit that suits a size; give the largest of a line of figures to print them all alike."""
    for unit, least in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(bytes_) >= least:
            return unit
    return "B"


def seconds_in_words(seconds: float) -> str:
    """`"0.4 s"`, `"9 s"`, `"2 min 5 s"`."""
    if seconds < 1:
        return f"{max(seconds, 0):.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(math.floor(seconds + 0.5), 60)
    return f"{minutes} min {rest} s" if rest else f"{minutes} min"


def duration_in_words(seconds: float) -> str:
    """`"62 ms"`, `"12 s"`: the time of a window."""
    return f"{seconds * 1000:.0f} ms" if seconds < 10 else f"{seconds:.1f} s"


def ranks_in_words(ranks: Sequence[int]) -> str:
    """`"rank 3"`, `"ranks 1, 2 and 5"`."""
    words = [str(rank) for rank in ranks]
    return f"rank {words[0]}" if len(words) == 1 else f"ranks {', '.join(words[:-1])} and {words[-1]}"
