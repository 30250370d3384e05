"""The command line as a user meets it: stdout is the answer, stderr is talk, exit codes tell what happened."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys

import pytest

from tests.command_line import ROOT, autoaccum, document, wait_until

JOBS = "tests/jobs.py"


def test_the_demo_needs_no_job_and_says_that_it_is_one():
    finished = autoaccum("tune", "--target-batch", 120)
    assert finished.returncode == 0
    lines = finished.stdout.splitlines()
    assert lines[0].startswith("demo: the 8-16-1 network of the classic tutorial") and "learning rate stays as it is" in lines[0]
    assert lines[1].startswith("120 = 120 x 1     in one piece on ")
    assert lines[-1].startswith("hint: all 120 fit at once: try --max-micro-batch 40")
    assert "tried 1: fits" in finished.stderr


def test_json_is_one_document_and_output_the_same_one(tmp_path):
    path = tmp_path / "plan.json"
    finished = autoaccum("tune", "-b", 120, "--max-micro-batch", 40, "--json", "-o", path, "-d", "cpu")
    told = document(finished)
    assert told["schema"] == "autoaccum.plan/1" and told["job"] == "demo"
    assert (told["micro_batch"], told["accumulation_steps"], told["micro_batches"]) == (40, 3, [40, 40, 40])
    assert told["device"]["kind"] == "cpu" and told["trials"][0]["outcome"] == "fits"
    assert json.loads(path.read_text()) == told


def test_env_prints_what_a_shell_can_read():
    script = f'p=$("{sys.executable}" -m autoaccum tune demo -b 120 --max-micro-batch 40 --format env -q) || exit; eval "$p"; '
    script += 'echo "$AUTOACCUM_TARGET_BATCH $AUTOACCUM_MICRO_BATCH $AUTOACCUM_ACCUMULATION_STEPS [$AUTOACCUM_MICRO_BATCHES] $MALLOC_TRIM_THRESHOLD_"'
    finished = subprocess.run(["sh", "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert finished.stdout.strip() == "120 40 3 [40 40 40] 65536"


def test_train_reproduces_the_tutorial_and_splitting_changes_no_loss():
    split = autoaccum("train", "--target-batch", 120, "--epochs", 2, "--max-micro-batch", 40)
    whole = autoaccum("train", "--target-batch", 120, "--epochs", 2)
    assert "120 = 40 x 3" in split.stdout and "120 = 120 x 1" in whole.stdout
    losses = [[float(loss) for loss in re.findall(r"^epoch \d  loss (\S+)  10 steps of 120$", each.stdout, re.M)] for each in (split, whole)]
    assert len(losses[0]) == 2 and losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] == sorted(losses[0], reverse=True)


def test_train_in_json_is_one_document():
    told = document(autoaccum("train", "-b", 500, "-e", 1, "--json"))
    assert [epoch["steps"] for epoch in told["epochs"]] == [3] and told["epochs"][0]["samples"] == 1200


def test_check_rehearses_one_size():
    finished = autoaccum("check", "-b", 24, "-m", 10, "-d", "cpu")
    assert finished.returncode == 0 and finished.stdout.splitlines()[1].startswith("24 = 10 x 2 + 4 x 1")
    finished = autoaccum("check", f"{JOBS}:hungry", "--set", "mib=4", "-b", 120, "-m", 60, "--memory-limit", "400MiB", "-d", "cpu", "--json")
    told = document(finished)
    assert finished.returncode == told["exit_code"] == 3 and told["error"] == "OutOfMemory"
    assert re.search(r"60 x 2 does not fit: 60 ran out in \w+; it needs [\d.]+ \w+ and the budget is 39\d MiB", told["message"])


def test_devices_lists_the_cpu():
    finished = autoaccum("devices")
    assert finished.returncode == 0 and re.search(r"^cpu +[\d.]+ [MG]iB +[\d.]+ [MG]iB", finished.stdout, re.M)
    told = document(autoaccum("devices", "--json"))
    cpu = told["devices"][-1]
    assert told["schema"] == "autoaccum.devices/1" and cpu["kind"] == "cpu" and 0 < cpu["free_bytes"] <= cpu["total_bytes"]
    assert set(cpu) == {"kind", "index", "name", "uuid", "total_bytes", "free_bytes", "ours_bytes", "others", "binding_limit"}


WRONG = {
    "no target": (["tune"], "--target-batch"),
    "a target of nothing": (["tune", "-b", 0], "target_batch must be a whole number of samples, at least 1, not 0"),
    "a target in words": (["tune", "-b", "many"], "'many' is not a valid integer"),
    "a flag that is not there": (["tune", "-b", 12, "--fast"], "--fast"),
    "a command that is not there": (["tuna", "-b", 12], "tuna"),
    "an empty job": (["tune", "", "-b", 12], "JOB is empty"),
    "a file that is not there": (["tune", "nowhere.py", "-b", 12], "there is no file 'nowhere.py'"),
    "a job that is no name": (["tune", "a/b", "-b", 12], "'a/b' is neither a .py file nor a module"),
    "a function that is no name": (["tune", f"{JOBS}:x-y", "-b", 12], "'x-y'"),
    "a size": (["tune", "-b", 12, "--memory-limit", "big"], "'big' is not a size"),
    "headroom": (["tune", "-b", 12, "--headroom", "120%"], "headroom of 120% leaves nothing"),
    "max micro-batch": (["tune", "-b", 12, "--max-micro-batch", 0], "max_micro_batch must be a whole number of samples, at least 1, not 0"),
    "a timeout": (["tune", "-b", 12, "--timeout", "-1"], "timeout_s must be more than 0 seconds, not -1.0"),
    "a function that is not there": (["tune", f"{JOBS}:no_such_function", "-b", 12], "has no function no_such_function()"),
    "a module that is not there": (["tune", "no_such_package.train", "-b", 12], "there is no module 'no_such_package'"),
    "a limit without a unit": (["tune", "-b", 12, "--memory-limit", 600], "did you mean 600MiB?"),
    "headroom without a percent sign": (["tune", "-b", 12, "--headroom", 3], "write a percentage such as 3%"),
    "a file that cannot be written": (["tune", "-b", 12, "-o", "/proc/plan.json"], "cannot be written"),
    "dashes and nothing": (["tune", "-b", 12, "--"], "nothing follows `--`"),
    "check of an uneven size as an equal one": (["check", "-b", 12, "-m", 5, "--equal"], "5 does not divide a target batch of 12: 4 does"),
    "check of the largest": (["check", "-b", 12, "-m", 5, "--largest"], "check rehearses the one size 5"),
    "train with more than there is": (["train", "-b", 1500], "has 1200 samples, fewer than the target batch of 1500"),
    "a setting": (["tune", "-b", 12, "--set", "width"], "'width' is not name=value"),
    "a setting that nobody takes": (["tune", f"{JOBS}:with_arguments", "-b", 12, "--set", "width=1", "--set", "wide=1"], "has no parameter 'wide'"),
    "a setting that is missing": (["tune", f"{JOBS}:with_arguments", "-b", 12], "--set width=VALUE"),
    "a folder that is not there": (["tune", "-b", 12, "-o", "nowhere/plan.json"], "there is no folder"),
    "a format": (["tune", "-b", 12, "--format", "xml"], "'xml'"),
    "env of the demo by accident": (["tune", "-b", 12, "--format", "env"], "say `demo`"),
    "check without a size": (["check", "-b", 12], "--micro-batch"),
    "check above the target": (["check", "-b", 12, "-m", 13], "a micro-batch of 13 for a target batch of 12"),
    "check of nothing": (["check", "-b", 12, "-m", 0], "at least 1, not 0"),
    "train of a command": (["train", "-b", 12, "--", "python", "x.py", "{micro_batch}"], "train needs a JOB"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_used_is_exit_2_and_one_sentence_with_the_value(wrong):
    words, says = WRONG[wrong]
    finished = autoaccum(*words)
    assert finished.returncode == 2, finished.stderr
    assert says in finished.stderr and "Traceback" not in finished.stderr
    if words[0] != "train":  # which has planned by then
        assert finished.stdout == "" and len(finished.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("device", ["cuda:9", "tpu"])
def test_a_device_that_is_not_here_is_exit_4_with_what_is(device):
    finished = autoaccum("tune", "-b", 12, "-d", device)
    assert finished.returncode == 4 and device in finished.stderr and "cpu" in finished.stderr


@pytest.mark.parametrize(
    ("job", "says"),
    [
        ("not_a_job", "not_a_job() returned int"),
        ("not_scalar", "shape (1, 1)"),
        ("needs_no_grad", "needs no gradient"),
        ("wrong_size", "make_batch(1) returned 2 samples"),
        ("fails_at_build", "RuntimeError: the checkpoint is corrupt"),
    ],
)
def test_a_job_that_fails_is_exit_5_with_what_was_wrong(job, says):
    finished = autoaccum("tune", f"{JOBS}:{job}", "-b", 12, "-d", "cpu")
    assert finished.returncode == 5 and says in finished.stderr and finished.stdout == ""


def test_a_module_by_its_dotted_name_is_a_job_too():
    assert autoaccum("tune", "autoaccum.cli.demo:make_job", "-b", 12, "--json").returncode == 0


def test_a_failure_in_json_is_one_document_too():
    finished = autoaccum("tune", f"{JOBS}:fails_above", "-b", 120, "--json", "-d", "cpu")
    told = document(finished)
    assert told["schema"] == "autoaccum.error/1" and told["error"] == "ValueError" and told["exit_code"] == finished.returncode == 5
    assert "sizes that had worked: 1" in told["message"]
    told = document(autoaccum("tune", "-b", 0, "--json"))
    assert (told["error"], told["exit_code"]) == ("UsageError", 2)


def test_what_does_not_fit_is_exit_3_with_the_trials():
    finished = autoaccum("tune", f"{JOBS}:hungry", "--set", "mib=400", "-b", 12, "--memory-limit", "500MiB", "-d", "cpu", "--json")
    assert finished.stderr.rstrip().endswith("; --what-if measures what each change gains")
    told = document(finished)
    assert finished.returncode == 3 and told["error"] == "NothingFits" and "one sample does not fit" in told["message"]
    assert [trial["outcome"] for trial in told["trials"]] == ["oom", "oom"]


def test_without_words_the_help_is_shown():
    finished = autoaccum()
    assert finished.returncode == 2 and finished.stderr.startswith("Usage: autoaccum") and finished.stdout == ""


def test_a_figure_that_is_no_number_is_null():
    finished = autoaccum("train", f"{JOBS}:nan_loss", "-b", 12, "-d", "cpu", "--json")
    told = json.loads(finished.stdout, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert told["epochs"][0]["loss"] is None and "no data=" in finished.stderr


def test_an_interrupted_call_in_json_is_one_document_too(tmp_path):
    marker = tmp_path / "running"
    words = ["tune", "-b", "12", "--json", "--", "sh", "-c", f"touch '{marker}'; sleep 60{{micro_batch}}"]
    process = subprocess.Popen([sys.executable, "-m", "autoaccum", *words], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    wait_until(marker.exists)
    process.send_signal(signal.SIGINT)
    told = json.loads(process.communicate(timeout=60)[0])
    assert process.returncode == told["exit_code"] == 130 and told["schema"] == "autoaccum.error/1"


def test_a_reader_that_goes_away_is_no_error():
    finished = subprocess.run(f'"{sys.executable}" -m autoaccum devices --json | true', shell=True, capture_output=True, text=True, cwd=ROOT, check=False)
    assert finished.stderr == ""


def test_quiet_says_nothing_but_the_answer():
    finished = autoaccum("tune", f"{JOBS}:chatty", "-b", 12, "-d", "cpu", "-q")
    assert finished.returncode == 0 and finished.stderr == "" and finished.stdout.startswith("12 = ")


def test_help_and_devices_do_not_import_torch():
    code = (
        "import sys\n"
        "from autoaccum.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as ended: assert not ended.code\n"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    for words in (["--help"], ["tune", "--help"], ["--version"], ["devices"]):
        finished = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=ROOT, check=False)
        assert (finished.returncode, finished.stderr.strip()) == (0, "False"), (words, finished.stderr)


def test_on_a_terminal_progress_is_live():
    """A pseudo-terminal as stderr: the spinner moves, each trial leaves a line, and stdout stays the answer."""
    answer, drawn = on_a_terminal("tune", "-b", "120", "-d", "cpu")
    assert "building the job" in drawn and "tried 120: fits" in drawn
    assert answer.startswith("demo: ") and "\x1b" not in answer
    answer, drawn = on_a_terminal("estimate", f"{JOBS}:small", "-b", "12", "-g", "t4,l4")
    assert "building the job" in drawn and "tracing the job for l4" in drawn
    assert answer.startswith("12 samples a step of ") and "\x1b" not in answer


def on_a_terminal(*words):
    """What a command printed on stdout, and what it drew on the terminal that is its stderr."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "autoaccum", *words],
        stdout=subprocess.PIPE,
        stderr=theirs,
        cwd=ROOT,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(theirs)
    drawn = b""
    while select.select([ours], [], [], 60)[0]:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # the other end was closed
            break
        drawn += chunk
    answer = process.communicate()[0].decode()
    os.close(ours)
    assert b"\x1b[" in drawn
    return answer, re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", drawn.decode())


