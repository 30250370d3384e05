"""`Source`: where a job comes from, that is JOB of the command line, which is parsed and imported here."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from autoaccum.errors import JobError, UsageError, in_brief
from autoaccum.window.job import Job, as_jobs

DEMO = "autoaccum.cli.demo:make_job"
CONFIGURATION = "hf:"  # before the path of a configuration file of Transformers


@dataclass(frozen=True)
class Source:
    """The place of a job: `file.py[:make_job]`, `package.module[:make_job]` or `hf:config.json`, with its arguments.

    settings: keyword arguments of the function, read as Python literals where they are some. argv: what the file sees as `sys.argv[1:]`.
    texts: the settings as they were written. Which of the two the function gets depends on what it takes.
    changes: of the job, once it is built (`tuner.changes`).
    """

    where: str
    settings: dict[str, Any] = field(default_factory=dict)
    argv: tuple[str, ...] = ()
    texts: dict[str, str] = field(default_factory=dict)
    changes: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The name of the job in reports: `"demo"` for the built-in job."""
        return "demo" if self.where == DEMO else self.where

    @property
    def parts(self) -> tuple[str, str]:
        """The file or module, and the name of the function in it."""
        if self.where.startswith(CONFIGURATION):
            return "autoaccum.integrations.config_job", "make_job"
        place, _, function = self.where.rpartition(":") if ":" in self.where else (self.where, "", "")
        return place, function or "make_job"

    def digest(self) -> str:
        """Hash of the file's text, 16 hex digits; "" for a module, whose file is not known before the import."""
        if self.where.startswith(CONFIGURATION):
            return hashlib.sha256(_configuration(self.where).read_bytes()).hexdigest()[:16]
        place, _ = self.parts
        return hashlib.sha256(Path(place).read_bytes()).hexdigest()[:16] if place.endswith(".py") else ""


def parse_source(where: str | None, settings: Iterable[str] = (), argv: Iterable[str] = ()) -> Source:
    """Parses JOB and the `name=value` texts of `--set` from the command line.

    where: JOB; None means the built-in demo.
    settings: the texts of `--set`. A value that is a Python literal becomes that literal; any other value stays text.
    Raises `UsageError` for an empty or missing file and for a setting without a name.
    """
    if where is not None and not where.strip():
        raise UsageError("JOB is empty: give file.py:make_job or package.module:make_job, or leave it out for the built-in demo")
    values: dict[str, Any] = {}
    texts: dict[str, str] = {}
    for text in settings:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"--set {text!r} is not name=value: write for instance --set layers=4")
        texts[name] = value
        try:
            values[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            values[name] = value
    if where is not None and where.startswith(CONFIGURATION):
        return Source(where, {**values, "config": str(_configuration(where))}, tuple(argv), texts)
    source = Source(DEMO if where in (None, "demo") else where, values, tuple(argv), texts)
    place, function = source.parts
    if not function.isidentifier():
        raise UsageError(f"{function!r} in JOB {where!r} is not the name of a function: write file.py:make_job")
    if place.endswith(".py"):
        if not os.path.isfile(place):
            raise UsageError(f"there is no file {in_brief(place)}: JOB is file.py:make_job or package.module:make_job")
    elif "/" in place or not all(part.isidentifier() for part in place.split(".")):
        raise UsageError(f"JOB {in_brief(place)} is neither a .py file nor a module's dotted name: write file.py:make_job or package.module:make_job")
    return source


def _configuration(where: str) -> Path:
    """The file that `hf:path` names. Raises `UsageError` if it is not there."""
    path = Path(where.removeprefix(CONFIGURATION))
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise UsageError(f"there is no file {in_brief(path)}: JOB is hf:path/to/config.json, a configuration file of Transformers, or its folder")
    return path


def load(where: Source | str, *, device: str | None = None) -> Job | Sequence[Job]:
    """Imports the file, calls its function and returns the `Job`, or the list of jobs that run in turn.

    device: the device for the jobs. A function with a parameter `device` gets it; otherwise model and optimizer are moved.
    Raises `UsageError` if there is no such module or function. Raises `JobError` if importing the file trains or ends the
    process, and if the function returns something else than a `Job`. Exceptions from the user's own code pass through unchanged.
    """
    origin = parse_source(where) if isinstance(where, str) else where
    place, name = origin.parts
    module = _imported(place, origin)
    make = getattr(module, name, None)
    if not callable(make):
        near = [attribute for attribute in vars(module) if callable(getattr(module, attribute)) and attribute.startswith("make")]
        hint = f"; it has {', '.join(near[:5])}" if near else f": add `def {name}(): return autoaccum.Job(model, optimizer, loss, batch)`"
        raise UsageError(f"{place} has no function {name}(){hint}")
    arguments = _arguments(make, name, origin, device)
    jobs: Job | Sequence[Job] = make(**arguments)
    if not isinstance(jobs, (Job, list, tuple)):
        raise JobError(f"{place}:{name}() returned {type(jobs).__name__}: return autoaccum.Job(model, optimizer, loss, batch)")
    for job in as_jobs(jobs):
        if device is not None and str(job.device) != device:
            job.moved(device)
    return jobs


def _arguments(make: Callable[..., Any], name: str, origin: Source, device: str | None) -> dict[str, Any]:
    parameters = inspect.signature(make).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for setting in origin.settings:
        if setting not in parameters and not takes_any:
            known = ", ".join(parameter for parameter in parameters if parameter != "device") or "none"
            raise UsageError(f"--set {setting}=...: {name}() has no parameter {setting!r}; its parameters are: {known}")
    for parameter in parameters.values():
        if (
            parameter.default is parameter.empty
            and parameter.name not in (*origin.settings, "device")
            and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        ):
            raise UsageError(f"{name}() needs a value for {parameter.name!r}: give --set {parameter.name}=VALUE")
    try:
        hints = get_type_hints(make)
    except Exception:  # annotations that name what is not there
        hints = {}
    arguments = {
        setting: _converted(setting, value, origin.texts.get(setting), hints.get(setting), parameters.get(setting))
        for setting, value in origin.settings.items()
    }
    if "device" in parameters and "device" not in arguments and device is not None:
        arguments["device"] = device
    return arguments


_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def _converted(name: str, value: Any, text: str | None, hint: Any, parameter: inspect.Parameter | None) -> Any:
    """A setting as the type that the function's annotation asks for, or else that of its default.

    value: the text as a literal, if it is one. text: None if the setting came from Python, which is left as it is.
    Raises `UsageError` if it cannot be converted.
    """
    if text is None:
        return value
    kinds = list(get_args(hint)) if get_origin(hint) in (Union, UnionType) else [] if hint is None else [hint]
    default = inspect.Parameter.empty if parameter is None else parameter.default
    if not kinds and default is not inspect.Parameter.empty and default is not None:
        kinds = [type(default)]
    word = text.strip().lower()
    if word in ("none", "null") and (not kinds or type(None) in kinds or default is None):
        return None
    if not kinds:
        return _WORDS[word] if word in ("true", "false") else value
    for kind in kinds:
        found = _as(kind, value, text, word)
        if found is not inspect.Parameter.empty:
            return found
    names = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds if kind is not type(None))
    raise UsageError(f"--set {name}={text}: {name} takes {names}, and {text!r} is none" + (": write true or false" if bool in kinds else ""))


