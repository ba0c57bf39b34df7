"""A text to calibrate or measure on: a user's file, or the Python documentation that CPython ships."""

from __future__ import annotations

import os
from pathlib import Path

from fasa_edge.errors import ConvertError

DEFAULT_NAME = "pydoc_data.topics"


def read_text(path: str | os.PathLike[str] | None = None) -> tuple[str, str]:
    """Reads a text.

    Args:
        path: a UTF-8 file; None for CPython's ``pydoc_data.topics``, some 450 KB of English, in sorted key order.

    Returns:
        Name and text. The name of a file is without its folder, so that the same text gives the same profile anywhere.

    Raises:
        ConvertError: the file cannot be read or is not UTF-8, or this Python comes without its documentation.
    """
    if path is None:
        try:
            from pydoc_data.topics import topics
        except ImportError as error:  # some distributions package it apart
            raise ConvertError(f"this Python has no {DEFAULT_NAME}: give a text file with --text") from error
        return DEFAULT_NAME, "\n\n".join(topics[key] for key in sorted(topics))
    path = Path(path)
    try:
        return path.name, path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConvertError(f"text {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConvertError(
            f"text {path} is not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start}; save it as UTF-8"
        ) from error
