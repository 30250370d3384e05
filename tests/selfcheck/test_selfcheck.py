"""The self-check runs through, goes on where it stopped, and says in plain words what it found."""

import contextlib
import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from autoaccum.errors import UsageError
from autoaccum.selfcheck import measurements, run
from autoaccum.selfcheck.verdict import Measured, SelfCheck
from tests.command_line import ROOT, autoaccum

MACHINE = {"card": "Tesla T4", "driver": "550.54", "torch": "2.11.0+cu130", "autoaccum": "0.1.0"}


def measured(outcome="good", said="all is well"):
    return Measured(outcome, said, 1.0, {})


def test_it_runs_through_without_a_card_and_goes_on_where_it_stopped(tmp_path):
    output = tmp_path / "selfcheck.json"
    words = ("selfcheck", "--tried-out", "-d", "cpu", "-o", output, "--json")
    begun, second = json.loads(autoaccum(*words, "--minutes", 0.001).stdout), autoaccum(*words)
    whole = json.loads(second.stdout)
    assert list(begun["measurements"]) == ["profile"] and begun["missing"] == list(run.NAMES[1:])
    assert whole["measurements"]["profile"] == begun["measurements"]["profile"] and "measured: profile" not in second.stderr
    assert tuple(whole["measurements"]) == run.NAMES == tuple(measurements.MEASUREMENTS) and not whole["missing"]
    assert json.loads(output.read_text()) == whole
    # The document is what was promised.
    assert set(whole) == {"schema", "machine", "tried_out", "is_good", "measurements", "missing"} and whole["schema"] == "autoaccum.selfcheck/1"
    assert {"card", "driver", "torch", "cuda", "python", "autoaccum"} == set(whole["machine"]) and whole["tried_out"]
    for each in whole["measurements"].values():
        assert set(each) == {"outcome", "said", "seconds", "figures"} and each["outcome"] in ("good", "off", "told"), each
    # What does not depend on a card is good here too.
    for name in ("exact", "windows", "rescue"):
        assert whole["measurements"][name]["outcome"] == "good", whole["measurements"][name]


def test_a_file_of_another_machine_or_of_something_else_is_refused(tmp_path):
    document = SelfCheck(MACHINE, True, {"exact": measured()}, ()).as_dict()
    for name, text, sentence in (
        ("other.json", json.dumps(document), "is of another machine"),
        ("plan.json", '{"schema": "autoaccum.plan/1"}', "is no self-check"),
        ("cut.json", json.dumps(document)[:100], "cannot be read"),
    ):
        (tmp_path / name).write_text(text)
        finished = autoaccum("selfcheck", "--tried-out", "-d", "cpu", "-o", tmp_path / name)
        assert finished.returncode == 2 and sentence in finished.stderr and len(finished.stderr.splitlines()) == 1
        assert (tmp_path / name).read_text() == text


def test_without_a_card_it_says_so(tmp_path):
    for device in ("cuda:0", "cpu"):
        finished = autoaccum("selfcheck", "-d", device, "-o", tmp_path / "out.json")
        assert finished.returncode == 4 and "selfcheck looks at a CUDA card" in finished.stderr and not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    "outcomes, missing, last, code",
    [
        ({"exact": "good", "loop": "told"}, (), "This card does what autoaccum says of it.", True),
        ({"exact": "good", "peaks": "off"}, (), "Something is off: please attach the JSON to a report.", False),
        ({"exact": "failed"}, (), "Something is off: please attach the JSON to a report.", False),
        ({"exact": "good"}, ("peaks",), "-       peaks     not measured yet: start again, and it goes on from here", False),
    ],
)
def test_the_verdict_is_one_screen_in_plain_words(outcomes, missing, last, code):
    found = SelfCheck(MACHINE, False, {name: measured(outcome) for name, outcome in outcomes.items()}, missing)
    lines = found.explain().splitlines()
    assert lines[0] == "Tesla T4, driver 550.54, torch 2.11.0+cu130, autoaccum 0.1.0" and lines[-1] == last and found.is_good is code
    assert SelfCheck.from_dict(json.loads(json.dumps(found.as_dict())), where="here") == found


@pytest.mark.parametrize("document", [[], {"schema": "autoaccum.selfcheck/1"}, {"schema": "autoaccum.selfcheck/1", "measurements": {"x": {"outcome": "fine"}}}])
def test_what_is_no_self_check_is_refused_in_a_sentence(document):
    with pytest.raises(UsageError, match="here is no self-check"):
        SelfCheck.from_dict(document, where="here")


def test_the_notebook_runs_up_to_the_card(tmp_path, monkeypatch):
    """What it installs is here, and nvidia-smi comes with a card; the rest runs, and says where it ends without one."""
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((ROOT / "notebooks" / "t4.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert cells[0] == "%pip install -q autoaccum" and cells[1].startswith("!nvidia-smi ") and len(cells) == 4
    program, *words = shlex.split(cells[2].removeprefix("!"))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run([program, *words], capture_output=True, text=True, check=False, env={**os.environ, "PATH": path})
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(cells[3], "cell", "exec"), {})
    if done.returncode == 4:  # no card
        assert "selfcheck looks at a CUDA card" in done.stderr and said.getvalue().startswith("no card was found")
    else:
        assert json.loads(said.getvalue())["schema"] == "autoaccum.selfcheck/1"
