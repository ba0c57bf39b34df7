"""Output files: checked before any time is spent, complete or not there at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fasa_edge.errors import ConvertError
from fasa_edge.io.temporary import work_folder

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV, errno.EINVAL)
_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_outputs(paths: Sequence[Path], inputs: Iterable[Path] = (), *, force: bool = False) -> None:
    """Refuses files that could not or must not be written, and removes what a killed run left of them.

    Args:
        paths: files to be written.
        inputs: files that are read, which no output may replace.
        force: allow existing outputs.

    Raises:
        ConvertError: a file exists (also as a link to nowhere) without ``force``, is an input, another output, a folder
            or a device, or its folder does not exist or cannot be written.
    """
    inputs = list(inputs)
    for i, path in enumerate(paths):
        _check_output(path, force)
        refuse_inputs(path, inputs)
        if any(_same(path, other) for other in paths[:i]):
            raise ConvertError(f"{path} is named for two outputs: choose two files")


def refuse_inputs(path: Path, inputs: Iterable[Path]) -> None:
    """Refuses an output that is one of the inputs, by whatever name.

    Raises:
        ConvertError: it is.
    """
    for other in inputs:
        if _same(path, other):
            raise ConvertError(f"{path} cannot be written: it is the input {other} itself; choose another output file")


def _same(path: Path, other: Path) -> bool:
    if os.path.realpath(path) == os.path.realpath(other):
        return True
    return path.exists() and other.exists() and path.samefile(other)


def _check_output(path: Path, force: bool) -> None:
    if path.is_dir():
        raise ConvertError(f"{path} cannot be written: it is a folder; name a file")
    if path.exists() and not path.is_file():
        raise ConvertError(f"{path} cannot be written: it is a device or the like; name a file")
    if os.path.lexists(path) and not force:
        raise _exists(path)
    target = Path(os.path.realpath(path))  # links stay
    if not target.parent.is_dir():
        raise ConvertError(f"{path} cannot be written: {target.parent} is not a folder; create it first")
    try:
        with work_folder(target.name, target.parent):
            pass
    except OSError as error:
        raise ConvertError(
            f"{path} cannot be written: {error.strerror}; choose another folder, or see to the rights of this one"
        ) from error


def _exists(path: Path) -> ConvertError:
    nowhere = "" if path.exists() else f" as a link to {os.path.realpath(path)}, where nothing is"
    return ConvertError(f"{path} exists{nowhere}: choose another output file or pass --force")


@contextmanager
def staged(destinations: Sequence[Path], n_bytes: int, *, force: bool = False) -> Iterator[list[Path]]:
    """Names a temporary file for each destination; what was written there takes its place when the block ends.

    If the block or a move fails, the temporary files and all destinations that did not exist before are removed. Of
    those that did exist, the ones replaced before the failure keep their new content: the old one is gone.

    Args:
        destinations: in the order in which they appear; the file that makes the others useful belongs last.
        n_bytes: what will be written, for the message of an error.
        force: replace what exists; else a file that somebody else made meanwhile is refused and stays.

    Yields:
        The temporary files, none of which exists yet.

    Raises:
        ConvertError: the system refuses to read or write, or a destination exists.
    """
    targets = [Path(os.path.realpath(destination)) for destination in destinations]  # links stay
    new: list[Path] = []
    try:
        with ExitStack() as stack:
            temporaries = [
                stack.enter_context(work_folder(target.name, target.parent)) / target.name for target in targets
            ]
            yield temporaries
            for temporary, target in zip(temporaries, targets, strict=True):
                _publish(temporary, target, force, new)
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


def _publish(temporary: Path, target: Path, force: bool, new: list[Path]) -> None:
    """Moves a file to its place, and adds that to ``new`` where nothing was."""
    if force:
        if not os.path.lexists(target):
            new.append(target)
        os.replace(temporary, target)
        return
    try:
        try:
            os.link(temporary, target)  # unlike a rename it replaces nothing
            new.append(target)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            # a file system without hard links: reserve the name
            os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
            new.append(target)
            os.replace(temporary, target)
    except FileExistsError:
        raise _exists(target) from None


def write_bytes(path: Path, inputs: Sequence[Path], data: bytes, *, force: bool = False) -> int:
    """Writes a small file under the rules of :func:`check_outputs` and :func:`staged`.

    Args:
        path: file to be written.
        inputs: files that it is made from; it gets the permissions of the first, or those of any new file.
        data: its content.
        force: replace an existing one.

    Returns:
        Its size.
    """
    check_outputs([path], inputs, force=force)
    with staged([path], len(data), force=force) as (temporary,):
        fill(temporary, inputs[0] if inputs else None, data)
    return len(data)


def fill(temporary: Path, source: Path | None, data: bytes) -> None:
    """Writes a small temporary file of :func:`staged` down to the disk, with the permissions of ``source``."""
    with temporary.open("wb") as target:
        target.write(data)
        target.flush()
        os.fsync(target.fileno())
    if source is not None:
        shutil.copymode(source, temporary)
