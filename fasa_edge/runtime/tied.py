"""Runs a program that ends with the process that starts it, however that ends: ``python tied.py PID PROGRAM ...``.

It becomes the program. Nothing of this is done between fork and exec of that process, where another of its threads may
hold a lock that nobody is left to release. Only the standard library is used, and nothing imports this file.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def tie(parent: int) -> None:
    """Let this process be killed when ``parent`` is gone, which started it and holds the other end of its input."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # gone before
            sys.exit(1)
    elif os.fork() == 0:  # another process waits for it
        program = os.getppid()
        os.read(sys.stdin.fileno(), 1)
        if os.getppid() == program:
            os.kill(program, signal.SIGKILL)
        os._exit(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())


if __name__ == "__main__":
    tie(int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])
