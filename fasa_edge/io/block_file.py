"""A file of the document store: what was evaluated for some tokens, with what it belongs to and checksums.

``MAGIC``, the size of the header (uint32), the header (JSON), its tokens (int32 each), CRC-32 of all so far; then the
data, and CRC-32 of the data; integers are little-endian. CRC-32 finds what disks and broken transfers do, at several
times the speed of a disk.
"""

from __future__ import annotations

import json
import os
import stat
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from fasa_edge.errors import FasaError

import numpy as np

VERSION = 1
MAGIC = b"FASA-KV" + bytes([VERSION])
_UINT32 = struct.Struct("<I")
_MAX_HEADER = 1 << 24
_NO_WAIT = getattr(os, "O_NONBLOCK", 0)


class BlockError(FasaError):
    """A file of the store is of no use: damaged, of another version, or of something else than it should be."""


@dataclass(frozen=True)
class Block:
    """What a file says about itself.

    Attributes:
        header: whatever its writer put there.
        tokens: that it stands for, int32 [n_tokens].
        n_bytes: of its data.
    """

    header: dict[str, Any]
    tokens: np.ndarray
    n_bytes: int


def write_block(
    path: Path, header: dict[str, Any], tokens: Sequence[int] | np.ndarray, data: Sequence[np.ndarray]
) -> int:
    """Write a file.

    Args:
        path: file to be written.
        header: values for JSON.
        tokens: int [n_tokens].
        data: uint8 arrays, one after the other.

    Returns:
        Its size.

    Raises:
        OSError: it cannot be written.
    """
    start = _start(header, tokens, sum(part.nbytes for part in data))
    crc = 0
    with path.open("wb") as file:
        file.write(start + _UINT32.pack(zlib.crc32(start)))
        for part in map(np.ascontiguousarray, data):
            crc = zlib.crc32(part.data, crc)
            file.write(part.data)
        file.write(_UINT32.pack(crc))
        return file.tell()


def block_size(header: dict[str, Any], n_tokens: int, n_bytes: int) -> int:
    """Compute the size of a file with so many bytes of data."""
    return len(_start(header, [0] * n_tokens, n_bytes)) + n_bytes + 2 * _UINT32.size


def _start(header: dict[str, Any], tokens: Sequence[int] | np.ndarray, n_bytes: int) -> bytes:
    encoded = json.dumps({"n_tokens": len(tokens), "n_bytes": n_bytes, **header}).encode()
    return MAGIC + _UINT32.pack(len(encoded)) + encoded + np.asarray(tokens, "<i4").tobytes()


class BlockReader:
    """An open file, whose header and size are right; a context manager.

    Attributes:
        block: what it says about itself.

    Raises:
        BlockError: it is damaged, or of another version.
        OSError: it cannot be read, or was removed meanwhile.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        # a pipe that nobody writes to would block
        self._file: BinaryIO = open(path, "rb", opener=lambda name, flags: os.open(name, flags | _NO_WAIT))
        try:
            if not stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
                raise BlockError(f"{path} is no file but a pipe, a device or the like")
            self.block = self._read_start()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> BlockReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _read_start(self) -> Block:
        start = self._take(len(MAGIC) + _UINT32.size)
        magic = start[: len(MAGIC)]
        if magic != MAGIC:
            if magic[:-1] == MAGIC[:-1]:
                raise BlockError(f"{self._path} is of version {magic[-1]} of its format, expected {VERSION}")
            raise self._damaged("it does not begin as a file of the store")
        (n_header,) = _UINT32.unpack_from(start, len(MAGIC))
        if n_header > _MAX_HEADER:
            raise self._damaged(f"its header has {n_header} bytes")
        encoded = self._take(n_header)
        try:
            header = json.loads(encoded)
            n_tokens, n_bytes = int(header.pop("n_tokens")), int(header.pop("n_bytes"))
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise self._damaged("its header is no JSON object of ours") from error
        n_start = len(start) + n_header + 4 * n_tokens
        expected, size = n_start + n_bytes + 2 * _UINT32.size, os.fstat(self._file.fileno()).st_size
        if min(n_tokens, n_bytes) < 0 or size != expected:
            raise self._damaged(f"it has {size} bytes, expected {expected}")
        tokens = self._take(4 * n_tokens)
        if self._take(_UINT32.size) != _UINT32.pack(zlib.crc32(tokens, zlib.crc32(encoded, zlib.crc32(start)))):
            raise self._damaged("the checksum of its header is wrong")
        return Block(header, np.frombuffer(tokens, "<i4"), n_bytes)

    def read(self, data: Sequence[np.ndarray]) -> None:
        """Read the data.

        Args:
            data: contiguous uint8 arrays that are filled one after the other, of ``block.n_bytes`` together.

        Raises:
            BlockError: it is damaged.
            OSError: it cannot be read.
        """
        crc = 0
        for part in data:
            if self._file.readinto(part.data) != part.nbytes:  # type: ignore[attr-defined]
                raise self._damaged("it ends early")
            crc = zlib.crc32(part.data, crc)
        if self._file.read() != _UINT32.pack(crc):
            raise self._damaged("the checksum of its data is wrong")

    def _take(self, n: int) -> bytes:
        data = self._file.read(n)
        if len(data) != n:
            raise self._damaged("it ends early")
        return data

    def _damaged(self, why: str) -> BlockError:
        return BlockError(f"{self._path} is damaged: {why}")
