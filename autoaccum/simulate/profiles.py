"""Profiles of GPUs: each card's data, read from a TOML file and checked.

To add a card, add a data file. No Python code is needed.
"""

from __future__ import annotations

import difflib
import functools
import os
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autoaccum import files
from autoaccum.errors import AutoaccumWarning, ProfileError, UsageError, in_brief
from autoaccum.units import MIB, in_words, parse_size

if sys.version_info >= (3, 11):
    import tomllib
else:  # tomllib is in the standard library from Python 3.11
    import tomli as tomllib

OWN_FOLDER = "AUTOACCUM_PROFILES_DIR"
BACKENDS = ("cuda", "rocm", "xpu", "mps")
DTYPES = ("fp32", "tf32", "fp16", "bf16")
_NUMBERS = ("total_bytes", "context_bytes", "cublas_workspace_bytes", "multiprocessors", "bandwidth_bytes_per_second")
_ARCHITECTURE = re.compile(r"sm_\d{2,3}|gfx[0-9a-f]{3,4}|xe-[a-z]+|apple|any")


@dataclass(frozen=True)
class Figure:
    """A number and its source. estimated: True if the number was neither measured nor published."""

    value: int
    source: str
    estimated: bool


@dataclass(frozen=True)
class Profile:
    """The data of a card.

    label: the card's name on the command line. name: the name that the driver prints.
    total: bytes, as torch reports them, not the advertised size.
    context: bytes that the driver's context takes outside the allocator.
    cublas_workspace: bytes for each cuBLAS handle. bandwidth: bytes per second, None if unknown.
    flops: dense floating point operations per second, by dtype.
    multiprocessors: sums that several thread blocks share depend on it (see `Staging`); None if unknown.
    """

    label: str
    name: str
    backend: str
    architecture: str
    total: Figure
    context: Figure
    cublas_workspace: Figure
    bandwidth: Figure | None
    flops: dict[str, Figure] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    multiprocessors: Figure | None = None

    @property
    def parallel(self) -> tuple[int, int]:
        """The number of multiprocessors (an A100's if unknown), and the number of resident threads for each."""
        # CUDA C++ Programming Guide, technical specifications per compute capability
        threads = {75: 1024, 86: 1536, 87: 1536, 89: 1536, 120: 1536}.get(self.capability, 2048)
        return (108 if self.multiprocessors is None else self.multiprocessors.value), threads

    @property
    def total_bytes(self) -> int:
        return self.total.value

    @property
    def context_bytes(self) -> int:
        return self.context.value

    @property
    def available_bytes(self) -> int:
        """Bytes that the allocator may reserve: the total without the context."""
        return self.total.value - self.context.value

    @property
    def capability(self) -> int:
        """75 for sm_75. Cards of other makers count as the generation that has the same attention kernels."""
        match = re.fullmatch(r"sm_(\d+)", self.architecture)
        return int(match[1]) if match else 80

    def figures(self) -> Iterator[tuple[str, Figure]]:
        """Yields every number with its name in the data file."""
        yield from (("total_bytes", self.total), ("context_bytes", self.context), ("cublas_workspace_bytes", self.cublas_workspace))
        if self.multiprocessors is not None:
            yield "multiprocessors", self.multiprocessors
        if self.bandwidth is not None:
            yield "bandwidth_bytes_per_second", self.bandwidth
        yield from ((f"flops_per_second.{dtype}", figure) for dtype, figure in self.flops.items())


def folder() -> Path:
    """The folder of the data files: inside the installed package, or beside the package in a checkout."""
    here = Path(__file__).parent.parent
    installed = here / "profiles"
    return installed if installed.is_dir() else here.parent / "profiles"


def own_folder() -> Path:
    """The folder of the user's own data files: AUTOACCUM_PROFILES_DIR, or `profiles` in the system's folder for settings."""
    configured = os.environ.get(OWN_FOLDER)
    if configured:
        return Path(configured)
    import platformdirs

    return Path(platformdirs.user_config_dir("autoaccum")) / "profiles"


