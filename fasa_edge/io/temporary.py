"""Folders for what is not finished: gone when the block ends, and of a process that was killed with the next run."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where nothing tells whether the process of a leftover still runs
    fcntl = None  # type: ignore[assignment]

_LIVE, _UNLOCKED = ".tmp", ".new"
_N_RANDOM = 8  # characters of tempfile.mkdtemp


@contextmanager
def work_folder(name: str, beside: Path | None = None) -> Iterator[Path]:
    """Makes an empty folder ``.<name>.<random>.tmp``, and removes what killed processes left of the same name.

    A lock on the folder tells them apart: the system drops it with its process, however that ends, and shows it to
    other containers that share the disk, where a process id would mislead. Without locks leftovers stay.

    Args:
        name: of what is made in it; not of other things in the same folder.
        beside: where; None: where the system keeps temporary files.

    Raises:
        OSError: there cannot be one.
    """
    parent = Path(tempfile.gettempdir()) if beside is None else beside
    _remove_leftovers(name, parent)
    unlocked = Path(tempfile.mkdtemp(dir=parent, prefix=f".{name}.", suffix=_UNLOCKED))
    handle = _locked(unlocked)
    try:
        folder = unlocked.rename(unlocked.with_suffix(_LIVE))  # locked before another run can see it
        yield folder
    finally:
        for path in (unlocked, unlocked.with_suffix(_LIVE)):
            shutil.rmtree(path, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def _remove_leftovers(name: str, parent: Path) -> None:
    prefix = f".{name}."
    with suppress(OSError):  # a folder that may be written but not listed
        for entry in list(os.scandir(parent)):
            random = entry.name.removeprefix(prefix).removesuffix(_LIVE)
            if entry.name == f"{prefix}{random}{_LIVE}" and len(random) == _N_RANDOM:
                handle = _locked(entry.path)
                if handle is not None:
                    shutil.rmtree(entry.path, ignore_errors=True)
                    os.close(handle)


def _locked(folder: str | Path) -> int | None:
    """A handle that holds the lock of a folder; None where another process does, or there are no locks."""
    if fcntl is None:
        return None
    handle = None
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if handle is not None:
            os.close(handle)
        return None
    return handle
