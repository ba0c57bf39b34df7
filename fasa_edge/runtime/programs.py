"""llama.cpp's programs, built on these libraries, where the build was asked for them (``FASA_PROGRAMS``).

As the libraries, they are those of ``FASA_LIB_PATH`` where that is set.
"""

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
        remedy = (
            "build it with `make programs` in the clone of fasa-edge, or with `CMAKE_ARGS=-DFASA_PROGRAMS=ON pip "
            "install` where pip compiles fasa-edge; wheels have no programs"
        )
        if given := os.environ.get("FASA_LIB_PATH"):
            remedy = f"FASA_LIB_PATH={given} says where: unset it, or build the programs there"
        raise LibraryError(f"{path.name} is not at {path.parent}: {remedy}")
    return path