def _places() -> dict[str, Path]:
    """The data file of each label. A file of the user's stands for the package's of the same name."""
    return {path.stem: path for place in (folder(), own_folder()) for path in sorted(place.glob("*.toml"))}


def names() -> list[str]:
    """The labels of all cards, in alphabetical order. A file of the user's own that cannot be read is named in a warning, and left out."""
    return sorted(name for name, path in _places().items() if path.parent == folder() or _is_sound(str(path)))


@functools.cache
def _is_sound(path: str) -> bool:
    try:
        read(Path(path))
    except ProfileError as error:
        warnings.warn(f"{error}: the file is left out, mend it in {in_brief(Path(path).parent)}", AutoaccumWarning, stacklevel=3)
        return False
    return True


def load(label: str) -> Profile:
    """The card with this name (`"t4"`, `"Tesla T4"`), or an unnamed card of this size (`"24GiB"`, all of it for the allocator).

    Raises `UsageError` with the nearest names if the card is unknown, and `ProfileError` if its data file is wrong.
    """
    wanted = label.strip().lower().replace(" ", "-").replace("_", "-")
    if (file := _places().get(wanted)) is not None:
        return read(file)
    if re.fullmatch(r"\d+(\.\d+)?-?(b|[kmgt](i?b)?)|\d{8,}", wanted) and not re.fullmatch(
        r"\d{1,7}", wanted
    ):  # a number of up to seven digits is the name of a card, not bytes
        return of_size(parse_size(label), label.strip())
    spellings = _spellings() if len(wanted) < 100 else {}
    labels = spellings.get(wanted, ())
    if len(labels) == 1:
        return read(_places()[labels[0]])
    if labels:
        raise UsageError(f"{label!r} is what the driver calls {' and '.join(labels)}: say which")
    near = sorted((name for name in spellings if wanted and name.startswith(wanted)), key=len) + difflib.get_close_matches(wanted, spellings, n=4, cutoff=0.5)
    near = [*near, *sorted((name for name in spellings if wanted and wanted in name), key=len)]
    if wanted.isdigit():
        near = [name for name in (f"rtx-{wanted}", f"rtx-{wanted}-ti", *near) if name in spellings]
    nearest = list(dict.fromkeys(card for name in near for card in spellings[name]))[:5]
    hint = f"the nearest {'is' if len(nearest) == 1 else 'are'} {', '.join(nearest)}" if nearest else "`autoaccum profiles list` shows all"
    raise UsageError(f"there is no GPU data file for {in_brief(label)}: {hint}; or give a size such as 24GiB")


def of_size(nbytes: int, label: str = "") -> Profile:
    """An unnamed card whose allocator may reserve exactly `nbytes`. label: the size as the user wrote it."""
    given = Figure(nbytes, "as given", False)
    words = in_words(nbytes)
    return Profile(
        label or words.replace(" ", ""),
        f"virtual GPU of {words}",
        "cuda",
        "sm_80",
        given,
        Figure(0, "as given: the size is the allocator's", False),
        Figure(8519680, "torch's default", False),
        None,
    )


@functools.cache
def _spellings() -> dict[str, tuple[str, ...]]:
    """The labels that each spelling may mean. A file's name or an alias means one card; a driver's name may mean two."""
    labels: dict[str, tuple[str, ...]] = {}
    places = _places()
    cards = [read(places[name]) for name in names()]
    for card in cards:
        for spelling in (card.label, *card.aliases):
            labels[spelling] = (card.label,)
    for card in cards:
        spelling = card.name.lower().replace(" ", "-")
        if card.label not in labels.get(spelling, ()):
            labels[spelling] = (*labels.get(spelling, ()), card.label)
    return labels


