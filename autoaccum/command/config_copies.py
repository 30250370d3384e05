"""`ConfigCopy`: a configuration file of a command, of which each trial gets a copy with its own numbers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoaccum.errors import MissingExtra, UsageError

_KINDS = (".yaml", ".yml", ".json", ".toml")


@dataclass(frozen=True)
class ConfigCopy:
    """A configuration file, and the values that a trial's copy has: pairs of (key with dots, text with placeholders).

    path: as the command names it. The user's own file is never written.
    """

    path: str
    values: tuple[tuple[str, str], ...]

    def written(self, fields: dict[str, str], folder: Path) -> Path:
        """Writes a copy with the placeholders filled in into `folder`, under the name of the file. Returns its path."""
        document = _read(self.path)
        for key, text in self.values:
            for name, value in fields.items():
                text = text.replace(name, value)
            _put(document, key, _value(text), self.path)
        folder.mkdir(parents=True, exist_ok=True)
        copy = folder / Path(self.path).name
        copy.write_text(_text(document, copy.suffix))
        return copy


def copies_of(settings: tuple[str, ...]) -> tuple[ConfigCopy, ...]:
    """The copies that `--set-file FILE:key=value` asks for; several values of one file come together.

    Raises `UsageError` for a setting of another form, a file that is not there or cannot be read, and a key that the file does not have.
    """
    values: dict[str, list[tuple[str, str]]] = {}
    for setting in settings:
        place, has_value, value = setting.partition("=")
        path, has_key, key = place.rpartition(":")
        if not (has_value and has_key and path and key):
            raise UsageError(f"--set-file takes FILE:key=value, for instance config.yaml:train.micro_batch_size={{micro_batch}}, not {setting!r}")
        if Path(path).suffix not in _KINDS:
            raise UsageError(f"--set-file reads {', '.join(_KINDS)}, not {path!r}")
        values.setdefault(path, []).append((key, value))
    copies = []
    for path, pairs in values.items():
        document = _read(path)
        for key, _ in pairs:
            _put(document, key, "", path)
        copies.append(ConfigCopy(path, tuple(pairs)))
    return tuple(copies)


def _read(path: str) -> Any:
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--set-file {path!r} cannot be read: {getattr(error, 'strerror', None) or 'it is no text'}") from None
    try:
        if Path(path).suffix == ".json":
            return json.loads(text)
        if Path(path).suffix == ".toml":
            return _toml().parse(text)
        return _yaml().safe_load(text)
    except (MissingExtra, UsageError):
        raise
    except Exception as error:  # each library has its own
        raise UsageError(f"--set-file {path!r} cannot be read: {str(error).splitlines()[0]}") from None


def _text(document: Any, suffix: str) -> str:
    if suffix == ".json":
        return json.dumps(document, indent=2)
    return str(_toml().dumps(document)) if suffix == ".toml" else str(_yaml().safe_dump(document, sort_keys=False))


def _yaml() -> Any:
    try:
        import yaml
    except ImportError:
        raise MissingExtra("--set-file of a .yaml file needs PyYAML: pip install pyyaml") from None
    return yaml


def _toml() -> Any:
    try:
        import tomlkit
    except ImportError:
        raise MissingExtra("--set-file of a .toml file needs tomlkit: pip install tomlkit") from None
    return tomlkit


def _put(document: Any, key: str, value: Any, path: str) -> None:
    """Sets the value at a key with dots; numbers in it are places in lists. Raises `UsageError` for a key that is not there."""
    *above, last = key.split(".")
    place = document
    for depth, name in enumerate(above):
        place = _inside(place, name, ".".join(above[: depth + 1]), path)
    _inside(place, last, key, path)
    place[int(last) if isinstance(place, list) else last] = value


def _inside(place: Any, name: str, key: str, path: str) -> Any:
    if isinstance(place, dict) and name in place:
        return place[name]
    if isinstance(place, list) and name.isdigit() and int(name) < len(place):
        return place[int(name)]
    there = ", ".join(map(str, place)) if isinstance(place, dict) else f"{len(place)} entries" if isinstance(place, list) else "no keys"
    raise UsageError(f"--set-file: {path!r} has no key {key!r}; there it has {there[:200]}")


def _value(text: str) -> Any:
    """A filled-in text as the number, truth value or list that it spells, else as it is."""
    try:
        return json.loads(text)
    except ValueError:
        return text
