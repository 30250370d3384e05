"""Programs in processes of their own that start at once: one process has imported torch, and forks each of them.

Not for a program whose memory is measured, or that must be the first to import something: those start anew.
"""

import atexit
import contextlib
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(program, *words, copies=({},), cwd=ROOT, env=None, timeout=120, imports=()):
    """Runs `program`, a file's path or Python code, as often as there are `copies`, side by side: each has additional variables for one process.

    imports: modules that the process which forks imports first, once.
    The finished process, as `subprocess.run` returns it; the exit code is the first that is not 0.
    """
    if not _server or _server[0].poll() is not None:
        _server[:] = [_started()]
    server = _server[0]
    base = {name: value for name, value in {**os.environ, **(env or {})}.items() if name != "PYTEST_CURRENT_TEST"}
    with tempfile.TemporaryDirectory() as folder:
        out, err = f"{folder}/out", f"{folder}/err"
        request = {
            "program": str(program), "words": [str(word) for word in words], "folder": str(cwd), "out": out, "err": err, "timeout": timeout,
            "imports": list(imports),
            "environments": [{**base, **copy} for copy in copies],
        }  # fmt: skip
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        code = json.loads(server.stdout.readline())
        said = [Path(path).read_text() for path in (out, err)]
    if code is None:
        raise subprocess.TimeoutExpired(str(program)[:200], timeout, said[0], said[1])
    return subprocess.CompletedProcess([str(program)[:200], *words], code, *said)


_server = []


def _started():
    command = [sys.executable, "-m", "tests.forked"]
    env = {**{name: value for name, value in os.environ.items() if name != "AUTOACCUM_MALLOC"}, "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=env, start_new_session=True)
    atexit.register(ended, started)
    return started


def ended(server):
    """Ends a process that forks, as its worker ends."""
    server.kill()
    server.communicate()  # closes its pipes


def main():
    import torch._dynamo
    import torch.distributed

    import tests.simulated  # noqa: F401

    torch.set_num_threads(1)
    told = os.fdopen(os.dup(1), "w")
    while line := sys.stdin.readline():
        request = json.loads(line)
        for name in request["imports"]:
            importlib.import_module(name)
        children = []
        for environment in request["environments"]:
            pid = os.fork()
            if pid == 0:
                told.close()
                return _become(request, environment)
            children.append(pid)
        code = 0
        signal.signal(signal.SIGALRM, lambda *_, children=children: [_kill(child) for child in children])
        signal.alarm(request["timeout"])
        for child in children:
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            code = code or status
        code = code if signal.alarm(0) else None
        told.write(json.dumps(code) + "\n")
        told.flush()


def _kill(child):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)


def _become(request, environment):
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, path in ((1, request["out"]), (2, request["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(request["folder"])
    program = request["program"]
    if "\n" in program or not program.endswith(".py"):
        sys.argv = ["-c", *request["words"]]
        exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = [program, *request["words"]]
        sys.path.insert(0, str(Path(program).parent))
        runpy.run_path(program, run_name="__main__")
    if len(request["environments"]) > 1:  # ranks: gloo's threads abort now and then as an interpreter ends
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
