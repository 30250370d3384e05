"""Commands that run on several ranks: the numbers are those of one rank, the target is of all, and so is the memory."""

import os
import re
import socket
import sys
import textwrap

import pytest

from tests.command_line import autoaccum as run
from tests.command_line import document

MIB = 2**20
STEPS = """
def steps(rank, size, accumulation_steps):
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = 0
    for _ in range(accumulation_steps):
        model(torch.randn(size, 4)).mean().backward()
        seen += size
    optimizer.step()
    total = torch.tensor(seen)
    dist.all_reduce(total)
    if rank == 0:
        print(f"SEEN {total.item()}", flush=True)
    dist.barrier()  # a rank that leaves while the others are still connected may end them
    dist.destroy_process_group()
"""


@pytest.fixture
def script(tmp_path):
    def write(text):
        path = tmp_path / "train.py"
        head = "import os, sys, time, torch\nimport torch.distributed as dist\nimport torch.multiprocessing as mp\ntorch.set_num_threads(1)\n"
        path.write_text(head + STEPS + textwrap.dedent(text))
        return str(path)

    return write


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def seen(finished):
    return [int(number) for number in re.findall(r"SEEN (\d+)", finished.stderr)]


LAUNCHED = """
dist.init_process_group("gloo")
steps(dist.get_rank(), int(sys.argv[1]), int(sys.argv[2]))
"""

SPAWNED = """
def rank_of(rank, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, USE_LIBUV="0")
    dist.init_process_group("gloo", rank=rank, world_size=2)
    steps(rank, int(sys.argv[1]), int(sys.argv[2]))

if __name__ == "__main__":
    mp.spawn(rank_of, (sys.argv[3],), nprocs=2)
"""


def test_ranks_behind_torchrun_share_the_target(script):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    finished = run("check", "-b", 24, "-m", 6, "-d", "cpu", "--", *torchrun, script(LAUNCHED), "{micro_batch}", "{accumulation_steps}")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("24 = 6 x 2 on each of 2 ranks") and "runs on 2 ranks: the numbers are those of one rank" in finished.stdout
    assert set(seen(finished)) == {24}


def test_ranks_that_no_launcher_names_are_seen_when_it_runs(script):
    """torch.multiprocessing.spawn says nothing in the command's words or in anyone's environment."""
    words = [sys.executable, script(SPAWNED), "{micro_batch}", "{accumulation_steps}", str(free_port())]
    finished = run("check", "-b", 24, "-m", 6, "-d", "cpu", "--json", "--", *words)
    plan = document(finished)
    assert (plan["world_size"], plan["share"], plan["shares"], plan["micro_batches"]) == (2, 12, [12, 12], [6, 6]) and plan["effective_batch"] == 24
    assert seen(finished)[-1] == 24


# As every launcher does: ranks are told in their environment. Nothing of torch is in it.
TOLD = """
import os, subprocess, sys
sleep = [sys.executable, "-c", "import time; time.sleep(1)"]
ranks = [subprocess.Popen(sleep, env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"}) for rank in range(2)]
sys.exit(max(rank.wait() for rank in ranks))
"""


def test_ranks_are_seen_in_their_environment_and_what_does_not_agree_is_told(tmp_path):
    (tmp_path / "launch.py").write_text(TOLD)
    words = ("--", sys.executable, "launch.py", "{micro_batch}")
    told = run("check", "-b", 24, "-m", 6, "-d", "cpu", "--format", "env", *words, cwd=tmp_path)
    assert told.returncode == 0 and "AUTOACCUM_WORLD_SIZE=2" in told.stdout and "AUTOACCUM_ACCUMULATION_STEPS=2" in told.stdout
    wrong = run("check", "-b", 24, "-m", 4, "-d", "cpu", "--world", 3, *words, cwd=tmp_path)
    assert wrong.returncode == 2 and "--world says 3, and the command runs on 2 ranks" in wrong.stderr
    right = run("check", "-b", 24, "-m", 4, "-d", "cpu", "--world", 2, *words, cwd=tmp_path)
    assert right.returncode == 0 and right.stdout.startswith("24 = 4 x 3 on each of 2 ranks")
    uneven = run("tune", "-b", 25, "-d", "cpu", *words, cwd=tmp_path)
    assert uneven.returncode == 2 and "does not divide into 2 equal parts: 24 or 26 does" in uneven.stderr


HOLDS = """
import os, sys, time
size, shared = int(sys.argv[1]), bytearray(64 * 2**20) if sys.argv[2] == "shared" else None
if shared is not None:
    shared[:: 4096] = b"x" * len(shared[:: 4096])
children = []
for _ in range(2):
    pid = os.fork()
    if pid == 0:
        held = bytearray((8 * size) * 2**20)
        held[:: 4096] = b"x" * len(held[:: 4096])
        time.sleep(1)
        os._exit(0)
    children.append(pid)
for child in children:
    os.waitpid(child, 0)
"""


def test_the_memory_of_all_processes_counts_and_what_they_share_counts_once(tmp_path):
    path = tmp_path / "holds.py"
    path.write_text(HOLDS)

    def peak(size, kind):
        return document(run("check", "-b", size, "-m", size, "-d", "cpu", "--json", "--", sys.executable, path, "{micro_batch}", kind))["peak_bytes"]

    small, large = peak(1, "alone"), peak(5, "alone")
    assert 60 * MIB < large - small < 70 * MIB  # two processes of 32 MiB more
    assert 55 * MIB < peak(1, "shared") - small < 75 * MIB  # and not three times 64


def test_the_limit_holds_for_the_sum(tmp_path):
    path = tmp_path / "holds.py"
    path.write_text(HOLDS)
    finished = run("tune", "-b", 16, "-d", "cpu", "--memory-limit", "160MiB", "--json", "--", sys.executable, path, "{micro_batch}", "alone")
    plan = document(finished)
    # Two processes of 64 MiB each, beside three interpreters, fit, and two of 128 do not.
    assert plan["micro_batch"] == 8 and plan["smallest_refused"] == 16 and plan["peak_bytes"] <= plan["budget_bytes"]
    assert os.path.exists(path)
