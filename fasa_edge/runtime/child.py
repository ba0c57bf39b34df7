"""Processes that end with this one, and functions called in one.

On a GPU, whoever made a context there keeps memory until its process ends: what runs on asks another.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fasa_edge.errors import FasaError

_T = TypeVar("_T")

_GRACE = 10  # seconds for what a process is computing when it is to end


@contextlib.contextmanager
def tied(command: Sequence[str], **attributes: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process, and end it with the block.

    Signals of the terminal do not reach it: it ends when it is told to, once. It is killed when this process is, also
    by SIGKILL, and on Linux already when the thread that entered the block ends; on Windows it is not.

    Args:
        command: a program and its arguments.
        attributes: of ``subprocess.Popen``, but for ``stdin``.
    """
    if os.name == "posix":
        become = Path(__file__).with_name("tied.py")
        command = [sys.executable, "-I", "-S", str(become), str(os.getpid()), *command]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, **attributes)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(_GRACE)
        except BaseException as error:  # or it would outlive a second Ctrl-C
            process.kill()
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
        finally:
            for pipe in filter(None, (process.stdin, process.stdout, process.stderr)):
                pipe.close()


def python(function: Callable[..., object], *arguments: str) -> list[str]:
    """Return the command that calls a function of a module with these words.

    The process imports what this one did, and runs nothing of its ``__main__``.
    """
    code = (
        "import sys; sys.path[:] = sys.argv[1].split(sys.argv[2]); "
        f"from {function.__module__} import {function.__name__} as call; call(*sys.argv[3:])"
    )
    return [sys.executable, "-c", code, os.pathsep.join(sys.path), os.pathsep, *arguments]


def call(function: Callable[..., _T], *arguments: Any, **named: Any) -> _T:
    """Call a function of a module in a process of its own, which has our standard error.

    Args:
        function: what it returns and raises is copied (``pickle``), as are its arguments.
        arguments: of the function.
        named: likewise.

    Raises:
        FasaError: the process ended before the function did.
        Exception: what the function raises.
    """
    request = pickle.dumps((function, arguments, named)).hex()
    without_debugger = os.environ | {"GGML_NO_BACKTRACE": "1"}
    with tied(python(_answer, request), stdout=subprocess.PIPE, env=without_debugger) as process:
        answer = process.stdout.read()  # type: ignore[union-attr]
        status = process.wait()
    if status:
        raise FasaError(
            f"{function.__name__} ended its process with status {status}: see what it says above; if a file is "
            "damaged, download or convert it again"
        )
    result, error = pickle.loads(answer)
    if error is not None:
        raise error
    return result


def _answer(request: str) -> None:
    """Write what a function returns, and what it raises; in the child."""
    with os.fdopen(os.dup(1), "wb") as answer:
        os.dup2(2, 1)  # for whatever prints
        function, arguments, named = pickle.loads(bytes.fromhex(request))
        try:
            pickle.dump((function(*arguments, **named), None), answer)
        except Exception as error:
            pickle.dump((None, error), answer)
