"""Readings are remembered by what changes them, and a folder survives whatever happens to those who write it."""

import functools
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import autoaccum
from autoaccum.devices.cpu import Cpu
from autoaccum.probe import cache, conditions
from autoaccum.probe.readings import Conditions, Reading
from tests import jobs
from tests.command_line import autoaccum as cli
from tests.command_line import document, wait_until
from tests.tuner.test_in_place import limit_for

MIB = 2**20
TUNE = ("tune", "tests/jobs.py:hungry", "-b", 120, "-d", "cpu", "--json", "-q")


def ran(told):
    return [each for each in told["trials"] if not each["cached"]]


def limit(mib):
    return ("--memory-limit", int((Cpu().held_bytes() + mib * MIB) / 0.97))


def test_the_second_time_takes_one_trial_and_gives_the_same_plan():
    limited = ("--memory-limit", "420MiB")
    first, second = (document(cli(*TUNE, *limited)) for _ in range(2))
    assert len(ran(first)) > 2 and len(ran(second)) == 1
    assert second["micro_batches"] == first["micro_batches"] and second["smallest_refused"] == first["smallest_refused"]
    assert ran(second)[0]["full"] and ran(second)[0]["outcome"] == "fits"
    assert second["peak_bytes"] == ran(second)[0]["peak_bytes"] <= second["budget_bytes"]
    listed = document(cli("cache", "list", "--json"))
    assert [each["job"] for each in listed["jobs"]] == ["tests/jobs.py:hungry"] and len(listed["jobs"][0]["readings"]) >= 3
    assert cli("cache", "clear").stdout == "1 forgotten\n"
    assert cli("cache", "list").stdout.startswith("nothing is remembered in")


def test_another_target_and_another_limit_reuse_the_readings():
    def tuned(target, mib, **given):
        plan = autoaccum.tune(jobs.hungry(), target_batch=target, memory_limit=held + mib * MIB, cache=True, **given)
        return [each for each in plan.trials if not each.cached], plan

    held = Cpu().held_bytes()
    first, plan = tuned(120, 150)
    assert len(first) == len(plan.trials)
    for target, mib in ((360, 150), (120, 120)):
        trials, plan = tuned(target, mib)
        assert 0 < len(trials) < len(plan.trials) and trials[-1].full and plan.peak_bytes <= plan.budget_bytes
        assert len(trials) <= len(first)


def test_the_command_line_can_do_without():
    document(cli("tune", "-b", 24, "-d", "cpu", "--json", "-q"))
    again = document(cli("tune", "-b", 24, "-d", "cpu", "--json", "-q", "--no-cache"))
    assert not any(each["cached"] for each in again["trials"])
    assert len(document(cli("cache", "list", "--json"))["jobs"]) == 1


def job(width=16, dtype=torch.float32, optimizer=torch.optim.SGD, batch=None, **given):
    model = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(width, 1)).to(dtype)
    return autoaccum.Job(model, optimizer(model.parameters(), lr=0.1), jobs.mse, batch or tuple(each.to(dtype) for each in jobs.pairs(16)), **given)


