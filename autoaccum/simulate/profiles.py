"""Reads and checks one GPU data file. Adding a card takes a file, not Python."""

from __future__ import annotations

import difflib
import functools
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autoaccum.errors import ProfileError, UsageError
from autoaccum.units import MIB, in_words, parse_size

if sys.version_info >= (3, 11):
    import tomllib
else:  # the standard library has it from 3.11
    import tomli as tomllib

BACKENDS = ("cuda", "rocm", "xpu", "mps")
DTYPES = ("fp32", "tf32", "fp16", "bf16")
_NUMBERS = ("total_bytes", "context_bytes", "cublas_workspace_bytes", "multiprocessors", "bandwidth_bytes_per_second")
_ARCHITECTURE = re.compile(r"sm_\d{2,3}|gfx[0-9a-f]{3,4}|xe-[a-z]+|apple|any")


@dataclass(frozen=True)
class Figure:
    """A number with where it comes from. `estimated` where nobody has measured or published it."""

    value: int
    source: str
    estimated: bool


@dataclass(frozen=True)
class Profile:
    """What is known of a card.

    label: how the command line calls it. name: as its driver prints it. total_bytes: as torch reports it, not the
    sticker. context_bytes: what the driver's context takes outside the allocator. cublas_workspace_bytes: per handle.
    multiprocessors: on which sums that are shared out depend, None where nobody said.
    flops: dense floating point operations per second by dtype.
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
        """Multiprocessors, and the threads that each holds at once; those of an A100 where nobody said."""
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
        """What the allocator may have."""
        return self.total.value - self.context.value

    @property
    def capability(self) -> int:
        """75 for sm_75. Other makers' cards are taken for the generation that has the same attention kernels."""
        found = re.fullmatch(r"sm_(\d+)", self.architecture)
        return int(found[1]) if found else 80

    def figures(self) -> Iterator[tuple[str, Figure]]:
        """Every number by its name in the file."""
        yield from (("total_bytes", self.total), ("context_bytes", self.context), ("cublas_workspace_bytes", self.cublas_workspace))
        if self.multiprocessors is not None:
            yield "multiprocessors", self.multiprocessors
        if self.bandwidth is not None:
            yield "bandwidth_bytes_per_second", self.bandwidth
        yield from ((f"flops_per_second.{dtype}", figure) for dtype, figure in self.flops.items())


def folder() -> Path:
    """Where the data files are: beside the package's own once installed, one folder up in a checkout."""
    here = Path(__file__).parent
    installed = here / "profiles"
    return installed if installed.is_dir() else here.parent / "profiles"


def names() -> list[str]:
    """Labels of all cards, alphabetically."""
    return sorted(path.stem for path in folder().glob("*.toml"))


def load(label: str) -> Profile:
    """The card of that name (`"t4"`, `"Tesla T4"`), or a card without a name of that size (`"24GiB"`: all of it for the allocator).

    Raises `UsageError` for an unknown card, with the nearest names, and `ProfileError` for a file that is wrong.
    """
    wanted = label.strip().lower().replace(" ", "-").replace("_", "-")
    file = folder() / f"{wanted}.toml"
    if re.fullmatch(r"[\w.-]+", wanted) and file.is_file():
        return read(file)
    if re.fullmatch(r"\d+(\.\d+)?-?(b|[kmgt](i?b)?)|\d{8,}", wanted) and not re.fullmatch(
        r"\d{1,7}", wanted
    ):  # a bare number of up to seven digits is somebody's card, not bytes
        return of_size(parse_size(label), label.strip())
    known = _spellings()
    labels = known.get(wanted, ())
    if len(labels) == 1:
        return read(folder() / f"{labels[0]}.toml")
    if labels:
        raise UsageError(f"{label!r} is what the driver calls {' and '.join(labels)}: say which")
    near = sorted((name for name in known if wanted and name.startswith(wanted)), key=len) + difflib.get_close_matches(wanted, known, n=4, cutoff=0.5)
    near = [*near, *sorted((name for name in known if wanted and wanted in name), key=len)]
    if wanted.isdigit():
        near = [name for name in (f"rtx-{wanted}", f"rtx-{wanted}-ti", *near) if name in known]
    nearest = list(dict.fromkeys(each for name in near for each in known[name]))[:5]
    hint = f"the nearest {'is' if len(nearest) == 1 else 'are'} {', '.join(nearest)}" if nearest else "`autoaccum profiles list` shows all"
    raise UsageError(f"there is no GPU data file for {label!r}: {hint}; or give a size such as 24GiB")


