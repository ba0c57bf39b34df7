"""Output files: checked before any time is spent, complete or not there at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fasa_edge.errors import ConvertError

_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_output(path: Path, source: Path | None = None, *, force: bool = False) -> None:
    """Refuses a file that could not be written.

    Args:
        path: file to be written.
        source: file that it is made from, which it must not replace.
        force: allow an existing one.

    Raises:
        ConvertError: the file exists without ``force``, is the source itself, a folder or a device, or its folder does
            not exist.
    """
    if not path.parent.is_dir():
        raise ConvertError(f"{path} cannot be written: {path.parent} is not a folder; create it first")
    if path.is_dir():
        raise ConvertError(f"{path} cannot be written: it is a folder; name a file")
    if path.exists():
        if not path.is_file():
            raise ConvertError(f"{path} cannot be written: it is a device or the like; name a file")
        if source is not None and path.samefile(source):
            raise ConvertError(f"{path} is the source itself: choose another output file")
        if not force:
            raise ConvertError(f"{path} exists: choose another output file or pass --force")


@contextmanager
def staged(destinations: Sequence[Path], n_bytes: int) -> Iterator[list[Path]]:
    """Makes an empty temporary file beside each destination; they take their places when the block ends.

    If the block or a rename fails, the temporary files and all destinations that did not exist before are removed. Of
    those that did exist, the ones renamed before the failure keep their new content: the old one is gone.

    Args:
        destinations: in the order of the renames; the file that makes the others useful belongs last.
        n_bytes: what will be written, for the message of an error.

    Raises:
        ConvertError: the system refuses to read or write.
    """
    destinations = [Path(os.path.realpath(destination)) for destination in destinations]  # links stay
    temporaries: list[Path] = []
    new: list[Path] = []
    try:
        for destination in destinations:
            handle, name = tempfile.mkstemp(dir=destination.parent, prefix=f".{destination.name}.", suffix=".tmp")
            os.close(handle)
            temporaries.append(Path(name))
        yield temporaries
        for temporary, destination in zip(temporaries, destinations, strict=True):
            if not destination.exists():
                new.append(destination)
            os.replace(temporary, destination)
    except BaseException as error:
        for path in new:
            path.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        full = error.errno in _OUT_OF_SPACE
        remedy = "make room or choose another folder" if full else "check the disk and the rights of its folder"
        raise ConvertError(
            f"{destinations[-1]} cannot be written ({n_bytes} bytes): {error.strerror}; {remedy}"
        ) from error
    finally:
        for path in temporaries:  # also a hard link to what its destination is already: renaming that does nothing
            path.unlink(missing_ok=True)


def write_bytes(path: Path, source: Path | None, data: bytes, *, force: bool = False) -> int:
    """Writes a small file under the rules of :func:`check_output` and :func:`staged`.

    Args:
        path: file to be written.
        source: file that it is made from, whose permissions it gets; None: those of any new file.
        data: its content.
        force: replace an existing one.

    Returns:
        Its size.
    """
    check_output(path, source, force=force)
    with staged([path], len(data)) as (temporary,):
        fill(temporary, source, data)
    return len(data)


def fill(temporary: Path, source: Path | None, data: bytes) -> None:
    """Writes a small temporary file of :func:`staged` down to the disk, with the permissions of ``source``."""
    with temporary.open("wb") as target:
        target.write(data)
        target.flush()
        os.fsync(target.fileno())
    if source is not None:
        shutil.copymode(source, temporary)
    else:
        os.umask(umask := os.umask(0))
        temporary.chmod(0o666 & ~umask)
