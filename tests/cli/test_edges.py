"""What machines and people do to a command: odd files, full disks, closed streams, huge numbers. One clear sentence, or it simply works."""

import json
import os
import stat
import subprocess
import sys
import threading

import pytest

import autoaccum
from autoaccum import files
from autoaccum.plan import arithmetic
from autoaccum.probe.request import Request
from autoaccum.simulate import profiles
from autoaccum.units import parse_headroom, parse_size
from tests.command_line import ROOT, document
from tests.command_line import autoaccum as run
from tests.plans import by_hand

PLANS = ("tune", "demo", "-b", 12, "-q")


def sentence(finished, code=2):
    """The one line on stderr, of a bounded length."""
    assert finished.returncode == code, finished.stderr
    (line,) = finished.stderr.strip().splitlines()
    assert line.startswith("autoaccum: ") and len(line) < 1500 and "Traceback" not in line
    return line


# -- numbers and names --


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("tune", "demo", "-b", "9" * 30), "more samples than anyone trains on in one step"),
        (("tune", "demo", "-b", "9" * 5000), "is not a valid integer"),
        (("tune", "demo", "--target-tokens", "9" * 30), "give less than 2**63"),
        (("tune", "demo", "-b", 12, "--memory-limit", "9" * 30 + "GiB"), "more than any machine has"),
        (("tune", "demo", "-b", 12, "--timeout", "nan"), "more than 0 seconds, not nan"),
        (("check", "demo", "-b", 12, "-m", 4, "--windows", "9" * 30), "is not in the range"),
        (("fleet", "-b", 480, "-g", "999999999*t4", "--fixed", "2GiB", "--per-sample", "1GiB"), "999999999 cards"),
        (("fleet", "-b", 480, "-g", "9" * 30 + "*t4", "--fixed", "2GiB", "--per-sample", "1GiB"), "must be a whole number"),
        (("tune", "a" * 5000 + ".py", "-b", 12), "there is no file 'aaaa"),
        (("tune", "demo", "-b", 12, "-o", "a" * 5000 + ".json"), "its name is too long"),
        (("estimate", "demo", "-b", 12, "-g", "a" * 5000), "there is no GPU data file for 'aaaa"),
    ],
)
def test_numbers_and_names_beyond_reason_are_one_sentence(words, says):
    assert says in sentence(run(*words))


def test_large_targets_take_little_time_and_memory():
    assert arithmetic.candidate_sizes(2**31 - 1, equal=True) == [1, 2**31 - 1]  # a prime
    assert len(arithmetic.candidate_sizes(2**31 - 1)) < 100_000
    with pytest.raises(autoaccum.UsageError, match="max_micro_batch of at most"):
        Request(2**31 - 1, largest=True)
    Request(2**31 - 1, largest=True, max_micro_batch=1000)  # the remedy


def test_a_name_that_may_be_several_cards_is_asked_about():
    for name in ("h100", "a100"):
        with pytest.raises(autoaccum.UsageError, match="the nearest are"):
            profiles.load(name)


def test_a_fraction_is_no_headroom():
    for given in (0.03, "0.03", ".5"):
        with pytest.raises(autoaccum.UsageError, match='is neither a percentage nor a size: write "0'):
            parse_headroom(given, 2**30)
    assert parse_headroom("3%", 1000) == 30
    with pytest.raises(autoaccum.UsageError, match="another unit"):
        parse_size("99999999999999 GiB")


# -- files --


@pytest.fixture
def plan():
    import torch

    model = torch.nn.Linear(2, 1)
    return by_hand(autoaccum.Job(model, torch.optim.SGD(model.parameters(), lr=0.1), lambda model, batch: model(batch).mean(), torch.ones(4, 2)), 12, 4)


