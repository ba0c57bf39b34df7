"""llama.cpp's programs, built on these libraries, where the build was asked for them (``FASA_PROGRAMS``)."""

from __future__ import annotations

import os
from pathlib import Path

from fasa_edge.errors import LibraryError
from fasa_edge.runtime.library import lib_dir

PROGRAMS = ("server", "cli", "bench", "perplexity", "quantize", "gguf-split")
"""Names without the ``fasa-llama-`` before them."""


def find_program(name: str) -> Path:
    """Find a program beside the libraries, where ggml looks for its backends.

    Args:
        name: one of :data:`PROGRAMS`.

    Raises:
        LibraryError: it was not built.
    """
    path = lib_dir() / f"fasa-llama-{name}{'.exe' if os.name == 'nt' else ''}"
    if not path.is_file():
        raise LibraryError(
            f"{path.name} is not at {path.parent}: build it with `make programs` in the clone of fasa-edge, or with "
            "`CMAKE_ARGS=-DFASA_PROGRAMS=ON pip install` where pip compiles fasa-edge"
        )
    return path
