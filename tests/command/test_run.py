"""Nothing of a command outlives the trial, however it ends; and what a run tells of the command."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from autoaccum.command.run import run, trial_folder
from tests.command_line import ROOT, wait_until

# A child in a session of its own, as launchers start them, and a grandchild that ignores SIGTERM. Both write their process's number.
LEAVES = """
import os, signal, subprocess, sys, time
child = "import os, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)"
for name in ("one", "two"):
    subprocess.Popen([sys.executable, "-c", child, os.path.join(sys.argv[1], name)], start_new_session=name == "one", stdout=subprocess.DEVNULL)
while not all(os.path.exists(os.path.join(sys.argv[1], name)) and os.path.getsize(os.path.join(sys.argv[1], name)) for name in ("one", "two")):
    time.sleep(0.01)
print("STARTED", flush=True)
if sys.argv[2] == "wait":
    time.sleep(600)
"""


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def left_by(folder):
    return [pid for pid in (int((folder / name).read_text()) for name in ("one", "two")) if is_alive(pid)]


def a_run(words, **given):
    with trial_folder() as folder:
        settings = {"environment": {}, "data_bytes": None, "most_bytes": None, "timeout_s": None, "trial_s": None, "on_output": lambda text: None, **given}
        return run([word.replace("{scratch}", str(folder / "scratch")) for word in words], folder, **settings)


@pytest.mark.parametrize("how", ["ends", "timeout"])
def test_children_are_ended_with_the_command(tmp_path, how):
    (tmp_path / "leaves.py").write_text(LEAVES)
    words = [sys.executable, str(tmp_path / "leaves.py"), str(tmp_path), "end" if how == "ends" else "wait"]
    found = a_run(words, timeout_s=None if how == "ends" else 3.0)
    assert (found.code, found.ended_for) == ((0, "") if how == "ends" else (None, "timeout"))
    assert not left_by(tmp_path)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGQUIT", "SIGKILL", "SIGINT"])
def test_children_are_ended_when_autoaccum_is(tmp_path, name):
    (tmp_path / "leaves.py").write_text(LEAVES)
    words = [sys.executable, str(tmp_path / "leaves.py"), str(tmp_path), "wait", "{micro_batch}"]
    (tmp_path / "temporary").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "temporary")}
    tune = [sys.executable, "-m", "autoaccum", "tune", "-b", "8", "-d", "cpu", "--", *words]

    def heeds():  # a run of the tests under nohup ignores some
        if name != "SIGKILL":
            signal.signal(getattr(signal, name), signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)

    tuning = subprocess.Popen(tune, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=heeds)
    while "STARTED" not in (line := tuning.stderr.readline()):
        assert line, "the command never started"
    tuning.send_signal(getattr(signal, name))
    assert tuning.wait(20) != 0
    wait_until(lambda: not left_by(tmp_path), seconds=10)
    wait_until(lambda: not list((tmp_path / "temporary").iterdir()), seconds=10)


def test_a_command_that_takes_too_much_is_ended_and_did_not_meet_a_limit_of_its_own(tmp_path):
    """Else it could go on with a smaller batch by itself, and exit with 0."""
    path = tmp_path / "grows.py"
    path.write_text(
        "import time\nheld = []\ntry:\n    while True:\n        held.append(b'x' * 2**22); time.sleep(0.005)\nexcept MemoryError:\n    print('CAUGHT', flush=True)\n"
    )
    found = a_run([sys.executable, str(path)], most_bytes=100 * 2**20, data_bytes=2**33)
    assert found.ended_for == "memory" and "CAUGHT" not in found.output and found.peak_bytes > 100 * 2**20


def test_training_is_seen_and_ended_after_its_seconds(tmp_path):
    path = tmp_path / "train.py"
    path.write_text(
        "import torch, time\np = torch.nn.Parameter(torch.ones(1)); o = torch.optim.SGD([p], lr=0.1)\n"
        "while True:\n    p.sum().backward(); o.step(); time.sleep(0.01)\n"
    )
    found = a_run([sys.executable, str(path)], trial_s=0.5, timeout_s=60)
    assert found.ended_for == "trained" and found.evidence.shows_steps and found.evidence.steps >= 1
    found = a_run(["sleep", "600"], trial_s=0.5, timeout_s=60)
    assert found.ended_for == "trained" and not found.evidence.shows_steps  # not torch: counted from the start


def test_the_users_own_sitecustomize_still_runs(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import builtins\nbuiltins.of_the_user = 7\n")
    words = [sys.executable, "-c", "import sys; print(of_the_user, sys.modules['sitecustomize'].__file__)"]
    with trial_folder() as folder:
        os.environ["PYTHONPATH"], before = str(tmp_path), os.environ.get("PYTHONPATH")
        try:
            found = run(
                words, folder, environment={}, data_bytes=None, most_bytes=None, timeout_s=None, trial_s=None, on_output=lambda text: None
            )  # fmt: skip
        finally:
            os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    assert found.output.split() == ["7", str(tmp_path / "sitecustomize.py")]


def test_a_trial_leaves_no_folder_behind(tmp_path):
    found = a_run([sys.executable, "-c", "import os, sys, tempfile; print(sys.argv[1], tempfile.gettempdir()); open(sys.argv[1] + '/x', 'w')", "{scratch}"])
    scratch, temporary = found.output.split()
    assert scratch == temporary and not os.path.exists(scratch)
