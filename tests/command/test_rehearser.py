"""A script nobody edited, tuned from outside under an enforced budget."""

import shlex
import subprocess
import sys

import pytest

import autoaccum
from autoaccum.command import Template
from autoaccum.probe import request
from autoaccum.tuner import foreign_command
from tests.command_line import ROOT, document
from tests.command_line import autoaccum as run

SCRIPT = ROOT / "examples/unmodified_script.py"
FLAGS = ("--batch-size", "{micro_batch}", "--accum", "{accumulation_steps}", "--max-steps", "1")
MIB = 2**20

# Pretends to train: `needs` MiB per sample, in a process of a size that is known.
PRETEND = """
import sys, time
size, steps = int(sys.argv[1]), int(sys.argv[2])
{before}
held = bytearray({mib} * 2**20 * size)
for at in range(0, len(held), 4096):
    held[at] = 1
{after}
"""


@pytest.fixture
def pretend(tmp_path):
    def write(before="", after="", mib=2):
        path = tmp_path / "pretend.py"
        path.write_text(PRETEND.format(before=before, after=after, mib=mib))
        return [sys.executable, str(path), "{micro_batch}", "{accumulation_steps}"]

    return write


def tune(words, target=120, **given):
    said = []
    return foreign_command.tune_command(words, request.Request(target, **given), device="cpu", on_output=said.append)


def test_the_equal_plan_with_fewest_steps_is_found_for_a_real_script_in_at_most_five_runs():
    peak = document(run("check", "-b", 120, "-m", 40, "--json", "--", sys.executable, SCRIPT, *FLAGS))["peak_bytes"]
    # 10 samples more than 40: 50 would fit, 60 does not.
    finished = run("tune", "-b", 120, "--memory-limit", int((peak + 10 * MIB) / 0.97), "--json", "--", sys.executable, SCRIPT, *FLAGS)
    plan = document(finished)
    assert (plan["micro_batch"], plan["accumulation_steps"]) == (40, 3), finished.stderr
    assert plan["micro_batches"] == [40, 40, 40] and plan["smallest_refused"] == 60
    assert len(plan["trials"]) <= 5
    assert plan["job"] == shlex.join([sys.executable, str(SCRIPT), *FLAGS])


@pytest.mark.parametrize(("most", "answer"), [(50, (40, 3)), (39, (30, 4)), (200, (120, 1)), (1, (1, 120))])
def test_the_largest_divisor_that_fits_is_found(pretend, most, answer):
    bare = foreign_command.check_command(pretend(), 1, request.Request(1), device="cpu", on_output=print).peak_bytes - 2 * MIB
    plan = tune(pretend(), memory_limit=bare + (2 * most + 1) * MIB, headroom=0)
    assert (plan.micro_batch, plan.accumulation_steps) == answer
    assert len(plan.trials) <= 5


def test_a_prime_target_is_said_to_be_one_and_others_are_offered(pretend):
    plan = tune(pretend(), target=127, memory_limit=114 * MIB, headroom=0)
    assert plan.micro_batches == (1,) * 127
    assert any("127 is prime" in warning and "128 = " in warning for warning in plan.warnings)


def test_nothing_fits_is_exit_3_with_the_figures(pretend):
    finished = run("tune", "-b", 12, "--memory-limit", "40MiB", "--", *pretend(mib=200))
    assert finished.returncode == 3 and "one sample does not fit" in finished.stderr and "MiB" in finished.stderr


def test_a_failure_for_another_reason_is_exit_5_with_the_last_lines(pretend):
    finished = run("tune", "-b", 12, "--", *pretend(before="raise ValueError('no such dataset')"))
    assert finished.returncode == 5
    assert "ValueError: no such dataset" in finished.stderr and "not an out-of-memory" in finished.stderr


def test_an_out_of_memory_text_refuses_also_with_exit_code_0(pretend):
    """Some scripts catch it and go on with less, which is not what was asked."""
    caught = "if size > 30: print('RuntimeError: [enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can\\'t allocate memory'); sys.exit(0)"
    plan = tune(pretend(before=caught, mib=1))
    assert plan.micro_batch == 30
    assert any("ended with exit code 0: taken as not fitting" in warning for warning in plan.warnings)


def test_a_text_about_a_cards_memory_is_a_text_where_no_card_is(pretend):
    """A line of a data set neither refuses a size nor hides another failure."""
    line = "print(\"sample 1: 'RuntimeError: CUDA out of memory. Tried to allocate 2.00 GiB' is a common title\")"
    plan = tune(pretend(before=line, mib=1))
    assert plan.accumulation_steps == 1 and not any("out-of-memory" in warning for warning in plan.warnings)
    with pytest.raises(autoaccum.JobFailed, match="exit code 1") as raised:
        tune(pretend(before=line + "\nraise KeyError('val_loss')", mib=1))
    assert "KeyError: 'val_loss'" in raised.value.text


