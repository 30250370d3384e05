"""Trials in a process of their own: what kills, hangs or garbles it is an outcome or a sentence, never the end."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

import autoaccum
from autoaccum.probe import request
from autoaccum.tuner import job_file
from autoaccum.window.source import Source
from tests.command_line import ROOT, document, wait_until
from tests.command_line import autoaccum as run

JOBS = ROOT / "tests/jobs.py"


def tune(function, target=120, **given):
    settings = given.pop("settings", {})
    said = []
    wish = request.Request(target, **given)
    return job_file.tune_source(Source(f"{JOBS}:{function}", settings), wish, device="cpu", on_output=said.append), "".join(said)


def test_a_child_that_is_killed_is_an_outcome_and_the_search_goes_on_below():
    plan, _ = tune("killed_above", target=60)
    assert plan.micro_batch == 30
    refused = [each for each in plan.trials if each.outcome == "killed"]
    assert plan.smallest_refused == min(each.micro_batch for each in refused)
    assert all(each.phase == "forward" and each.peak_bytes is None for each in refused)


def test_a_trial_that_hangs_is_ended_and_counts_as_not_fitting():
    plan, _ = tune("hangs_above", target=60, timeout_s=1.5)
    assert plan.micro_batch == 30
    assert {each.outcome for each in plan.trials if each.micro_batch > 30} == {"timeout"}


def test_a_job_that_ends_the_process_is_told_where():
    with pytest.raises(autoaccum.JobFailed, match=r"ended the process \(exit code 3\) in forward, at a micro-batch of 1"):
        tune("exits")


def test_a_failure_at_build_comes_with_the_users_frames():
    with pytest.raises(autoaccum.JobFailed, match="the checkpoint is corrupt") as raised:
        tune("fails_at_build")
    assert raised.value.kind == "RuntimeError"
    assert "fails_at_build" in raised.value.text and "importlib" not in raised.value.text and "worker.py" not in raised.value.text
    assert "worker.py" in raised.value.whole


def test_a_failure_above_a_size_says_which_sizes_had_worked():
    with pytest.raises(autoaccum.JobFailed, match="cannot take more than 8") as raised:
        tune("fails_above")
    assert "raised in forward, at a micro-batch of" in str(raised.value) and "sizes that had worked: 1" in str(raised.value)


def test_what_the_job_prints_is_talk_and_not_the_answer():
    finished = run("tune", f"{JOBS}:chatty", "-b", 12, "--json", "-d", "cpu")
    assert finished.returncode == 0 and document(finished)["target_batch"] == 12
    assert len(finished.stderr) > 3 * 2**20 and "straight to descriptor 1" in finished.stderr


def test_a_file_that_trains_when_imported_is_told_to_guard_it(tmp_path):
    script = tmp_path / "trains.py"
    script.write_text("import torch\np = torch.nn.Parameter(torch.ones(1))\no = torch.optim.SGD([p], lr=1.0)\n(p * 2).sum().backward()\no.step()\n")
    finished = run("tune", script, "-b", 12)
    assert finished.returncode == 5 and "trains when it is imported" in finished.stderr and "Traceback" not in finished.stderr


def test_a_file_that_reads_the_command_line_when_imported_is_told_what_to_do(tmp_path):
    script = tmp_path / "parses.py"
    script.write_text("import argparse\np = argparse.ArgumentParser()\np.add_argument('--data', required=True)\np.parse_args()\ndef make_job(): ...\n")
    finished = run("tune", script, "-b", 12)
    assert finished.returncode == 5 and "ended the process while it was imported" in finished.stderr and "after `--`" in finished.stderr


def test_a_file_gets_the_arguments_after_the_dashes_as_its_own():
    assert run("tune", f"{JOBS}:reads_argv", "-b", 12, "-d", "cpu", "--", "--epochs", 3).returncode == 0
    assert run("tune", f"{JOBS}:reads_argv", "-b", 12, "-d", "cpu").returncode == 5


def test_a_file_that_fails_at_import_shows_its_own_line_and_with_traceback_all(tmp_path):
    script = tmp_path / "broken.py"
    script.write_text("import math\nvalue = math.sqrt(-1)\n")
    finished = run("tune", script, "-b", 12)
    assert finished.returncode == 5 and "line 2" in finished.stderr and "worker.py" not in finished.stderr
    assert finished.stderr.strip().splitlines()[-1].startswith("autoaccum: ValueError:")
    assert "worker.py" in run("tune", script, "-b", 12, "--traceback").stderr


def test_a_file_named_like_a_library_does_not_replace_it(tmp_path):
    script = tmp_path / "random.py"
    script.write_text((ROOT / "autoaccum/cli/demo.py").read_text())
    assert run("tune", script, "-b", 12, "-d", "cpu").returncode == 0


def test_a_process_that_the_job_forked_does_not_keep_a_killed_child_alive():
    plan, _ = tune("forks_and_is_killed_above", target=60)
    assert plan.micro_batch == 30 and plan.seconds < 60


def test_a_job_that_cannot_be_built_leaves_no_process_and_no_descriptor():
    me = psutil.Process()
    with pytest.raises(autoaccum.JobFailed):
        tune("fails_at_build")
    children, descriptors = len(me.children(recursive=True)), me.num_fds()
    for _ in range(2):
        with pytest.raises(autoaccum.JobFailed):
            tune("fails_at_build")
    assert (len(me.children(recursive=True)), me.num_fds()) == (children, descriptors)


def children_of(pid):
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


@pytest.fixture
def hanging(tmp_path):
    """`autoaccum tune` in the middle of a trial that never ends, and its child."""
    marker = tmp_path / "in the trial"
    command = [sys.executable, "-m", "autoaccum", "tune", f"{JOBS}:hangs_with_a_marker", "--set", f"marker={str(marker)!r}", "-b", "12", "-d", "cpu", "--json"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(marker.exists)
        yield process, children_of(process.pid)
    finally:
        process.kill()
        process.communicate()


def test_ctrl_c_ends_the_child_too_and_is_exit_130(hanging):
    process, children = hanging
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in stderr and "Traceback" not in stderr
    wait_until(lambda: not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in children))


def test_a_parent_that_is_killed_leaves_no_child_behind(hanging):
    process, children = hanging
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    wait_until(lambda: not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in children))


def test_the_parent_never_imports_torch():
    code = (
        "import json, sys\n"
        "from autoaccum.probe.request import Request; from autoaccum.tuner.job_file import tune_source\n"
        "plan = tune_source(None, Request(120), device='cpu')\n"
        "print(json.dumps([plan.effective_batch, 'torch' in sys.modules]))"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(ROOT))
    assert json.loads(finished.stdout) == [120, False]


ONE_AT_A_TIME = """
import fcntl, os, time
import torch, autoaccum

