"""The quickstart notebook runs from its first cell to its last, and shows what its text promises."""

import json
import re
from pathlib import Path

from tests import forked
from tests.command_line import ROOT

RUN = """
import os, shlex, subprocess, sys
def shell(line):
    words = shlex.split(line)
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    print(subprocess.run(words, capture_output=True, text=True, check=True, env={**os.environ, "PATH": path}).stdout)
"""


def test_the_quickstart_runs_and_is_exact(tmp_path):
    cells = [cell for cell in json.loads((ROOT / "notebooks/quickstart.ipynb").read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)  # what it prints is of the reader's machine
    sources = ["".join(cell["source"]) for cell in cells]
    assert sources[0] == "%pip install -q autoaccum"
    done = forked.run(RUN + "\n".join(map(in_plain_python, sources[1:])), cwd=tmp_path, env={"HOME": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("6 optimizer steps of 1000 samples") == 2
    exact, by_hand = re.search(r"autoaccum: (\S+), by hand: (\S+)", done.stdout).groups()
    assert float(exact) < 1e-14 and float(by_hand) > 0.05
    assert re.search(r"^t4 .* 1000 x 1 ", done.stdout, re.M) and Path(tmp_path / "job.py").exists()


def in_plain_python(cell):
    """What IPython makes of the cell's `%%writefile` and `!`."""
    if cell.startswith("%%writefile "):
        first, _, text = cell.partition("\n")
        return f"open({first.split()[1]!r}, 'w').write({text!r})"
    return re.sub(r"^!(.*)$", lambda found: f"shell({found[1]!r})", cell, flags=re.M)
