"""llama.cpp's log while a model is loaded: its errors become texts of exceptions, since its C API only returns NULL,
and a quiet load prints nothing.

The process has one log callback, which is the application's. While anything is loaded here ours stands in for it, tells
threads apart, and passes on all that it hears; then the application's is back.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from fasa_edge.runtime.library import llama_cpp

_LEVEL_ERROR = 4  # enum ggml_log_level (ggml.h)


class _Thread(threading.local):
    """Who listens in a thread, and whether it is to print nothing."""

    listeners: tuple[list[str], ...] = ()
    is_quiet = False


def _address(callback: Any) -> int | None:
    return ctypes.cast(callback, ctypes.c_void_p).value


_thread = _Thread()
_lock = threading.Lock()
_n_open = 0
_application = llama_cpp._logger.llama_log_callback
_user_data = ctypes.c_void_p()
_printer = _address(_application)  # the bindings' own, which prints to sys.stderr


@llama_cpp.llama_log_callback
def _dispatch(level: int, text: bytes, user_data: int | None) -> None:
    if level == _LEVEL_ERROR:
        for lines in _thread.listeners:
            lines.append(text.decode("utf-8", "replace").strip())
    if not (_thread.is_quiet and _address(_application) == _printer):
        _application(level, text, user_data)


def _installed() -> tuple[Any, ctypes.c_void_p]:
    callback, user_data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(callback), ctypes.byref(user_data))
    return callback, user_data


def _is_ours(callback: Any) -> bool:
    return _address(callback) == _address(_dispatch)


@contextmanager
def _standing_in() -> Iterator[None]:
    """Ours is the callback, however many threads load; one that the application sets meanwhile stays."""
    global _n_open, _application, _user_data
    with _lock:
        _n_open += 1
        callback, user_data = _installed()
        if not _is_ours(callback):
            _application, _user_data = callback, user_data
            # with its user data: a thread that logs at this moment may get the one of ours and the other of it
            llama_cpp.llama_log_set(_dispatch, _user_data)
    try:
        yield
    finally:
        with _lock:
            _n_open -= 1
            if _n_open == 0 and _is_ours(_installed()[0]):
                llama_cpp.llama_log_set(_application, _user_data)


@contextmanager
def error_log() -> Iterator[list[str]]:
    """Collect the error lines of this thread while the context is open; the application's callback gets them, too."""
    lines: list[str] = []
    before = _thread.listeners
    with _standing_in():
        _thread.listeners = (*before, lines)
        try:
            yield lines
        finally:
            _thread.listeners = before


@contextmanager
def quiet_log() -> Iterator[None]:
    """Let the bindings print nothing of this thread while the context is open; another callback still gets all."""
    before = _thread.is_quiet
    with _standing_in():
        _thread.is_quiet = True
        try:
            yield
        finally:
            _thread.is_quiet = before


@contextmanager
def unheard() -> Iterator[None]:
    """Do as :func:`quiet_log`, and collect no errors of this thread either: something is only tried."""
    before = _thread.listeners
    with quiet_log():
        _thread.listeners = ()
        try:
            yield
        finally:
            _thread.listeners = before


def _suppress_stdout_stderr(disable: bool = True) -> AbstractContextManager:
    return nullcontext() if disable else quiet_log()


# The bindings load a model with the standard streams of the whole process, all its threads, at /dev/null.
for _module in (llama_cpp._internals, llama_cpp.llama):
    _module.suppress_stdout_stderr = _suppress_stdout_stderr
