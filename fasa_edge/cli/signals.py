"""Signals that end a command, turned into an exception, so that what the command began is undone on the way out."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGQUIT") if hasattr(signal, name)]
_AGAIN_AFTER = 0.05  # seconds


class _Terminated(BaseException):
    """No Exception: nothing but the end of the command is to catch it."""


@contextlib.contextmanager
def unwound_by_signals() -> Iterator[None]:
    """Let SIGTERM, SIGHUP and SIGQUIT unwind the block as Ctrl-C does; then the process dies of them."""
    if threading.current_thread() is not threading.main_thread():  # Python's signals are of the main thread
        yield
        return
    received: list[int] = []

    def end(number: int, frame: object) -> None:
        for other in before:
            signal.signal(other, signal.SIG_IGN)  # a second one would break the undoing off
        received.append(number)
        raise _Terminated

    # what is ignored, as under nohup, stays so
    before = {number: signal.signal(number, end) for number in _SIGNALS if signal.getsignal(number) == signal.SIG_DFL}
    try:
        with _raised_again():
            yield
    except _Terminated:
        pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or None
            sys.stdout.flush()
        os.kill(os.getpid(), received[0])


@contextlib.contextmanager
def _raised_again() -> Iterator[None]:
    """What ends a command is raised again if it came in a callback from C, as of llama.cpp's log, which swallows it."""
    if not hasattr(signal, "setitimer"):  # Windows
        yield
        return
    swallowed: list[BaseException] = []
    report, on_alarm = sys.unraisablehook, signal.getsignal(signal.SIGALRM)

    def hook(unraisable: Any) -> None:
        if isinstance(unraisable.exc_value, (_Terminated, KeyboardInterrupt)):
            swallowed.append(unraisable.exc_value)
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_AFTER)
        else:
            report(unraisable)

    def again(number: int, frame: object) -> None:
        raise swallowed.pop()

    sys.unraisablehook = hook
    signal.signal(signal.SIGALRM, again)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, on_alarm)
        sys.unraisablehook = report
