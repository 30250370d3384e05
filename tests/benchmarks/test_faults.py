"""A sample of the injected faults: the benchmark runs thousands."""

import json
import subprocess
import sys

from tests.command_line import ROOT


def test_a_sample_of_faults_leaves_no_violation():
    counts = ("--tunes", "10", "--windows", "15", "--files", "200", "--options", "30", "--ranks", "2")
    finished = subprocess.run([sys.executable, "benchmarks/faults.py", *counts], capture_output=True, text=True, cwd=ROOT, timeout=300, check=False)
    found = json.loads(finished.stdout[finished.stdout.index("{\n") :])
    assert finished.returncode == 0, finished.stderr
    assert [found[part]["violations"] for part in ("tunes", "windows", "files", "options", "ranks")] == [0, 0, 0, 0, 0]
    assert found["windows"]["injected"] > 0 and found["tunes"]["injected"] > 0 and found["ranks"]["injected"] == 2