def make_job(where, at_once):
    open(f"{where}/built-{os.getpid()}", "w").close()

    def loss(model, batch):
        while not at_once and len(os.listdir(where)) < 4:  # until the other process has tried to build it: the job, the lock, two builds
            time.sleep(0.01)
        return model(batch[0]).square().mean()

    if not at_once:
        global lock
        lock = open(f"{where}/lock", "w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where another process has it
    model = torch.nn.Linear(256, 256)
    return autoaccum.Job(model, torch.optim.Adam(model.parameters()), loss, (torch.randn(8, 256),))
"""


@pytest.mark.parametrize(("at_once", "builds"), [(True, 2), (False, 3)])
def test_the_process_that_confirms_is_started_while_the_search_runs(tmp_path, monkeypatch, at_once, builds):
    """It builds the job beside the trials. A job that cannot be built twice at once is built again when the trials are over."""
    monkeypatch.delenv("AUTOACCUM_FORK_ALL")
    (tmp_path / "job.py").write_text(ONE_AT_A_TIME)
    source = Source(f"{tmp_path}/job.py:make_job", {"where": str(tmp_path), "at_once": at_once})
    me = psutil.Process()
    before, seen = set(me.children()), []

    def watched(event):
        if getattr(event, "phase", "") == "step" and getattr(event, "index", None) is not None:
            seen.append(len(set(me.children()) - before))

    plan = job_file.tune_source(source, request.Request(60, memory_limit="2GiB", max_micro_batch=20), device="cpu", progress=watched)
    assert plan.micro_batches == (20, 20, 20) and max(seen) == 2
    assert len(list(tmp_path.glob("built-*"))) == builds and set(me.children()) == before
