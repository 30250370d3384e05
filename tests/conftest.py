import gc
import os
import re
import signal
from pathlib import Path

# Before torch is imported, here and in every child process: two cores are shared by everything that runs.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("AUTOACCUM_MALLOC", None)
os.environ["AUTOACCUM_FORK_ALL"] = "1"  # children that measure start at once; where it matters that they start anew, a test says so

import pytest
import torch
from hypothesis import settings

# A shell that starts the tests in the background has them ignore SIGINT, and their children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)

# No test asserts a time: on a busy machine one example of a property once took 389 ms, and 1 ms when it was run again.
settings.register_profile("without a clock", deadline=None)
settings.load_profile("without a clock")


@pytest.fixture(autouse=True)
def nothing_remembered(tmp_path, monkeypatch):
    """Nothing of the user's is read or written, and every test searches anew."""
    monkeypatch.setenv("AUTOACCUM_CACHE_DIR", str(tmp_path / "readings"))
    monkeypatch.delenv("AUTOACCUM_MALLOC", raising=False)  # a benchmark that an earlier test imported turns the steady allocator off


@pytest.fixture(autouse=True, scope="module")
def earlier_objects_frozen():
    """What was imported and made before a file's tests is left out of garbage collections, of which every trial makes two: with all
    libraries loaded a full one takes half a second."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


# A file with one of these words starts processes or imports a framework.
HEAVY = re.compile(
    r"command_line|tests\.ranked|tests\.simulated|tests\.forked|import forked|subprocess|devices\.fresh|importorskip|multiprocessing|in_fresh_process"
)


# Tests that take more than three seconds, but for some of each kind: not in `make test`, but in `make test-all`, and where a file or a test is named.
LONG = Path(__file__).with_name("long_tests.txt")


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="also the tests of long_tests.txt")
    parser.addoption("--quick", action="store_true", help="only files that start no process and import no framework, without tests that are marked slow")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--quick"):
        quick = {path for path in {item.path for item in items} if path.parent.name != "integrations" and not HEAVY.search(path.read_text())}
        kept = [item for item in items if item.path in quick and not item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    long = set(LONG.read_text().splitlines())
    if whole and not config.getoption("--quick") and (unknown := long - {item.nodeid for item in items}):
        raise pytest.UsageError(f"{LONG.name} names tests that there are not: {', '.join(sorted(unknown))}")
    if whole and not config.getoption("--all"):
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in long])
        items[:] = [item for item in items if item.nodeid not in long]
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and none is here"))
