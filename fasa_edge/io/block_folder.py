"""The folder of the document store: files named by what they hold, of which the least recently used are removed.

``FOLDER/<key>/<parent>-<own>.rows`` and ``...-<own>-<n>.tail``: a file is never changed. It comes by a rename, so it is
there as a whole or not at all, and who reads one that is removed reads on: processes share a folder without locks.
Nothing else in it is touched.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from fasa_edge.errors import FasaError
from fasa_edge.io.temporary import work_folder

_KEY = re.compile(r"[0-9a-f]{32}")
_NAME = re.compile(r"([0-9a-f]{32})-([0-9a-f]{32})(?:\.rows|-(\d+)\.tail)")
_STEP = 1000  # nanoseconds between the times of use of a prefix' files: the last of them go first


class Name(NamedTuple):
    """A file's name: the hash of what goes before, its own, and for a tail how many tokens lie between."""

    parent: str
    own: str
    n_tail: int | None = None

    def __str__(self) -> str:
        return f"{self.parent}-{self.own}" + (".rows" if self.n_tail is None else f"-{self.n_tail}.tail")


class _File(NamedTuple):
    used: int
    path: str
    size: int


class BlockFolder:
    """A folder of files, for all models.

    Args:
        path: made if it does not exist, for this user alone: what was read can be told from it.

    Raises:
        FasaError: it cannot be made, or is no folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser()
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise FasaError(
                f"the folder {self.path} of the store cannot be made: {error.strerror}; name another"
            ) from error

    def __fspath__(self) -> str:
        return os.fspath(self.path)

    def list(self, key: str) -> dict[str, list[Name]]:
        """List the files of a model by their parents."""
        found: dict[str, list[Name]] = {}
        for entry in _scan(self.path / key):
            if match := _NAME.fullmatch(entry.name):
                name = Name(match[1], match[2], None if match[3] is None else int(match[3]))
                found.setdefault(name.parent, []).append(name)
        return found

    def file(self, key: str, name: Name) -> Path:
        """Return where a file is, or would be."""
        return self.path / key / str(name)

    @contextmanager
    def staging(self, key: str) -> Iterator[Path]:
        """Make a folder for unfinished files of a model; :meth:`publish` moves them to their places.

        Raises:
            OSError: there cannot be one.
        """
        (self.path / key).mkdir(mode=0o700, exist_ok=True)
        with work_folder("store", self.path / key) as folder:
            yield folder

    def publish(self, temporary: Path, key: str, name: Name) -> None:
        """Move a finished file to its place; another process' of the same name is replaced by its like."""
        os.replace(temporary, self.file(key, name))

    def remove(self, key: str, name: Name) -> bool:
        """Remove a file; whether that was possible."""
        try:
            self.file(key, name).unlink(missing_ok=True)
        except OSError:
            return False
        return True

    def touch(self, key: str, names: Sequence[Name]) -> None:
        """Note that files are used now, those of a prefix in their order."""
        now = time.time_ns()
        for i, name in enumerate(names):
            with suppress(OSError):
                os.utime(self.file(key, name), ns=(now - i * _STEP, now - i * _STEP))

    def size(self) -> int:
        """Sum up the bytes of all files."""
        return sum(file.size for file in self._files())

    def evict(self, n_bytes: int, key: str, keep: Collection[Name]) -> int:
        """Remove the files least recently used until so many bytes are left.

        Args:
            n_bytes: of all models.
            key: of a model.
            keep: its files that stay, even if more is left.

        Returns:
            Bytes left.
        """
        files = sorted(self._files())
        left = sum(file.size for file in files)
        kept = {os.fspath(self.file(key, name)) for name in keep}
        for file in files:
            if left <= n_bytes:
                break
            if file.path not in kept:
                with suppress(OSError):  # another process reads it (Windows)
                    Path(file.path).unlink(missing_ok=True)
                    left -= file.size
        return left

    def _files(self) -> Iterator[_File]:
        for folder in _scan(self.path):
            if not _KEY.fullmatch(folder.name):
                continue
            for entry in _scan(folder.path):
                if _NAME.fullmatch(entry.name):
                    with suppress(OSError):
                        status = entry.stat(follow_symlinks=False)
                        yield _File(status.st_mtime_ns, entry.path, status.st_size)


def _scan(path: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except OSError:
        return []
