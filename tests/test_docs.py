"""What the pages in `docs/` show is true: their code runs as it stands, and prints what is shown."""

import re
import subprocess
import sys

import pytest

from tests.command_line import ROOT

PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCKS = [
    pytest.param(code, shown, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, (code, shown) in enumerate(re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", page.read_text(), re.S))
]


@pytest.mark.parametrize(("code", "shown"), BLOCKS)
def test_code_runs_as_it_stands_and_prints_what_is_shown(code, shown, tmp_path):
    script = tmp_path / "page.py"
    script.write_text(code)
    finished = subprocess.run([sys.executable, "-W", "error::UserWarning", script], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith(shown.rstrip())


def test_every_link_leads_somewhere():
    for page in (*PAGES, ROOT / "README.md"):
        for target in re.findall(r"\]\(([^)#]+)[)#]", re.sub(r"```.*?```", "", page.read_text(), flags=re.S)):
            assert target.startswith("https://") or (page.parent / target).exists(), (page.name, target)


def test_the_sentences_that_are_explained_are_those_that_are_said():
    source = "".join(path.read_text() for path in sorted((ROOT / "autoaccum").rglob("*.py")))
    source = re.sub(r'"\n\s*f?"', "", source)  # a sentence over several lines
    page = (ROOT / "docs/troubleshooting.md").read_text()
    quoted = re.findall(r'\*\*"(.*?)"', page)
    assert len(quoted) > 10
    for sentence in quoted:
        pieces = [piece.strip(" :;,") for piece in re.split(r"\.\.\.|\d+(?: MiB| x \d+)?|\b(?:samples?|forward)\b", sentence)]
        long = [piece for piece in pieces if len(piece.split()) > 2 or len(piece) > 12]
        assert long, sentence
        for piece in long:
            assert piece in source, (sentence, piece)
