"""Trials on a CPU run in a copy of the process: whatever happens there, the process itself is as it was."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch import nn

import autoaccum
from autoaccum.devices.cpu import Cpu
from autoaccum.probe import process_copy
from tests import jobs
from tests.command_line import ROOT, wait_until
from tests.digest import digest
from tests.seen import Seen
from tests.tuner.test_in_place import limit_for

pytestmark = pytest.mark.skipif(not process_copy.LINUX, reason="copies of a process are made on Linux only, and this is another system")
MIB = 2**20


def small_tune(loss, target=16, **given):
    job = jobs.small(loss)
    return job, lambda: autoaccum.tune(job, target_batch=target, **{"memory_limit": "8GiB", **given})


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGBUS", "SIGABRT"])
def test_a_library_that_dies_above_a_size_is_an_outcome(name):
    def loss(model, batch):
        if len(batch[0]) > 4:
            os.kill(os.getpid(), getattr(signal, name))
            time.sleep(60)
        return jobs.mse(model, batch)

    job, tune = small_tune(loss)
    before = digest(job.model, job.optimizer)
    plan = tune()
    assert plan.micro_batch == 4 and any(f"was ended by {name} in forward, at a micro-batch of" in warning for warning in plan.warnings)
    assert digest(job.model, job.optimizer) == before


def test_a_real_fault_of_memory_is_an_outcome():
    def loss(model, batch):
        if len(batch[0]) > 4:
            ctypes.string_at(0)
        return jobs.mse(model, batch)

    assert small_tune(loss)[1]().micro_batch == 4


def test_a_kill_by_the_system_is_an_outcome():
    def loss(model, batch):
        if len(batch[0]) > 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return jobs.mse(model, batch)

    plan = small_tune(loss)[1]()
    assert plan.micro_batch == 4 and "was killed by the system" in plan.explain()


def test_a_job_that_ends_its_process_is_told_and_this_process_lives():
    def loss(model, batch):
        os._exit(7)

    with pytest.raises(autoaccum.JobFailed, match=r"ended the process \(exit code 7\) in forward, at a micro-batch of 1"):
        small_tune(loss)[1]()


def test_the_users_own_exception_comes_back_itself():
    class Own(Exception):
        def __init__(self, what, where):  # cannot be pickled
            super().__init__(what)
            self.where = where

    def loss(model, batch):
        raise Own("no such label", where=lambda: 1)

    with pytest.raises(Own) as raised:
        small_tune(loss)[1]()
    assert callable(raised.value.where) and "raised in forward, at a micro-batch of 1" in raised.value.__notes__[0]


def test_random_numbers_that_another_thread_draws_meanwhile_are_not_given_twice():
    """Nothing of ours draws in this process, so nothing is put back."""
    drawn, go, done = [], threading.Event(), threading.Event()

    def draw():
        go.wait(60)
        drawn.append(torch.rand(3))
        done.set()

    def progress(event):
        if type(event).__name__ == "Reading":
            go.set()
            done.wait(60)

    thread = threading.Thread(target=draw)
    thread.start()
    small_tune(jobs.mse, progress=progress)[1]()
    thread.join()
    assert not torch.equal(drawn[0], torch.rand(3))


def test_the_same_memory_is_held_in_the_copy():
    """Pages of libraries are not copied by a fork, and have to be there all the same."""
    (nn.Linear(64, 64)(torch.ones(8, 64))).sum().backward()
    held = Cpu().held_bytes()
    in_copy = process_copy.in_copy(lambda _: {"held": Cpu().held_bytes()}, None)["held"]
    assert -2 * MIB < in_copy - held < 24 * MIB  # its threads have stacks of their own


def test_what_torch_keeps_for_each_thread_goes_along():
    def state(_):
        return {
            "grad": torch.is_grad_enabled(),
            "autocast": [torch.is_autocast_enabled("cpu"), str(torch.get_autocast_dtype("cpu"))],
            "device": str(torch.ones(1).device),
            "threads": torch.get_num_threads(),
        }

    with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16), torch.device("meta"):
        inside, copied = state(None), process_copy.in_copy(state, None)
    assert inside == copied and inside["autocast"] == [True, "torch.float16"] and inside["device"] == "meta"


def test_a_copy_that_hangs_is_given_up_and_the_trials_run_here(monkeypatch):
    """As on a lock that another thread held when the process was copied."""
    monkeypatch.setattr(process_copy, "_HUNG_SECONDS", 1.0)
    original = os.getpid()

    def loss(model, batch):
        if os.getpid() != original:
            threading.Event().wait()
        return jobs.mse(model, batch)

    plan = small_tune(loss)[1]()
    assert plan.micro_batch == 16 and any("a copy of this process hung" in warning for warning in plan.warnings)


def test_ctrl_c_ends_the_copy_too():
    pids = Seen()

    def loss(model, batch):
        pids.append(os.getpid())
        time.sleep(60)

    def interrupt():
        wait_until(lambda: len(pids))
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    job, tune = small_tune(loss)
    before = digest(job.model, job.optimizer)
    with pytest.raises(KeyboardInterrupt):
        tune()
    thread.join()
    assert digest(job.model, job.optimizer) == before
    for pid in set(pids):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def conv_job(dtype=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    batch = torch.randn(8, 3, 64, 64), torch.arange(8)
    return autoaccum.Job(model, torch.optim.SGD(model.parameters(), lr=0.1), loss, batch, autocast=dtype)


def test_a_size_that_failed_does_not_make_smaller_ones_fail():
    """oneDNN remembers that it ran out: in one process every later size failed, and the answer was 2."""
    limit = limit_for(80)
    plan = autoaccum.tune(conv_job(), target_batch=200, memory_limit=limit, largest=True)
    assert plan.largest_fit > 20 and plan.smallest_refused == plan.largest_fit + 1
    assert not any("which is larger, fitted" in warning for warning in plan.warnings)


def test_bfloat16_under_a_limit_gives_one_answer():
    limit = limit_for(60)
    assert len({autoaccum.tune(conv_job(torch.bfloat16), target_batch=64, memory_limit=limit).micro_batches for _ in range(3)}) == 1


def test_where_no_process_can_be_made_the_trials_run_here():
    """And signals are as they were: a limit of the number of processes, which root does not have, stands for any reason."""
    code = (
        "import resource, signal, sys\nfrom autoaccum.probe import process_copy\n"
        "import os; os.setuid(65534)\nresource.setrlimit(resource.RLIMIT_NPROC, (0, 0))\n"
        "try: process_copy.in_copy(lambda _: {}, None)\nexcept process_copy.CopyRaised as error: print(error, signal.pthread_sigmask(signal.SIG_BLOCK, []))\n"
    )
    if os.getuid():
        code = code.replace("import os; os.setuid(65534)\n", "")
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert finished.stdout.startswith("no copy: ") and finished.stdout.strip().endswith("set()"), finished.stderr