def test_a_plan_follows_a_link_and_keeps_permissions(plan, tmp_path):
    (tmp_path / "real.json").write_text("{}")
    (tmp_path / "real.json").chmod(0o640)
    (tmp_path / "link.json").symlink_to("real.json")
    plan.save(tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink() and stat.S_IMODE((tmp_path / "real.json").stat().st_mode) == 0o640
    assert autoaccum.Plan.load(tmp_path / "real.json").micro_batches == plan.micro_batches
    assert {path.name for path in tmp_path.iterdir()} == {"real.json", "link.json"}


def test_devices_and_fifos_are_written_to_and_never_replaced(plan, tmp_path):
    plan.save("/dev/null")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    os.mkfifo(tmp_path / "fifo")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "fifo").read_text()))
    reader.start()
    plan.save(tmp_path / "fifo")
    reader.join(30)
    assert json.loads(read[0])["target_batch"] == 12 and stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)
    finished = run(*PLANS, "-o", "/dev/stdout", "--format", "env")
    assert finished.returncode == 0 and '"schema": "autoaccum.plan/1"' in finished.stdout


def test_a_full_disk_leaves_no_half_written_file(plan):
    if not os.path.exists("/dev/full"):
        pytest.skip("/dev/full is missing here")
    with pytest.raises(autoaccum.PlanError, match="No space left on device; nothing was left there"):
        plan.save("/dev/full")