class Scaled:
    """A loss that is an object."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, model, batch):
        return jobs.mse(model, batch) * self.factor


def smooth(model, batch, *, factor=1.0):
    return jobs.mse(model, batch) * factor


def with_head(classes):
    made = job()
    head = nn.Parameter(torch.zeros(classes, 4))
    return autoaccum.Job(made.model, torch.optim.SGD([*made.model.parameters(), head], lr=0.1), made.loss, made.batch)


def stepped():
    made = job(optimizer=torch.optim.AdamW)
    jobs.mse(made.model, made.batch).backward()
    made.optimizer.step()
    made.optimizer.zero_grad()
    return made


def with_loss(loss):
    made = job()
    return autoaccum.Job(made.model, made.optimizer, loss, made.batch)


def flagged(flag):
    made = job()
    made.model[0].flag = flag
    return made


def dressed():
    made = job()
    made.model.forward = functools.partial(type(made.model).forward, made.model)
    return made


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda: with_head(10), lambda: with_head(1000)),
        (lambda: job(optimizer=torch.optim.AdamW), stepped),
        (lambda: with_loss(Scaled(1)), lambda: with_loss(Scaled(2))),
        (lambda: with_loss(functools.partial(smooth, factor=1.0)), lambda: with_loss(functools.partial(smooth, factor=2.0))),
        (lambda: flagged(True), lambda: flagged(False)),
        (job, dressed),
    ],
)
def test_what_no_shape_shows_is_told_apart_too(one, other):
    first, again, changed = conditions.of([one()]), conditions.of([one()]), conditions.of([other()])
    assert first == again and first != changed


def test_a_refusal_is_kept_with_what_that_trial_had():
    """A neighbour left while the search went on: the size that was refused may fit now."""
    shelf = cache.ReadingCache("job", Conditions({}, 0, 0), {"device": "cpu"})
    shelf.keep(
        [Reading(64, 2, "oom", "forward", None, 1.0, budget_bytes=550 * MIB), Reading(65, 2, "oom", "forward", None, 1.0, doubtful=True)], 128, 1000 * MIB
    )
    assert [each.micro_batch for each in shelf.known(128, 550 * MIB)] == [64] and not shelf.known(128, 1000 * MIB)


def test_a_plan_tells_of_its_own_target_alone():
    autoaccum.tune(job(), target_batch=512, cache=True)
    plan = autoaccum.tune(job(), target_batch=16, cache=True)
    assert plan.largest_fit == 16 and all(each.micro_batch <= 16 for each in plan.trials)


def in_eval_mode():
    made = job()
    made.model.eval()
    return made


@pytest.mark.parametrize(
    "other",
    [
        lambda: job(width=17),
        lambda: job(dtype=torch.float64),
        lambda: job(optimizer=torch.optim.AdamW),
        lambda: job(optimizer=lambda *a, **k: torch.optim.SGD(*a, momentum=0.9, **k)),
        lambda: job(batch=tuple(each.double() for each in jobs.pairs(16)), dtype=torch.float64),
        lambda: job(autocast=torch.bfloat16),
        lambda: job(max_grad_norm=1.0),
        in_eval_mode,
    ],
)
def test_whatever_changes_a_reading_is_another_job(other):
    autoaccum.tune(job(), target_batch=12, cache=True)
    assert any(each.cached for each in autoaccum.tune(job(), target_batch=24, cache=True).trials)
    assert not any(each.cached for each in autoaccum.tune(other(), target_batch=24, cache=True).trials)


def test_another_torch_or_driver_is_another_job():
    conditions = Conditions({"parameters": "a"}, 0, 0)
    shelf = cache.ReadingCache("job", conditions, {"device": "T4", "torch": "2.13.0"})
    shelf.keep([Reading(8, 2, "fits", "step", 100, 1.0)], 16, 200)
    assert [each.micro_batch for each in cache.ReadingCache("job", conditions, {"device": "T4", "torch": "2.13.0"}).known(16, 200)] == [8]
    assert not cache.ReadingCache("job", conditions, {"device": "T4", "torch": "2.11.0"}).known(16, 200)


def test_readings_are_told_in_the_terms_of_now():
    """A process that holds 50 MiB more, in windows of 4 samples more that wait in the same memory, 10 MiB each."""
    then = cache.ReadingCache("job", Conditions({}, 100 * MIB, 10 * MIB), {"device": "cpu"})
    fitted = Reading(8, 2, "fits", "step", 500 * MIB, 1.0, base_bytes=300 * MIB, activation_bytes=450 * MIB)
    then.keep([fitted, Reading(12, 2, "oom", "forward", 555 * MIB, 1.0)], 16, 600 * MIB)
    now = cache.ReadingCache("job", Conditions({}, 150 * MIB, 10 * MIB), {"device": "cpu"})
    fits, refused = now.known(20, 690 * MIB)
    assert (fits.outcome, fits.cached) == ("fits", True)
    assert (fits.peak_bytes, fits.base_bytes, fits.activation_bytes) == (590 * MIB, 390 * MIB, 540 * MIB)
    assert (refused.micro_batch, refused.outcome, refused.peak_bytes) == (12, "oom", None)  # it saw but a part of its peak
    # With less it is over budget; with more than the refused one had, nobody knows; what noise differs by is neither.
    assert [each.outcome for each in now.known(20, 539 * MIB)] == ["over-budget", "oom"]
    # Between what its tensors took and what was reserved for them, it may do with less.
    assert [each.micro_batch for each in now.known(20, 589 * MIB)] == [12]
    assert [each.micro_batch for each in now.known(20, 693 * MIB)] == [8, 12]
    assert [each.micro_batch for each in now.known(20, 695 * MIB)] == [8]


def test_what_was_remembered_and_proves_wrong_is_forgotten_and_measured_anew():
    allowed = limit_for(150)
    first = autoaccum.tune(jobs.hungry(), target_batch=120, memory_limit=allowed, cache=True)
    (path,) = Path(os.environ["AUTOACCUM_CACHE_DIR"]).glob("*.json")
    told = json.loads(path.read_text())
    for kept in told["kept"]:  # as if everything had taken next to nothing
        kept["reading"].update(outcome="fits", peak_bytes=MIB, base_bytes=MIB, activation_bytes=MIB)
    path.write_text(json.dumps(told))
    again = autoaccum.tune(jobs.hungry(), target_batch=120, memory_limit=allowed, cache=True)
    assert again.peak_bytes <= again.budget_bytes and again.trials[-1].full
    assert abs(again.accumulation_steps - first.accumulation_steps) <= 1


def test_bad_news_is_not_taken_from_memory():
    """Nothing fitted once; with as much to spend, one sample is run again before that is said."""
    with pytest.raises(autoaccum.NothingFits):
        autoaccum.tune(jobs.hungry(40.0), target_batch=8, memory_limit=limit_for(60), cache=True)
    with pytest.raises(autoaccum.NothingFits) as raised:
        autoaccum.tune(jobs.hungry(40.0), target_batch=8, memory_limit=limit_for(60), cache=True)
    assert any(not each.cached and each.micro_batch == 1 for each in raised.value.trials)


@pytest.mark.parametrize(
    "text", ["", "{", "[1, 2]", '{"schema": "other/1"}', '{"schema": "autoaccum.readings/1", "key": {}, "kept": []}', "\x00\xff", "[" * 100_000, "WRONG"]
)
def test_a_file_that_is_not_ours_is_ignored_with_a_warning_and_replaced(text):
    shelf = cache.ReadingCache("job", Conditions({}, 0, 0), {"device": "cpu"})
    shelf.keep([Reading(8, 2, "fits", "step", 100, 1.0)], 16, 200)
    (path,) = Path(os.environ["AUTOACCUM_CACHE_DIR"]).glob("*.json")
    path.write_text(path.read_text().replace('"peak_bytes": 100', '"peak_bytes": "much"') if text == "WRONG" else text)
    with pytest.warns(UserWarning, match="cannot be used and are replaced"):
        assert shelf.known(16, 200) == []
    with pytest.warns(UserWarning, match="cannot be used"):
        shelf.keep([Reading(9, 2, "fits", "step", 100, 1.0)], 16, 200)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [each.micro_batch for each in shelf.known(16, 200)] == [9]


def test_a_folder_that_cannot_be_written_costs_a_warning_and_no_plan(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AUTOACCUM_CACHE_DIR", str(tmp_path / "file" / "below"))
    with pytest.warns(UserWarning, match="readings cannot be remembered in"):
        assert autoaccum.tune(job(), target_batch=12, cache=True).micro_batch == 12


def test_clear_leaves_what_is_not_ours(tmp_path):
    folder = Path(os.environ["AUTOACCUM_CACHE_DIR"])
    folder.mkdir()
    (folder / "notes.json").write_text('{"mine": 1}')
    (folder / ".env").write_text("mine")
    os.utime(folder / ".env", (0, 0))
    cache.ReadingCache("job", Conditions({}, 0, 0), {"device": "cpu"}).keep([Reading(8, 2, "fits", "step", 100, 1.0)], 16, 200)
    assert cache.clear() == 1
    assert sorted(path.name for path in folder.iterdir()) == [".env", "notes.json"]


WRITER = """
import itertools, sys
from autoaccum.probe import cache, conditions
from autoaccum.probe.readings import Conditions, Reading
shelf = cache.ReadingCache("job", Conditions({}, 0, 0), {"device": "cpu"})
print("writing", flush=True)
for n in itertools.count(int(sys.argv[1])):
    shelf.keep([Reading(n % 500 + 1, 2, "fits", "step", 10**9 + n, 1.0, shapes={"x" * 2000: (n,)})], 16, 200)
