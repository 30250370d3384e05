"""What README and pages show is true: commands run, outputs are real, code works."""

import json
import re
import shlex
import subprocess
import sys

import pytest

from autoaccum.simulate import profiles
from tests.command_line import ROOT, autoaccum

README = (ROOT / "README.md").read_text()
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXT = README + "".join(page.read_text() for page in PAGES)


def blocks(kind):
    """The blocks of README and pages; a page's own code is run by `test_docs.py`."""
    return re.findall(rf"```{kind}\n(.*?)```", README if kind in ("python", "sh") else TEXT, re.S)


def skeleton(text):
    """Text without what differs between machines and runs: sizes, times, counts of trials, the processor's name."""
    text = re.sub(r" on cpu, .*", " on cpu, NAME", text.rstrip())
    text = re.sub(r"\d+ trials?, [\d.]+ s", "N trials, N s", text)
    text = re.sub(r"ran out( in \w+)?|took [\d.]+ \w+", "REFUSED", text)
    return re.sub(r"\b\d+(\.\d+)?(?= (of|left|limit|headroom|MiB|KiB|over)\b)|\(\d+ left\)|^\d+ = |(?<=[=-] )\d+", "N", text, flags=re.M)


@pytest.mark.parametrize("block", blocks("console"), ids=lambda block: block[2:40])
def test_a_command_prints_what_is_shown(block):
    command, _, shown = block.partition("\n")
    words = shlex.split(command.removeprefix("$ "))
    assert words[0] == "autoaccum"
    words = [sys.executable if word == "python" else word for word in words[1:]]
    finished = autoaccum(*words)
    printed = finished.stdout if finished.returncode == 0 else finished.stderr.splitlines()[-1]
    if shown.endswith("...\n"):  # the first lines of it
        shown = shown.removesuffix("...\n")
        printed = "".join(printed.splitlines(keepends=True)[: shown.count("\n")])
    assert skeleton(printed) == skeleton(shown)
    assert printed.split("     ")[0].split(";")[0] == shown.split("     ")[0].split(";")[0].rstrip(), "the plan itself is the same"


@pytest.mark.parametrize("block", blocks("python"))
def test_code_runs_as_it_stands(block, tmp_path):
    script = tmp_path / "readme.py"
    script.write_text(block)
    finished = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert finished.stdout.startswith("120 = 40 x 3 ")


def test_the_two_commands_are_those_of_the_makefile():
    commands = [line.split("#")[0].strip() for line in blocks("sh")[0].splitlines()]
    assert commands == ["make tune", "make test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{command.split()[1]}:" in makefile for command in commands)
    assert (ROOT / ".ci/run").read_text().rstrip().endswith("exec make test")


def test_every_command_and_file_that_is_named_exists():
    listed = autoaccum("--help").stdout
    for name in re.findall(r"`autoaccum (\w+)[ `]", TEXT):
        assert f"\n  {name} " in listed
    for path in re.findall(r"`((?:benchmarks|examples|tests)/[\w./]+)`", TEXT):
        assert (ROOT / path).exists(), path


def test_every_flag_that_is_named_exists():
    known = (
        "".join(autoaccum(name, "--help").stdout for name in ("tune", "check", "train", "estimate", "fleet", "selfcheck"))
        + " --batch-size --accum --max-steps --nnodes --max-restarts --nproc-per-node --multi_gpu --num_processes --signal --requeue --card"
    )
    for flag in set(re.findall(r"--[a-z][a-z-]+", TEXT)):
        assert flag in known, flag


def test_the_loops_figures_are_those_of_the_committed_run(monkeypatch):
    # A test that loads a job of tests/ puts that folder first, where another `loop` is.
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delitem(sys.modules, "loop", raising=False)
    import loop

    document = json.loads((ROOT / "benchmarks/results/loop.json").read_text())
    assert loop.table(document) in TEXT


def test_the_simulations_figures_are_those_of_the_committed_run():
    import estimate_published

    document = json.loads((ROOT / "benchmarks/results/estimate_published.json").read_text())
    assert estimate_published.table(document) in TEXT
    assert f"all {len(profiles.names())} cards" in TEXT


def test_what_became_of_the_longest_sample_is_of_the_committed_run():
    import longest_sample

    document = json.loads((ROOT / "benchmarks/results/longest_sample.json").read_text())
    assert longest_sample.table(document) in TEXT
    assert f"Lightning {document['machine']['lightning']}, Transformers {document['machine']['transformers']}" in TEXT


def test_pictures_that_are_shown_are_there():
    found = [path for page in PAGES for path in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page.read_text())]
    assert found
    for path in found:
        assert (ROOT / "docs" / path).read_bytes()[:4] == b"\x89PNG"


def test_the_figures_of_several_ranks_are_those_of_the_committed_runs():
    ranks = json.loads((ROOT / "benchmarks/results/ranks.json").read_text())
    wait = f"{ranks['planned']['largest_wait_share']:.1%}"
    assert f"a window takes {ranks['planned_over_even']:.2f} of the even split's time" in TEXT and f"waits longest waits {wait} of it" in TEXT
    fleets = json.loads((ROOT / "benchmarks/results/fleets.json").read_text())
    took = {row["ranks"]: f"{row['median_seconds'] * 1000:.0f} ms" for row in fleets["solve"]}
    assert f"10,000 ranks of 64 kinds are shared out in {took[10_000]}, 100,000 in {took[100_000]}" in TEXT
    assert f"are {fleets['against_proportional']['proportional_over_exact_mean']:.2f} times as slow" in TEXT


def test_the_readme_is_short_and_pages_are_pages():
    words = len(README.split())
    assert 600 <= words <= 900 and README.count("<!-- table:") == 1, words
    assert 12 <= len(PAGES) <= 18
    for page in PAGES:
        assert page.read_text().startswith("# ") and f"docs/{page.name}" in README, page.name