def _as(kind: Any, value: Any, text: str, word: str) -> Any:
    """The setting as this kind; `Parameter.empty` if it is none."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is bool and word in _WORDS:
        return _WORDS[word]
    if kind is int and number and value == int(value):
        return int(value)
    if kind is float and (number or word in ("inf", "-inf", "nan")):
        return float(value)
    if kind is str:
        return value if isinstance(value, str) else text
    if isinstance(kind, type) and issubclass(kind, Path):
        return Path(text)
    if get_origin(kind) is Literal:
        return next((each for each in get_args(kind) if str(each) == text or each == value), inspect.Parameter.empty)
    container = get_origin(kind) or kind
    if container in (list, tuple) and isinstance(value, (list, tuple)):
        return container(value)
    if kind in (bool, int, float) or container in (list, tuple):
        return inspect.Parameter.empty
    return value if kind is Any or container not in (type(None),) else inspect.Parameter.empty


def _imported(place: str, origin: Source) -> ModuleType:
    before = sys.argv
    sys.argv = [place, *origin.argv]
    try:
        with _training_refused(place):
            if not place.endswith(".py"):
                sys.path.insert(0, "")
                return importlib.import_module(place)
            path = Path(place).resolve()
            sys.path.insert(0, str(path.parent))  # as `python file.py` does
            # The module gets a name that is free: a file called random.py must not replace the library.
            name = path.stem if path.stem not in sys.modules else f"autoaccum_job_{path.stem}"
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None and spec.loader is not None  # a .py path always has both
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            spec.loader.exec_module(module)
            return module
    except ModuleNotFoundError as error:
        if error.name and (place == error.name or place.startswith(error.name + ".")):
            raise UsageError(f"there is no module {in_brief(error.name)} here: JOB is file.py:make_job or package.module:make_job") from error
        raise
    except SystemExit as ended:
        raise JobError(
            f"{place} ended the process while it was imported (exit code {ended.code}), probably by reading the command line: "
            f'put that under `if __name__ == "__main__":`, give its arguments after `--`, '
            f"or let autoaccum run it as a command: autoaccum tune -b N -- python {place} ..."
        ) from ended
    finally:
        sys.argv = before


@contextmanager
def _training_refused(place: str) -> Any:
    """Context that raises `JobError` if an optimizer steps during the import: such a file would train once per trial."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    def refuse(*_: Any) -> None:
        raise JobError(
            f'{place} trains when it is imported: put the training under `if __name__ == "__main__":`, '
            f"or let autoaccum run it as a command: autoaccum tune -b N -- python {place} --batch-size {{micro_batch}} ..."
        )

    hook = register_optimizer_step_pre_hook(refuse)
    try:
        yield
    finally:
        hook.remove()
