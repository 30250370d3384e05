"""`Template`: a command with placeholders, which each trial fills in."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from autoaccum.command.config_copies import ConfigCopy
from autoaccum.errors import UsageError

PLACEHOLDERS = ("micro_batch", "accumulation_steps", "accumulation_steps_of_all", "scratch")


@dataclass(frozen=True)
class Template:
    """A command with the placeholder `{micro_batch}`, and, where they are wanted, `{accumulation_steps}` and `{scratch}`.

    copies: configuration files with placeholders in some of their values; a trial gets a copy of its own, whose path replaces the file's.
    Raises `UsageError` if `{micro_batch}` is nowhere, if a placeholder is unknown, and if a configuration file is not among the words.
    """

    words: tuple[str, ...]
    copies: tuple[ConfigCopy, ...] = ()

    def __post_init__(self) -> None:
        if not any("{micro_batch}" in text for text in self._texts()):
            raise UsageError(
                f"the command {shlex.join(self.words)!r} has no {{micro_batch}} in it: write it where the script takes its batch size, "
                "for instance -- python train.py --batch-size {micro_batch} --accum {accumulation_steps}"
            )
        for text in self._texts():
            for name in re.findall(r"\{(\w*(?:batch|accum|scratch)\w*)\}", text):
                if name not in PLACEHOLDERS:
                    raise UsageError(f"{{{name}}} in the command is not a placeholder of ours: write {', '.join(f'{{{each}}}' for each in PLACEHOLDERS)}")
        for copy in self.copies:
            if not any(copy.path in word for word in self.words):
                raise UsageError(
                    f"--set-file names {copy.path!r}, and the command does not: write the file's path into the command as in --set-file, "
                    "where each trial puts that of its copy"
                )

    def _texts(self) -> list[str]:
        return [*self.words, *(value for copy in self.copies for _, value in copy.values)]

    @property
    def accumulates(self) -> bool:
        """True if the command is told its accumulation steps."""
        return any("{accumulation_steps}" in text or "{accumulation_steps_of_all}" in text for text in self._texts())

    @property
    def has_scratch(self) -> bool:
        """True if the command has the placeholder `{scratch}`."""
        return any("{scratch}" in text for text in self._texts())

    def filled(self, micro_batch: int, accumulation_steps: int, scratch: str, folder: Path | None = None, *, world: int = 1) -> list[str]:
        """The words of the command with these numbers in place of the placeholders. Other braces do not change.

        scratch: the path of the trial's own folder. folder: where copies of configuration files are written. world: the ranks, whose steps
        together some scripts want.
        """
        steps = {"{accumulation_steps}": str(accumulation_steps), "{accumulation_steps_of_all}": str(accumulation_steps * world)}
        fields = {"{micro_batch}": str(micro_batch), **steps, "{scratch}": scratch}
        words = list(self.words)
        for number, copy in enumerate(self.copies):
            assert folder is not None
            written = copy.written(fields, folder / str(number))
            words = [word.replace(copy.path, str(written)) for word in words]
        return [fill(word, fields) for word in words]

    def __str__(self) -> str:
        return shlex.join(self.words)


def fill(text: str, fields: dict[str, str]) -> str:
    """`text` with every placeholder in `fields` replaced by its value."""
    for name, value in fields.items():
        text = text.replace(name, value)
    return text


def launched_ranks(words: Sequence[str]) -> int | None:
    """The number of ranks that a launcher in front is told to start, all nodes together; None if the words do not say it.

    torchrun, torch.distributed.run and launch, accelerate launch, deepspeed, mpirun and srun are read. What cannot be read here is seen
    when the command runs.
    """
    names = [Path(word).name for word in words]
    for kind, per_node, nodes in _LAUNCHERS:
        if not all(word in names for word in kind.split()):
            continue
        of_node, of_nodes = _number(words, per_node), _number(words, nodes) if nodes else 1
        if of_node is not None:
            return of_node * (of_nodes or 1)
    return None


# Words by which a launcher is known, the options that give ranks (per node), and those that give nodes.
_LAUNCHERS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("torchrun", ("--nproc-per-node", "--nproc_per_node"), ("--nnodes",)),
    ("torch.distributed.run", ("--nproc-per-node", "--nproc_per_node"), ("--nnodes",)),
    ("torch.distributed.launch", ("--nproc-per-node", "--nproc_per_node"), ("--nnodes",)),
    ("accelerate launch", ("--num_processes", "--num-processes"), ()),
    ("deepspeed", ("--num_gpus",), ("--num_nodes",)),
    ("mpirun", ("-np", "-n"), ()),
    ("mpiexec", ("-n", "-np"), ()),
    ("srun", ("-n", "--ntasks"), ()),
)


def _number(words: Sequence[str], options: Sequence[str]) -> int | None:
    for word, following in zip(words, [*words[1:], ""]):
        name, has_value, value = word.partition("=")
        if name in options and (given := value if has_value else following).isdigit():
            return int(given)
    return None
