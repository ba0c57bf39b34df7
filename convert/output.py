"""Output files: checked before any time is spent, written beside their place, renamed when complete."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from fasa_edge.errors import ConvertError

_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_output(destination: str | Path, source: Path, n_bytes: int, *, force: bool = False) -> None:
    """Refuses a destination that could not be written.

    Args:
        destination: file to be written.
        source: file that it is made from.
        n_bytes: space that it needs.
        force: allow an existing destination.

    Raises:
        ConvertError: the destination exists without ``force``, is the source itself or a folder, its folder does not
            exist, or the disk has too little space.
    """
    destination = Path(destination)
    folder = destination.parent
    if not folder.is_dir():
        raise ConvertError(f"{destination} cannot be written: {folder} is not a folder; create it first")
    if destination.is_dir():
        raise ConvertError(f"{destination} cannot be written: it is a folder; name a file")
    if destination.exists():
        if destination.samefile(source):
            raise ConvertError(f"{destination} is the source itself: choose another output file")
        if not force:
            raise ConvertError(f"{destination} exists: choose another output file or pass --force")
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise ConvertError(
            f"{destination} needs {n_bytes} bytes but {folder} has {free} free: make room or choose another folder"
        )


@contextmanager
def replacing(destination: str | Path, source: Path, n_bytes: int) -> Iterator[BinaryIO]:
    """A temporary file that takes the destination's place at the end of the context, and after an error is removed.

    Args:
        destination: file to be written, in an existing folder.
        source: file that it is made from, whose permissions it gets.
        n_bytes: its size, for the message of an error.

    Raises:
        ConvertError: reading or writing failed.
    """
    destination = Path(destination)
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(
            dir=destination.parent, prefix=f".{destination.name}.", suffix=".tmp", delete=False
        ) as target:
            temporary = Path(target.name)
            yield target
            target.flush()
            os.fsync(target.fileno())
        shutil.copymode(source, temporary)
        os.replace(temporary, destination)
    except BaseException as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        full = error.errno in _OUT_OF_SPACE
        remedy = "make room or choose another folder" if full else "check the disk and the rights of its folder"
        raise ConvertError(f"{destination} cannot be written ({n_bytes} bytes): {error.strerror}; {remedy}") from error


def write_bytes(destination: str | Path, source: Path, data: bytes, *, force: bool = False) -> int:
    """Writes a small file under the rules of :func:`check_output` and :func:`replacing`, and returns its size."""
    check_output(destination, source, len(data), force=force)
    with replacing(destination, source, len(data)) as target:
        return target.write(data)