def of_size(nbytes: int, label: str = "") -> Profile:
    """A card without a name whose allocator may have exactly that much. label: as the size was written."""
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
    """Every spelling and the labels it may mean: a file's name and its aliases mean one, a driver's name may mean two."""
    found: dict[str, tuple[str, ...]] = {}
    cards = [read(folder() / f"{name}.toml") for name in names()]
    for card in cards:
        for spelling in (card.label, *card.aliases):
            found[spelling] = (card.label,)
    for card in cards:
        spelling = card.name.lower().replace(" ", "-")
        if card.label not in found.get(spelling, ()):
            found[spelling] = (*found.get(spelling, ()), card.label)
    return found


def read(path: Path) -> Profile:
    """One file. Raises `ProfileError` with file, field and value."""

    def wrong(name: str, value: Any, why: str) -> ProfileError:
        return ProfileError(f"{path.name}: {name} is {value!r}: {why}")

    try:
        told = tomllib.loads(path.read_text())
    except OSError as error:
        raise ProfileError(f"{path} cannot be read: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise ProfileError(f"{path.name} is not TOML: {error}") from None
    for name in told:
        if name not in (*_NUMBERS, "name", "aliases", "backend", "architecture", "flops_per_second"):
            raise wrong(name, told[name], "there is no such field")

    def text(name: str) -> str:
        value = told.get(name)
        if not isinstance(value, str) or not value:
            raise wrong(name, value, "it must be a text")
        return value

    def figure(name: str, entry: Any, least: int = 1) -> Figure:
        if not isinstance(entry, dict) or "value" not in entry:
            raise wrong(name, entry, "it must be a table with a value and a source")
        value = entry["value"]
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise wrong(name, value, f"it must be a whole number of at least {least}")
        given = [word for word in ("source", "estimated") if isinstance(entry.get(word), str) and entry[word]]
        if len(given) != 1 or set(entry) - {"value", *given}:
            raise wrong(name, sorted(set(entry) - {"value"}), "beside its value goes one text, `source` or `estimated`")
        return Figure(value, entry[given[0]], given[0] == "estimated")

    backend, architecture = text("backend"), text("architecture")
    if backend not in BACKENDS:
        raise wrong("backend", backend, f"it must be one of {', '.join(BACKENDS)}")
    if not _ARCHITECTURE.fullmatch(architecture):
        raise wrong("architecture", architecture, "write it as sm_80, gfx942, xe-hpc or apple")
    aliases = told.get("aliases", [])
    if not isinstance(aliases, list) or not all(isinstance(each, str) for each in aliases):
        raise wrong("aliases", aliases, "it must be a list of texts")
    total = figure("total_bytes", told.get("total_bytes"), 256 * MIB)
    context = figure("context_bytes", told.get("context_bytes"), 0)
    if context.value >= total.value:
        raise wrong("context_bytes", context.value, f"it leaves nothing of {total.value} bytes")
    rates = told.get("flops_per_second", {})
    if not isinstance(rates, dict) or set(rates) - set(DTYPES):
        raise wrong("flops_per_second", sorted(rates) if isinstance(rates, dict) else rates, f"its tables are {', '.join(DTYPES)}")
    return Profile(
        path.stem,
        text("name"),
        backend,
        architecture,
        total,
        context,
        figure("cublas_workspace_bytes", told.get("cublas_workspace_bytes"), 0),
        figure("bandwidth_bytes_per_second", told["bandwidth_bytes_per_second"]) if "bandwidth_bytes_per_second" in told else None,
        {dtype: figure(f"flops_per_second.{dtype}", rates[dtype]) for dtype in DTYPES if dtype in rates},
        tuple(aliases),
        figure("multiprocessors", told["multiprocessors"]) if "multiprocessors" in told else None,
    )


def document(profile: Profile) -> dict[str, Any]:
    """A card as plain data."""
    told = {"gpu": profile.label, "name": profile.name, "backend": profile.backend, "architecture": profile.architecture, "aliases": list(profile.aliases)}
    return {**told, **{name: {"value": each.value, "source": each.source, "estimated": each.estimated} for name, each in profile.figures()}}


def written(profile: Profile) -> str:
    """The data file of a card, as text."""
    lines = [f"name = {_quoted(profile.name)}", f"aliases = [{', '.join(map(_quoted, profile.aliases))}]"]
    lines += [f"backend = {_quoted(profile.backend)}", f"architecture = {_quoted(profile.architecture)}"]
    for name, figure in profile.figures():
        lines += ["", f"[{name}]", f"value = {figure.value}", f"{'estimated' if figure.estimated else 'source'} = {_quoted(figure.source)}"]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
