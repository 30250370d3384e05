"""A fresh interpreter: what a process holds, and what it has imported, is not disturbed by this test run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any


def fresh(code: str, **environment: str) -> Any:
    """Runs `code` and returns the JSON document that it prints."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "AUTOACCUM_"))}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**kept, "OMP_NUM_THREADS": "1", **environment}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