"""


def test_eight_at_once_killed_at_any_moment_leave_it_readable():
    shelf = cache.ReadingCache("job", Conditions({}, 0, 0), {"device": "cpu"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for count in (8, 2):  # also after others were killed
            writers = [subprocess.Popen([sys.executable, "-W", "error", "-c", WRITER, str(n * 1000)], stdout=subprocess.PIPE) for n in range(count)]
            for writer in writers:
                assert writer.stdout.readline() == b"writing\n"
            seen = set()
            wait_until(lambda seen=seen: seen.update(each.peak_bytes for each in shelf.known(16, 200)) or len(seen) > 30)
            for writer in writers:  # each somewhere else in its work
                writer.send_signal(signal.SIGKILL)
                shelf.known(16, 200)
            for writer in writers:
                assert writer.wait() == -signal.SIGKILL
                writer.stdout.close()
            assert shelf.known(16, 200)


NOTEBOOK = """
import torch, autoaccum
from autoaccum.probe import conditions
class Net(torch.nn.Module):
    def __init__(self, checkpointed):
        super().__init__()
        self.inner, self.checkpointed = torch.nn.Linear(8, 1), checkpointed
    def forward(self, x):
        return self.inner(x) * FACTOR
def make(scale, checkpointed=False):
    model = Net(checkpointed)
    loss = lambda model, batch: model(batch).mean() * scale
    return autoaccum.Job(model, torch.optim.SGD(model.parameters()), loss, torch.zeros(4, 8))
