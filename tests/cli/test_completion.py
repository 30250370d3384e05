"""What a shell offers where a command line is begun."""

import os
import subprocess
import sys

import pytest

from tests.command_line import ROOT


def offered(words, at):
    env = {**os.environ, "COMP_WORDS": words, "COMP_CWORD": str(at), "_AUTOACCUM_COMPLETE": "bash_complete"}
    program = "import sys; sys.argv[0] = 'autoaccum'; from autoaccum.cli import main; main()"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=env, check=True).stdout
    return [line.partition(",")[2] for line in told.splitlines()]


@pytest.mark.parametrize(
    ("words", "at", "found"),
    [
        ("autoaccum es", 1, "estimate"),
        ("autoaccum tune --target-b", 2, "--target-batch"),
        ("autoaccum estimate -g rtx-40", 3, "rtx-4090"),
        ("autoaccum estimate -g t4,rtx-40", 3, "t4,rtx-4090"),
    ],
)
def test_commands_options_and_cards_are_completed(words, at, found):
    assert found in offered(words, at)


def test_the_script_for_a_shell_is_what_the_page_names():
    env = {**os.environ, "_AUTOACCUM_COMPLETE": "bash_source"}
    told = subprocess.run([os.path.join(os.path.dirname(sys.executable), "autoaccum")], capture_output=True, text=True, env=env, check=True).stdout
    assert "complete -o nosort -F _autoaccum_completion autoaccum" in told
    assert "_AUTOACCUM_COMPLETE=bash_source autoaccum" in (ROOT / "docs/command_line.md").read_text()