def test_check_says_whether_splitting_changes_the_gradient():
    alone = autoaccum("check", f"{JOBS}:small", "--equivalence", "-q")
    assert alone.returncode == 0 and alone.stdout.startswith("exact: the gradient of 5 + 3 samples is that of 8 at once")
    told = document(autoaccum("check", f"{JOBS}:sum_loss", "--equivalence", "--json", "-q"))
    assert (told["schema"], told["exact"], told["cause"]) == ("autoaccum.equivalence/1", False, "sum")
    both = autoaccum("check", f"{JOBS}:sum_loss", "-b", 12, "-m", 4, "--equivalence", "-q")
    assert both.stdout.startswith("12 = 4 x 3") and "splitting: the loss is a sum over the samples" in both.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("check", "-b", 12), "Missing option '-m'"),
        (("check", "-m", 4), "Missing option '-b'"),
        (("tune",), "Missing option '-b'"),
        (("check", "--equivalence", "--", "python", "train.py"), "a command's loss is out of reach"),
        (("check", "demo", "--equivalence", "--format", "env"), "makes no plan"),
        (("check", "--equivalence", "-o", "plan.json"), "makes no plan"),
    ],
)
def test_what_check_and_tune_cannot_do_without_is_told(words, says):
    finished = autoaccum(*words)
    assert finished.returncode == 2 and says in finished.stderr


def test_a_gan_is_planned_and_trained_from_a_list_of_jobs():
    told = document(autoaccum("train", f"{JOBS}:two_in_turn", "-b", 12, "--max-micro-batch", 5, "--json", "-q"))
    assert told["micro_batches"] == [4, 4, 4] and told["epochs"][0]["steps"] == 5


def test_check_cuts_the_rest_of_a_window_so_that_no_sample_is_alone():
    told = document(autoaccum("check", f"{JOBS}:normed", "-b", 100, "-m", 33, "--json", "-q"))
    assert told["micro_batches"] == [33, 23, 22, 22]
    for size in (1, 99):
        finished = autoaccum("check", f"{JOBS}:normed", "-b", 100, "-m", size, "-q")
        assert finished.returncode == 2 and "BatchNorm layer '1' needs micro-batches of at least 2 samples" in finished.stderr
