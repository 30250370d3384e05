"""Runs the command line as a user does: a process of its own."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def autoaccum(*words, cwd=ROOT, env=None, timeout=120):
    """The finished process: returncode, stdout, stderr."""
    command = [sys.executable, "-m", "autoaccum", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **(env or {})}, timeout=timeout, check=False)


def document(finished):
    """The one JSON document on stdout."""
    return json.loads(finished.stdout)


def wait_until(condition, seconds=60):
    """Polls for what another process does; there is nothing to wait on."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        threading.Event().wait(0.02)