def test_a_run_that_hangs_is_ended_with_all_its_children(pretend):
    plan = tune(pretend(before="while size > 30: time.sleep(0.1)", mib=1), target=60, timeout_s=1.0)
    assert plan.micro_batch == 30
    assert next(each for each in plan.trials if each.micro_batch == plan.smallest_refused).outcome == "timeout"


def test_a_run_that_is_killed_counts_as_not_fitting(pretend):
    plan = tune(pretend(before="import os, signal\nif size > 30: os.kill(os.getpid(), signal.SIGKILL)", mib=1), target=60)
    assert plan.micro_batch == 30 and "was killed by the system" in plan.explain()


def test_a_script_that_ignores_its_flags_is_noticed(pretend):
    plan = tune(pretend(before="size = 50"))
    assert plan.accumulation_steps == 1
    assert any("check that it reads the flags" in warning for warning in plan.warnings)


def test_a_script_that_reads_its_flags_is_not_suspected(pretend):
    assert not any("flags" in warning for warning in tune(pretend()).warnings)


def test_a_command_without_the_placeholder_or_the_program_is_exit_2(pretend):
    finished = run("tune", "-b", 12, "--", sys.executable, SCRIPT)
    assert finished.returncode == 2 and "{micro_batch}" in finished.stderr
    finished = run("tune", "-b", 12, "--", "no-such-program", "{micro_batch}")
    assert finished.returncode in (2, 5) and "no-such-program" in finished.stderr


def test_check_says_by_how_much_a_size_does_not_fit(pretend):
    fits = run("check", "-b", 12, "-m", 4, "--memory-limit", "100MiB", "--", *pretend())
    assert fits.returncode == 0 and "12 = 4 x 3" in fits.stdout
    too_big = run("check", "-b", 120, "-m", 60, "--memory-limit", "100MiB", "--", *pretend())
    assert too_big.returncode == 3 and "60 x 2 does not fit" in too_big.stderr and "needs" in too_big.stderr
    uneven = run("check", "-b", 12, "-m", 5, "--", *pretend())
    assert uneven.returncode == 2 and "5 does not divide" in uneven.stderr


def test_other_braces_stay_as_they_are():
    template = Template(("train", "--config={'a': {x}}", "{micro_batch}x{accumulation_steps}"))
    assert template.filled(40, 3, "/tmp/x") == ["train", "--config={'a': {x}}", "40x3"]
    several = Template(("train", "{micro_batch}", "{accumulation_steps}", "{accumulation_steps_of_all}"))
    assert several.filled(8, 3, "/tmp/x", world=2) == ["train", "8", "3", "6"]
    with pytest.raises(autoaccum.UsageError, match="micro_batch"):
        Template(("train", "--accum", "{accumulation_steps}"))


TRAINS = """
import argparse, os, sys, torch
torch.set_num_threads(1)
parser = argparse.ArgumentParser()
parser.add_argument("--size", type=int)
parser.add_argument("--steps", type=int)
parser.add_argument("--out", default=".")
options = parser.parse_args()
model = torch.nn.Linear(8, 8)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
{body}
"""


