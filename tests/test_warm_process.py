"""Children that simulate come from one process that has imported torch; what ends it, or them, is never the end of a search."""

import os
import signal
import subprocess
import sys

import psutil
import pytest

import autoaccum
from autoaccum.probe import child as child_module
from autoaccum.probe.child import Child
from autoaccum.probe.readings import Limits
from autoaccum.warm_process import WarmProcess
from autoaccum.window.source import Source
from tests.command_line import ROOT, wait_until

SMALL = Source(f"{ROOT / 'tests/jobs.py'}:small", {})


def simulating(source=SMALL):
    return Child(source, "virtual:t4", Limits())


def fits(child):
    return child.measure([4]).fits


def forker(child):
    return psutil.Process(child._process.process.pid).parent().pid


def test_children_one_after_another_and_side_by_side_come_from_one_process():
    with simulating() as one, simulating() as other:
        assert fits(one) and fits(other)
        assert one._process.process.pid != other._process.process.pid and forker(one) == forker(other)
        server = forker(one)
    with simulating() as third:
        assert fits(third) and forker(third) == server


def test_a_child_has_the_environment_and_folder_of_the_moment(monkeypatch, tmp_path):
    (tmp_path / "job.py").write_text(
        "import os\nfrom tests.jobs import small\ndef make():\n    assert os.environ['MODE'] == 'two' and os.getcwd() == os.environ['PLACE']\n    return small()\n"
    )
    with simulating() as one:
        server = forker(one)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODE", "two")
    monkeypatch.setenv("PLACE", str(tmp_path))
    with simulating(Source(f"{tmp_path / 'job.py'}:make", {})) as two:
        assert fits(two) and forker(two) == server


def test_what_torch_reads_when_it_is_imported_gets_a_process_of_its_own(monkeypatch):
    with simulating() as one:
        before = forker(one)
        monkeypatch.setenv("TORCH_LOGS_OUT", os.devnull)
        with simulating() as two:
            assert forker(two) != before and fits(one) and fits(two)


@pytest.mark.parametrize("number, code", [(signal.SIGKILL, -9), (signal.SIGTERM, -15)])
def test_a_child_that_is_killed_is_told_by_its_signal(number, code):
    with simulating() as child:
        os.kill(child._process.process.pid, number)
        with pytest.raises(autoaccum.JobFailed, match=rf"exit code {code}\)"):
            child.simulated("estimated", gpu="t4")
    with simulating() as child:
        assert fits(child)


def test_where_the_process_that_forks_is_killed_the_next_child_has_another():
    with simulating() as child:
        first = forker(child)
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: child._process.process.poll() is not None)
        with pytest.raises(autoaccum.JobFailed, match="ended"):
            child.simulated("estimated", gpu="t4")
    with simulating() as child:
        assert fits(child) and forker(child) != first


def test_nothing_is_left_when_the_parent_is_killed():
    code = (
        "import sys; from tests.probe.test_warm_process import *\n"
        "with simulating() as child:\n    print(forker(child), child._process.process.pid, flush=True)\n    sys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        processes = [psutil.Process(int(word)) for word in parent.stdout.readline().split()]
        parent.kill()
    wait_until(lambda: not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes))


def test_a_measured_child_is_forked_so_in_tests_alone_and_reads_the_same(monkeypatch):
    with Child(SMALL, "cpu", Limits()) as child:
        assert not isinstance(child._process.process, subprocess.Popen)
        forked = child.measure([4]).peak_bytes
    monkeypatch.delenv(child_module.FORK_ALL)
    with Child(SMALL, "cpu", Limits()) as child:
        assert abs(child.measure([4]).peak_bytes - forked) < 0.03 * forked
    with Child(SMALL, "cpu", Limits()) as child:
        assert isinstance(child._process.process, subprocess.Popen)
    assert all(server._process.pid != child._process.process.pid for server in child_module._warm)


def test_it_ends_when_it_has_had_nothing_to_do_for_a_while():
    def program(descriptor):
        code = "from autoaccum.warm_process import serve; serve((), None, *map(int, sys.argv[1:]), idle_seconds=0.2)"
        return child_module.own_program(code, descriptor, os.getpid())

    server = WarmProcess(program, dict(os.environ))
    wait_until(lambda: not server.serves(dict(os.environ)))
    assert server.fork(dict(os.environ), 0, 1, 2) is None  # then a child starts anew
