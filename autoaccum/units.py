"""Functions that parse sizes and format bytes, durations and ranks as text. Only this file writes 2**30."""

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
    """A size in bytes, from text such as `"512MiB"`, `"1.5GB"`, `"2g"`, or from a number of bytes.

    Raises `UsageError` for any other text, and for sizes that are not positive.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        bytes_ = text
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(text).lower())
        if not match or match[2] not in _UNITS:
            raise UsageError(f"{text!r} is not a size: write bytes, or a number with a unit such as 512MiB, 2GiB, 1.5GB")
        bytes_ = int(float(match[1]) * _UNITS[match[2]])
    if bytes_ >= 2**63:
        raise UsageError(f"a size of {str(text)[:40]} is more than any machine has: did you mean another unit?")
    if bytes_ <= 0:
        raise UsageError(f"a size must be more than nothing, not {text!r}")
    return bytes_


def parse_headroom(text: str | int, of_bytes: int) -> int:
    """Headroom in bytes, from a size (`"256MiB"`, 0 allowed) or a percentage of `of_bytes` (`"3%"`).

    Raises `UsageError` for any other text, for 100 % and more, and for a size not below `of_bytes`.
    """
    if isinstance(text, float) or re.fullmatch(r"\s*0?\.\d+\s*", str(text)):
        raise UsageError(
            f'headroom of {text} is neither a percentage nor a size: write "{float(text):.3g}" as "{100 * float(text):.3g}%", or a size such as 512MiB'
        )
    percent = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", str(text))
    if percent:
        if float(percent[1]) >= 100:
            raise UsageError(f"headroom of {text} leaves nothing: give less than 100%")
        return int(of_bytes * float(percent[1]) / 100)
    headroom_bytes = 0 if str(text).strip() in ("0", "0b", "0B") else parse_size(text)
    if 0 < headroom_bytes < KIB:
        raise UsageError(f"headroom of {text} is {headroom_bytes} bytes: write a percentage such as 3%, or a size such as 512MiB")
    if headroom_bytes >= of_bytes > 0:
        raise UsageError(f"headroom of {in_words(headroom_bytes)} leaves nothing of {in_words(of_bytes)}: give less")
    return headroom_bytes


def in_words(bytes_: int, unit: str | None = None) -> str:
    """A size as text, such as `"39.4 GiB"`. unit: by default the unit of `unit_for`."""
    unit = unit or unit_for(bytes_)
    return f"{number(bytes_, unit)} {unit}"


def number(bytes_: int, unit: str) -> str:
    """A size in `unit` as text, without the unit: one decimal for GiB and TiB, none for smaller units."""
    scaled = bytes_ / _UNITS[unit.lower()]
    return f"{scaled:.1f}" if unit in ("GiB", "TiB") else f"{scaled:.0f}"


def unit_for(bytes_: int) -> str:
    """The largest unit of which the size has at least one. To print several sizes in one unit, pass the largest of them."""
    for unit, least in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(bytes_) >= least:
            return unit
    return "B"


def unit_of_all(sizes: Sequence[int]) -> str:
    """The unit for sizes that are read together: that of the largest, or a smaller one in which none of them is printed as nought."""
    units = ["TiB", "GiB", "MiB", "KiB", "B"]
    unit = unit_for(max(map(abs, sizes), default=0))
    while unit != "KiB" and unit != "B" and any(size and not float(number(size, unit)) for size in sizes):
        unit = units[units.index(unit) + 1]
    return unit


def seconds_in_words(seconds: float) -> str:
    """A duration as text: `"0.4 s"`, `"9 s"`, `"2 min 5 s"`."""
    if seconds < 1:
        return f"{max(seconds, 0):.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(math.floor(seconds + 0.5), 60)
    return f"{minutes} min {rest} s" if rest else f"{minutes} min"


def duration_in_words(seconds: float) -> str:
    """The time of a window as text, such as `"62 ms"` or `"12.0 s"`."""
    return f"{seconds * 1000:.0f} ms" if seconds < 10 else f"{seconds:.1f} s"


def ranks_in_words(ranks: Sequence[int]) -> str:
    """Ranks as text: `"rank 3"`, `"ranks 1, 2 and 5"`."""
    words = [str(rank) for rank in ranks]
    return f"rank {words[0]}" if len(words) == 1 else f"ranks {', '.join(words[:-1])} and {words[-1]}"
