"""What the pages in `docs/` show is true: their code runs as it stands, and prints what is shown."""

import os
import re
import runpy
import subprocess
import sys

import pytest

import autoaccum
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


def test_every_public_name_is_in_the_api_page_and_every_page_in_the_site():
    api = (ROOT / "docs/api.md").read_text()
    for name in autoaccum.__all__:
        assert name == "__version__" or f"::: autoaccum.{name}\n" in api + "\n", name
    pages = re.findall(r"[:-] (\w+\.md)$", (ROOT / "site/mkdocs.yml").read_text(), re.M)
    assert sorted(pages) == [page.name for page in PAGES]


def test_the_page_of_all_options_is_what_help_says():
    """After a change of an option: python site/options.py"""
    assert runpy.run_path(str(ROOT / "site/options.py"))["page"]() == (ROOT / "docs/options.md").read_text()


def test_the_site_is_built_without_a_warning(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-f", ROOT / "site/mkdocs.yml", "-d", tmp_path / "site"],
        capture_output=True, text=True, check=False, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "autoaccum.tune" in (tmp_path / "site/api/index.html").read_text()
    assert 'src="../pictures/window.png"' in (tmp_path / "site/simulated_cards/index.html").read_text()


def test_the_skill_names_options_fields_and_exit_codes_that_exist():
    skill = (ROOT / "skills/autoaccum/SKILL.md").read_text()
    assert len(skill.splitlines()) <= 45
    helps = "".join(autoaccum_help(name) for name in ("tune", "check", "estimate"))
    for flag in set(re.findall(r"(--[a-z][a-z-]+)", skill)) - {"--batch-size", "--accum", "--max-steps"}:
        assert flag in helps, flag
    fields = set(autoaccum.Plan.__dataclass_fields__) | {"fits", "peak_interval_bytes", "gpus", "what_if"}
    for field in ("micro_batch", "accumulation_steps", "micro_batches", "peak_bytes", "budget_bytes", "warnings"):
        assert field in fields and field in skill
    codes = re.search(
        r"0 done, 2 wrong usage or bad input, 3 does not fit, 4 device trouble, 5 the job itself failed, 130 interrupted", " ".join(helps.split())
    )
    assert codes is not None and "0 done · 2 wrong usage or bad input · 3 does not fit · 4 device trouble · 5 the job itself failed · 130 interrupted" in skill


def autoaccum_help(name):
    return subprocess.run([sys.executable, "-m", "autoaccum", name, "--help"], capture_output=True, text=True, check=True).stdout
