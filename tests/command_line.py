"""Runs the command line as a user does, in a process of its own. One process per test worker has imported it and forks each command, and one has
imported torch and forks their children.

python -m tests.command_line: the process that forks.
"""

import atexit
import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from tests import forked

ROOT = Path(__file__).parent.parent


def autoaccum(*words, cwd=ROOT, env=None, timeout=120):
    """The finished process: returncode, stdout, stderr."""
    if words[:1] == ("train",):  # it imports torch itself
        return forked.run("from autoaccum.cli import main; main()", *words, cwd=cwd, env=env, timeout=timeout)
    if not _server or _server[0].poll() is not None:
        _server[:] = [_started()]
    server, environment = _server[0], {name: value for name, value in {**os.environ, **(env or {})}.items() if name != "PYTEST_CURRENT_TEST"}
    with tempfile.TemporaryDirectory() as folder:
        out, err = f"{folder}/out", f"{folder}/err"
        request = {"words": list(map(str, words)), "folder": str(cwd), "environment": environment, "out": out, "err": err, "timeout": timeout}
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        code = json.loads(server.stdout.readline())
        said = [Path(path).read_bytes().decode() for path in (out, err)]
    command = [sys.executable, "-m", "autoaccum", *map(str, words)]
    if code is None:
        server.kill()
        raise subprocess.TimeoutExpired(command, timeout, *said)
    return subprocess.CompletedProcess(command, code, *said)


_server = []


def _started():
    command = [sys.executable, "-m", "tests.command_line"]
    started = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True)
    atexit.register(forked.ended, started)
    return started


def document(finished):
    """The one JSON document on stdout."""
    return json.loads(finished.stdout)


def wait_until(condition, seconds=60):
    """Polls for what another process does; there is nothing to wait on."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        threading.Event().wait(0.02)


def main():
    import autoaccum.cli.commands  # noqa: F401 - each command would
    from autoaccum.probe import child
    from autoaccum.warm_process import WarmProcess, _read_at_start

    class Shared(WarmProcess):
        """One for all commands, which run one after another."""

        def serves(self, environment):
            return self._environment == _read_at_start(environment)

    told, warm = os.fdopen(os.dup(1), "w"), None
    while line := sys.stdin.readline():
        request = json.loads(line)
        if warm is None or warm._process.poll() is not None:
            warm = Shared(child._warm_program, dict(os.environ))
        pid = os.fork()
        if pid == 0:
            told.close()
            child._warm[:] = [warm]
            _become(request)
        signal.signal(signal.SIGALRM, lambda *_, pid=pid: _kill(pid))
        signal.alarm(request["timeout"])
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        _kill(pid)  # what it left behind
        told.write(json.dumps(code if signal.alarm(0) else None) + "\n")
        told.flush()


def _kill(pid):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _become(request):
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, path in ((1, request["out"]), (2, request["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), descriptor)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.path[0] = request["folder"]  # as `python -m` has it
    sys.argv = ["autoaccum", *request["words"]]
    code = 1
    try:
        runpy.run_module("autoaccum", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else ended.code is not None
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