def read(path: Path) -> Profile:
    """Reads and checks one data file. Raises `ProfileError` with the file, the field and the value."""

    def wrong(name: str, value: Any, why: str) -> ProfileError:
        return ProfileError(f"{path.name}: {name} is {value!r}: {why}")

    try:
        data = tomllib.loads(files.read_text(path))
    except files.Unreadable as error:
        raise ProfileError(f"{in_brief(path)} cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ProfileError(f"{path.name} is not TOML: {error}") from None
    for name in data:
        if name not in (*_NUMBERS, "name", "aliases", "backend", "architecture", "flops_per_second"):
            raise wrong(name, data[name], "there is no such field")

    def text(name: str) -> str:
        value = data.get(name)
        if not isinstance(value, str) or not value:
            raise wrong(name, value, "it must be a text")
        return value

    def figure(name: str, entry: Any, least: int = 1) -> Figure:
        if not isinstance(entry, dict) or "value" not in entry:
            raise wrong(name, entry, "it must be a table with a value and a source")
        value = entry["value"]
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise wrong(name, value, f"it must be a whole number of at least {least}")
        sources = [word for word in ("source", "estimated") if isinstance(entry.get(word), str) and entry[word]]
        if len(sources) != 1 or set(entry) - {"value", *sources}:
            raise wrong(name, sorted(set(entry) - {"value"}), "beside its value goes one text, `source` or `estimated`")
        return Figure(value, entry[sources[0]], sources[0] == "estimated")

    backend, architecture = text("backend"), text("architecture")
    if backend not in BACKENDS:
        raise wrong("backend", backend, f"it must be one of {', '.join(BACKENDS)}")
    if not _ARCHITECTURE.fullmatch(architecture):
        raise wrong("architecture", architecture, "write it as sm_80, gfx942, xe-hpc or apple")
    aliases = data.get("aliases", [])
    if not isinstance(aliases, list) or not all(isinstance(alias, str) for alias in aliases):
        raise wrong("aliases", aliases, "it must be a list of texts")
    total = figure("total_bytes", data.get("total_bytes"), 256 * MIB)
    context = figure("context_bytes", data.get("context_bytes"), 0)
    if context.value >= total.value:
        raise wrong("context_bytes", context.value, f"it leaves nothing of {total.value} bytes")
    rates = data.get("flops_per_second", {})
    if not isinstance(rates, dict) or set(rates) - set(DTYPES):
        raise wrong("flops_per_second", sorted(rates) if isinstance(rates, dict) else rates, f"its tables are {', '.join(DTYPES)}")
    return Profile(
        path.stem,
        text("name"),
        backend,
        architecture,
        total,
        context,
        figure("cublas_workspace_bytes", data.get("cublas_workspace_bytes"), 0),
        figure("bandwidth_bytes_per_second", data["bandwidth_bytes_per_second"]) if "bandwidth_bytes_per_second" in data else None,
        {dtype: figure(f"flops_per_second.{dtype}", rates[dtype]) for dtype in DTYPES if dtype in rates},
        tuple(aliases),
        figure("multiprocessors", data["multiprocessors"]) if "multiprocessors" in data else None,
    )


def document(profile: Profile) -> dict[str, Any]:
    """The profile as plain data."""
    header = {"gpu": profile.label, "name": profile.name, "backend": profile.backend, "architecture": profile.architecture, "aliases": list(profile.aliases)}
    return {**header, **{name: {"value": figure.value, "source": figure.source, "estimated": figure.estimated} for name, figure in profile.figures()}}


def written(profile: Profile) -> str:
    """The text of the card's data file."""
    lines = [f"name = {_quoted(profile.name)}", f"aliases = [{', '.join(map(_quoted, profile.aliases))}]"]
    lines += [f"backend = {_quoted(profile.backend)}", f"architecture = {_quoted(profile.architecture)}"]
    for name, figure in profile.figures():
        lines += ["", f"[{name}]", f"value = {figure.value}", f"{'estimated' if figure.estimated else 'source'} = {_quoted(figure.source)}"]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
