"""Turns what llama.cpp logs as an error into something an exception can say: its C API only returns NULL."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

from fasa_edge._lib import llama_cpp

_LEVEL_ERROR = 4  # enum ggml_log_level (ggml.h)


@contextmanager
def error_log() -> Iterator[list[str]]:
    """Collect llama.cpp's error lines while the context is open; they go to the bindings' own logger as well."""
    lines: list[str] = []
    forward = llama_cpp._logger.llama_log_callback

    @llama_cpp.llama_log_callback
    def collect(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
        if level == _LEVEL_ERROR:
            lines.append(text.decode("utf-8", "replace").strip())
        forward(level, text, user_data)

    llama_cpp.llama_log_set(collect, ctypes.c_void_p(0))
    try:
        yield lines
    finally:
        llama_cpp.llama_log_set(forward, ctypes.c_void_p(0))
