"""A small program that runs one command under a memory cap and reports its exit code and its peak resident bytes.

    python capped_process.py REPORT_DESCRIPTOR CAP_BYTES|none WORD...

It is started by its path and imports nothing from autoaccum. It stands between the parent and the command for two reasons.
The cap is set between fork and exec, which is not safe in a parent with threads. And a child inherits the kernel's figure of
largest resident bytes from the process that forks it: a parent that holds torch would pass on its own, larger figure.
"""

import ctypes
import json
import os
import resource
import signal
import sys


def main() -> None:
    """Runs the command and writes its figures as JSON to the report descriptor. The cap is RLIMIT_DATA in bytes, or "none"."""
    report, cap, words = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    _die_with_parent()
    pid = os.fork()
    if pid == 0:
        os.close(report)
        _die_with_parent()
        if cap != "none":
            hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
            resource.setrlimit(resource.RLIMIT_DATA, (int(cap) if hard == resource.RLIM_INFINITY else min(int(cap), hard), hard))
        try:
            os.execvp(words[0], words)
        except OSError as error:
            os.write(2, f"{words[0]}: {error.strerror}\n".encode())
            os._exit(127)
    _, status, usage = os.wait4(pid, 0)
    os.write(report, json.dumps({"code": os.waitstatus_to_exitcode(status), "ru_maxrss": usage.ru_maxrss}).encode())


def _die_with_parent() -> None:
    """Asks the kernel to end this process when its parent ends. https://man7.org/linux/man-pages/man2/prctl.2.html"""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    main()