print([conditions.of([each]) for each in (make(1), make(1), make(2), make(1, True))])
"""


def test_what_a_notebook_defines_is_known_by_its_code_and_alike_in_every_process():
    def told(factor):
        code = f"exec(compile({NOTEBOOK.replace('FACTOR', str(factor))!r}, '<cell>', 'exec'), globals())"
        return eval(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)

    first, again, other = told(1), told(1), told(2)
    assert first == again and first[0] == first[1]
    assert first[0]["code"] != first[2]["code"] and first[0]["modes"] != first[3]["modes"] and first[0]["code"] != other[0]["code"]


def test_the_file_is_the_owners_alone_and_neither_links_nor_open_folders_are_used(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.FOLDER, str(tmp_path / "own"))
    autoaccum.tune(jobs.small(), target_batch=8, cache=True)
    (path,) = (tmp_path / "own").glob("*.json")
    assert path.stat().st_mode & 0o777 == 0o600 and (tmp_path / "own").stat().st_mode & 0o777 == 0o700

    victim = tmp_path / "victim"
    victim.write_text("mine")
    path.unlink()
    path.symlink_to(victim)
    with pytest.warns(UserWarning):
        autoaccum.tune(jobs.small(), target_batch=8, cache=True)
    assert victim.read_text() == "mine"

    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    monkeypatch.setenv(cache.FOLDER, str(tmp_path / "open"))
    with pytest.warns(UserWarning, match="everybody may write there"):
        autoaccum.tune(jobs.small(), target_batch=8, cache=True)
    assert not list((tmp_path / "open").iterdir())


def test_odd_files_in_the_folder_neither_hang_nor_stop_the_list(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.FOLDER, str(tmp_path))
    autoaccum.tune(jobs.small(), target_batch=8, cache=True)
    os.mkfifo(tmp_path / "fifo.json")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "odd.json").write_text(json.dumps({"schema": cache.SCHEMA, "job": 7, "written": [], "key": {"device": None}, "kept": []}))
    evil = {"schema": cache.SCHEMA, "job": "\x1b[2Jjob", "written": "2026", "key": {"device": "cpu"}, "kept": []}
    (tmp_path / "evil.json").write_text(json.dumps(evil))
    shown = cache.listed()
    assert "in place" in shown and "\x1b" not in shown and len(shown.splitlines()) == 3
    assert cache.clear() == 2