@pytest.fixture
def trains(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def write(body):
        (tmp_path / "train.py").write_text(TRAINS.format(body=body))
        return [sys.executable, str(tmp_path / "train.py"), "--size", "{micro_batch}", "--steps", "{accumulation_steps}"]

    return write


RESUMES = """
path = os.path.join(options.out, "checkpoint.pt")
if not os.path.exists(path):
    held = torch.ones(options.size, 2**18)
    model(torch.randn(options.size, 8)).mean().backward()
    optimizer.step()
    torch.save(model.state_dict(), path)
"""


def test_a_command_that_resumes_and_has_nothing_to_do_is_told_and_the_remedy_works(trains, tmp_path):
    words = trains(RESUMES)
    with pytest.raises(autoaccum.UsageError, match=r"1 optimizer steps at a micro-batch of .* none at .*checkpoint\.pt.*\{scratch\}"):
        tune(words, target=16)
    (tmp_path / "work" / "checkpoint.pt").unlink()
    plan = tune([*words, "--out", "{scratch}"], target=16)
    assert plan.micro_batch == 16 and not any("wrote" in warning for warning in plan.warnings) and not list((tmp_path / "work").iterdir())


def test_what_the_trials_wrote_into_the_users_folders_is_told(trains, tmp_path):
    body = "model(torch.randn(options.size, 8)).mean().backward(); optimizer.step()\nfor name in ('a.pt', 'b.pt', 'c.pt'): torch.save({}, os.path.join(options.out, name))"
    plan = tune([*trains(body), "--out", str(tmp_path)], target=4)
    assert any("a.pt" in warning and "1 more" in warning and "{scratch}" in warning for warning in plan.warnings)


def test_a_command_without_an_optimizer_step_is_told(trains):
    plan = tune(trains("model(torch.randn(options.size, 8)).mean().backward()"), target=4)
    assert any("no optimizer of torch made a step" in warning for warning in plan.warnings)


FINDS = """
from {finder} import {name}
try:
    if options.size > 1:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
except RuntimeError as error:
    assert {name}(error)
    options.size = 1
model(torch.randn(options.size, 8)).mean().backward(); optimizer.step()
"""


@pytest.mark.parametrize(("finder", "name"), [("accelerate.utils.memory", "should_reduce_batch_size"), ("lightning.pytorch.utilities.memory", "is_oom_error")])
def test_a_batch_that_a_library_makes_smaller_does_not_count_as_the_size_asked_for(trains, finder, name):
    plan = tune(trains(FINDS.format(finder=finder, name=name)), target=2)
    assert plan.micro_batch == 1 and plan.smallest_refused == 2
    assert any("went on with a smaller one by itself" in warning for warning in plan.warnings)


CATCHES = """
held = []
while True:
    try:
        held = [torch.ones(2**20) for _ in range(options.size)]
        break
    except RuntimeError:
        options.size //= 2
model(torch.randn(8, 8)).mean().backward(); optimizer.step()
"""


def test_a_script_that_catches_its_own_out_of_memory_is_not_let_meet_one(trains):
    """Its processes are held to the limit from outside, so nothing inside can catch it."""
    bare = foreign_command.check_command(trains(CATCHES), 1, request.Request(1), device="cpu", on_output=print).peak_bytes
    plan = tune(trains(CATCHES), target=64, memory_limit=bare + 100 * MIB, headroom=0)
    assert plan.micro_batch == 16  # 4 MiB a sample


def test_memory_that_is_less_at_a_larger_size_is_told(trains):
    body = "held = torch.ones(2**23 if options.size < 8 else 1)\nmodel(torch.randn(2, 8)).mean().backward(); optimizer.step()"
    plan = tune(trains(body), target=8)
    assert plan.micro_batch == 8
    sizes = {trial.micro_batch for trial in plan.trials}
    assert len(sizes) > 1 and any("less memory at a micro-batch of" in warning for warning in plan.warnings)


def test_an_endless_script_is_tuned_by_the_seconds_that_it_trained(trains):
    words = trains("while True:\n    held = torch.ones(options.size, 2**18); model(torch.randn(options.size, 8)).mean().backward(); optimizer.step()")
    finished = run("tune", "-b", 2, "-d", "cpu", "--trial-seconds", 0.5, "--timeout", 60, "--", *words)
    assert finished.returncode == 0 and finished.stdout.startswith("2 = 2 x 1"), finished.stderr
    hopeless = run("tune", "-b", 1, "-d", "cpu", "--timeout", 4, "--", *words)
    assert hopeless.returncode == 3 and "--trial-seconds" in hopeless.stderr  # the remedy, which was followed above


def test_memory_that_never_moves_is_told_also_where_nothing_fits(pretend):
    finished = run("tune", "-b", 12, "--memory-limit", "100MiB", "--", *pretend(before="size = 100"))
    assert finished.returncode == 3 and "takes as much at a micro-batch of" in finished.stderr and "check that it reads the flags" in finished.stderr


def test_placeholders_beside_a_job_and_options_of_commands_without_one_are_refused():
    finished = run("tune", "demo", "-b", 12, "--", "--batch-size", "{micro_batch}")
    assert finished.returncode == 2 and "'{micro_batch}' stands after `--` beside JOB 'demo'" in finished.stderr
    for option in (("--world", 2), ("--trial-seconds", 3), ("--set-file", "a.yaml:b={micro_batch}")):
        finished = run("tune", "demo", "-b", 12, *option)
        assert finished.returncode == 2 and "for a command" in finished.stderr


def test_the_recipe_for_scripts_sees_the_target_for_any_target(tmp_path):
    """Two numbers can say equal micro-batches only, so the env format implies them."""
    for target in (512, 77):
        script = tmp_path / "run.sh"
        recipe = f'p=$("{sys.executable}" -m autoaccum tune demo -b {target} --max-micro-batch 74 --format env -q) || exit; eval "$p"\n'
        script.write_text(recipe + "echo $((AUTOACCUM_MICRO_BATCH * AUTOACCUM_ACCUMULATION_STEPS))\n")
        finished = subprocess.run(["bash", str(script)], cwd=ROOT, capture_output=True, text=True, check=True)
        assert finished.stdout.strip() == str(target)
