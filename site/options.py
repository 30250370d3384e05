"""Writes docs/options.md: what `--help` of every command says.

python site/options.py
"""

from pathlib import Path

import click
from click.testing import CliRunner

from autoaccum.cli.commands import cli

PAGE = Path(__file__).resolve().parent.parent / "docs" / "options.md"


def commands(group: click.Group, before: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The words of every command, in alphabetical order; those of a group follow its name."""
    found = []
    for name, command in sorted(group.commands.items()):
        words = (*before, name)
        found += commands(command, words) if isinstance(command, click.Group) else [words]
    return found


def page() -> str:
    """The whole page."""
    parts = [
        "# All options\n\nWhat `--help` says, of every command. This page is generated (`python site/options.py`); "
        "[the command line](command_line.md) explains.\n"
    ]
    for words in commands(cli):
        told = CliRunner().invoke(cli, [*words, "--help"], prog_name="autoaccum", terminal_width=100).output
        parts.append(f"## {' '.join(words)}\n\n```text\n{told.strip()}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