def test_a_write_that_fails_half_way_leaves_the_old_file(plan, tmp_path):
    """A file may be no larger than a limit of the process: as on a full disk, it fails in the middle."""
    path = tmp_path / "plan.json"
    path.write_text("old")
    code = (
        "import resource, signal, sys\nfrom autoaccum import files\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: files.write_text(sys.argv[1], 'x' * 100000)\nexcept OSError as error: print('FAILED', error.strerror)"
    )
    finished = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "FAILED" in finished.stdout and path.read_text() == "old" and [each.name for each in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/null", "nowhere", ".", "fifo", "deep.json", "noise", "nul\0name"])
def test_what_is_no_plan_is_a_sentence_and_never_a_wait(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    (tmp_path / "deep.json").write_text("[" * 100_000 + "]" * 100_000)
    (tmp_path / "noise").write_bytes(bytes(range(256)))
    with pytest.raises(autoaccum.PlanError) as raised:
        autoaccum.Plan.load(name)
    assert len(str(raised.value)) < 500


def test_odd_profiles_are_a_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep.toml").write_text("a = " + "[" * 100_000 + "]" * 100_000)
    os.mkfifo("fifo.toml")
    for name in ("deep.toml", "fifo.toml", "nowhere.toml"):
        with pytest.raises(autoaccum.ProfileError):
            profiles.read(tmp_path / name)


def test_a_file_too_large_is_not_read(tmp_path):
    with open(tmp_path / "large", "wb") as file:
        file.truncate(files.MOST_BYTES + 1)
    with pytest.raises(files.Unreadable, match="larger than 64 MiB"):
        files.read_text(tmp_path / "large")


# -- streams and surroundings --


def closed(redirection, *words):
    """The exit code and what came out, with streams closed by a shell."""
    line = " ".join([f'"{sys.executable}" -m autoaccum', *map(str, words), redirection])
    return subprocess.run(["sh", "-c", line], capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)


@pytest.mark.parametrize("redirection", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_do_not_matter(redirection):
    finished = closed(redirection, "estimate", "demo", "-b", 12, "-g", "t4")
    assert finished.returncode == 0
    assert (">&-" in redirection and redirection != "2>&-") or "t4" in finished.stdout.lower()


def test_an_ascii_locale_and_a_missing_home_do_not_matter():
    odd = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "HOME": "/nonexistent", "XDG_CACHE_HOME": ""}
    finished = run(*PLANS, env=odd)
    assert finished.returncode == 0 and "12 = 12 x 1" in finished.stdout, finished.stderr


def test_a_deleted_folder_is_a_sentence(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    line = f'rmdir "{gone}"; "{sys.executable}" -c "from autoaccum.cli import main; main()" tune demo -b 12'
    finished = subprocess.run(["sh", "-c", line], capture_output=True, text=True, cwd=gone, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert "the current folder was deleted" in sentence(finished)


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR expected, but not set): unset RANK and WORLD_SIZE"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "must be whole numbers"),
        ({"RANK": "5", "WORLD_SIZE": "2"}, "ranks are counted from 0"),
    ],
)
def test_an_environment_of_ranks_without_a_launcher_is_a_sentence(environment, says):
    assert says in sentence(run(*PLANS, env=environment))
    assert run(*PLANS, env={**dict.fromkeys(environment, ""), "RANK": "0", "WORLD_SIZE": "1"}).returncode == 0  # the remedy


LARGE_ERROR = """
import autoaccum, torch
def make_job():
    model = torch.nn.Linear(2, 1)
    def loss(model, batch):
        raise ValueError("x" * 50_000_000)
    return autoaccum.Job(model, torch.optim.SGD(model.parameters(), lr=0.1), loss, torch.ones(4, 2))
"""


def test_an_error_of_50_megabytes_is_cut(tmp_path):
    (tmp_path / "large.py").write_text(LARGE_ERROR)
    finished = run("tune", "large.py", "-b", 12, "--json", "-q", cwd=tmp_path)
    assert finished.returncode == 5 and len(finished.stderr) < 100_000
    assert "ValueError" in finished.stderr and document(finished)["error"] == "ValueError" and len(finished.stdout) < 100_000


def test_a_signal_without_a_name_is_told_by_its_number():
    assert "was ended by signal 35" in run("tune", "-b", 4, "-q", "--", "bash", "-c", "kill -35 $$", "{micro_batch}").stderr


NAMES = ["json", "random", "struct", "torch", "signal", "threading", "click", "autoaccum", "warnings", "select"]
JOB = """
import autoaccum, torch
def make_job():
    model = torch.nn.Linear(2, 1)
    return autoaccum.Job(model, torch.optim.SGD(model.parameters(), lr=0.1), lambda model, batch: model(batch).mean(), torch.ones(4, 2))
"""


def test_programs_of_the_working_folder_are_not_ours_to_run(tmp_path):
    """As a console script, the parent has no such folder on its path either."""
    (tmp_path / "elsewhere").mkdir()
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text(f"open('ran-{name}', 'w')\nraise SystemExit('ran {name}')\n")
    (tmp_path / "elsewhere" / "job.py").write_text(JOB)
    script = [sys.executable, "-c", "import sys; sys.path[:] = [e for e in sys.path if e]; from autoaccum.cli import main; main()"]
    given = {"capture_output": True, "text": True, "cwd": tmp_path, "check": False, "timeout": 120, "env": {**os.environ, "PYTHONSAFEPATH": ""}}
    finished = subprocess.run([*script, "tune", "elsewhere/job.py", "-b", "12", "--no-cache"], **given)
    assert finished.returncode == 0, finished.stderr
    finished = subprocess.run([*script, "tune", "-b", "2", "-d", "cpu", "--", "true", "{micro_batch}"], **given)
    assert finished.returncode == 0, finished.stderr
    assert not list(tmp_path.glob("ran-*"))


def test_the_timeout_covers_building_the_job(tmp_path):
    (tmp_path / "slow.py").write_text("import time\n\ndef make_job():\n    time.sleep(600)\n")
    finished = run("tune", "slow.py", "-b", 12, "--timeout", 1, "-q", cwd=tmp_path)
    assert finished.returncode == 5 and "importing and building the job took more than --timeout 1 s" in finished.stderr


# -- smaller ones --


def test_a_plan_is_short_to_look_at(plan):
    assert repr(plan) == f"<Plan {plan}>" and len(repr(plan)) < 200


def test_a_class_of_schedulers_is_refused():
    import torch

    model = torch.nn.Linear(2, 1)
    with pytest.raises(autoaccum.JobError, match=r"scheduler is the class StepLR: give an instance"):
        autoaccum.Job(model, torch.optim.SGD(model.parameters(), lr=0.1), lambda model, batch: 0, torch.ones(2, 2), scheduler=torch.optim.lr_scheduler.StepLR)


def test_a_list_of_batches_is_told_where_it_goes(plan):
    import torch

    model = torch.nn.Linear(2, 1)
    loop = autoaccum.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), plan)

    def loss(model, batch):
        return torch.nn.functional.mse_loss(model(batch[0]), batch[1])

    several = [(torch.ones(4, 2), torch.ones(4, 1)) for _ in range(3)]
    with pytest.raises(TypeError) as raised:
        loop.step(several, loss)
    assert "loop.step_micro(list)" in raised.value.__notes__[0]
    assert loop.step_micro(several, loss).samples == 12  # the remedy
