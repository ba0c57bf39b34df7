"""Reads the header of a GGUF file, keeping every byte of it.

gguf-py decodes values and cannot write them back unchanged (empty arrays, invalid UTF-8), and it trusts what it reads.
This parser keeps each key-value pair and the tensor infos as raw bytes and checks every length against the file first,
so that a damaged or hostile file ends in a :class:`ConvertError`. Layout and limits follow ggml/src/gguf.cpp.
"""

from __future__ import annotations

import os
import stat
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from fasa_edge.errors import ConvertError
from fasa_edge.schema import NUMPY_TYPES, GGUFValueType

import numpy as np

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # the same layout; version 1 had 32-bit lengths
DEFAULT_ALIGNMENT = 32
MAX_METADATA = 2**28  # bytes before the tensor data; the largest vocabularies take some 20 MB
MAX_KEYS = 2**16  # of which each takes some 500 bytes of memory; models have some 50
MAX_DIMS = 4

# id: (elements per block, bytes per block), ggml_blck_size() and ggml_type_size() of ggml.c at the pinned commit
TENSOR_TYPES = {
    0: (1, 4),  # F32
    1: (1, 2),  # F16
    2: (32, 18),  # Q4_0
    3: (32, 20),  # Q4_1
    6: (32, 22),  # Q5_0
    7: (32, 24),  # Q5_1
    8: (32, 34),  # Q8_0
    9: (32, 36),  # Q8_1
    10: (256, 84),  # Q2_K
    11: (256, 110),  # Q3_K
    12: (256, 144),  # Q4_K
    13: (256, 176),  # Q5_K
    14: (256, 210),  # Q6_K
    15: (256, 292),  # Q8_K
    16: (256, 66),  # IQ2_XXS
    17: (256, 74),  # IQ2_XS
    18: (256, 98),  # IQ3_XXS
    19: (256, 50),  # IQ1_S
    20: (32, 18),  # IQ4_NL
    21: (256, 110),  # IQ3_S
    22: (256, 82),  # IQ2_S
    23: (256, 136),  # IQ4_XS
    24: (1, 1),  # I8
    25: (1, 2),  # I16
    26: (1, 4),  # I32
    27: (1, 8),  # I64
    28: (1, 8),  # F64
    29: (256, 56),  # IQ1_M
    30: (1, 2),  # BF16
    34: (256, 54),  # TQ1_0
    35: (256, 66),  # TQ2_0
    39: (32, 17),  # MXFP4
    40: (64, 36),  # NVFP4
    41: (128, 18),  # Q1_0
    42: (64, 18),  # Q2_0
}


@dataclass(frozen=True)
class Entry:
    """One key-value pair as it stands in the file.

    Attributes:
        key: its name in full length; bytes that are not UTF-8 are surrogate-escaped.
        raw: the whole pair, byte for byte.
        type: type of the value, or of the elements when ``count`` is not None.
        count: number of elements of an array, None for a scalar.
        value_offset: where in ``raw`` the value, or the first element, begins.
    """

    key: str
    raw: bytes
    type: GGUFValueType
    count: int | None
    value_offset: int

    def value(self) -> np.generic | np.ndarray | str | list[str]:
        """Decodes the value: a numpy scalar or array, a string or a list of strings.

        A string ends at its first NUL, as ggml hands it out; invalid UTF-8 is replaced.
        """
        if self.type != GGUFValueType.STRING:
            stored = np.uint8 if self.type == GGUFValueType.BOOL else NUMPY_TYPES[self.type]
            values = np.frombuffer(self.raw[self.value_offset :], stored)
            values = values.astype(NUMPY_TYPES[self.type])  # any byte but 0 is true, as in llama.cpp
            return values[0] if self.count is None else values
        strings, offset = [], self.value_offset
        for _ in range(1 if self.count is None else self.count):
            (length,) = struct.unpack_from("<Q", self.raw, offset)
            data, _, _ = self.raw[offset + 8 : offset + 8 + length].partition(b"\0")
            strings.append(data.decode("utf-8", "replace"))
            offset += 8 + length
        return strings[0] if self.count is None else strings


@dataclass(frozen=True)
class GgufHeader:
    """Everything of a GGUF file that stands before its tensor data.

    Attributes:
        path: the file.
        file_size: in bytes.
        version: 2 or 3.
        entries: the key-value pairs by key in full length, in file order; see :meth:`find`.
        n_tensors: number of tensors.
        tensor_infos: their names, shapes, types and offsets, byte for byte.
        alignment: of the tensor data within the file, in bytes.
        data_offset: where the tensor data begins, in bytes.
    """

    path: Path
    file_size: int
    version: int
    entries: dict[str, Entry]
    n_tensors: int
    tensor_infos: bytes
    alignment: int
    data_offset: int

    def find(self, key: str) -> Entry | None:
        """Finds what llama.cpp takes for the pair of a key, None where the file has no such key.

        It compares keys as C strings: a key ends at its first NUL, and of several that are equal so the first counts.
        """
        return self._by_c_string.get(key)

    @cached_property
    def _by_c_string(self) -> dict[str, Entry]:
        return _by_c_string(self.entries)

    def get_string(self, key: str) -> str | None:
        """Returns the text of a key, None where the file has no such key.

        Raises:
            ConvertError: the key holds something else.
        """
        return self._get(key, str, "a string")

    def get_integer(self, key: str, default: int) -> int:
        """Returns the number of a key, ``default`` where the file has no such key.

        Raises:
            ConvertError: the key holds something else.
        """
        value = self._get(key, np.integer, "a whole number")
        return default if value is None else int(value)

    def _get(self, key: str, kind: type, expected: str) -> Any:
        entry = self.find(key)
        if entry is None:
            return None
        held = f"an array of {entry.count}" if entry.count is not None else entry.value()  # it may be long
        if entry.count is not None or not isinstance(held, kind):
            raise ConvertError(f"{self.path} is damaged: {key} = {str(held)[:60]} is not {expected}; download it again")
        return held


def read_header(path: str | Path) -> GgufHeader:
    """Reads and checks the header of a GGUF file; its tensor data is not read, but must lie within the file.

    Raises:
        ConvertError: the file cannot be read, is not a little-endian GGUF of version 2 or 3, or is damaged.
    """
    path = Path(path)
    try:
        # a pipe that nobody writes to would block
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ConvertError(f"{path} cannot be read: it is a pipe, a device or the like; give a file")
            return _parse(path, _Reader(path, file))
    except OSError as error:
        raise ConvertError(f"{path} cannot be read: {error.strerror}") from error


class _Reader:
    """Sequential reads that never pass the end of the file or the size limit of the metadata."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.file = file
        self.size = file.seek(0, 2)
        self.offset = file.seek(0)
        self.limit = min(self.size, MAX_METADATA)

    def error(self, what: str) -> ConvertError:
        return ConvertError(f"{self.path} is damaged: {what} at byte {self.offset}; download or convert it again")

    def check(self, count: int, item_size: int, what: str) -> None:
        """Refuses a count whose items cannot fit into the rest of the file."""
        room = self.limit - self.offset
        if count * item_size > room:
            held = f"{self.size} bytes in all" if self.limit == self.size else f"metadata limit {MAX_METADATA}"
            raise self.error(f"{what} takes {count * item_size} bytes but {room} are left ({held})")

    def take(self, n: int, what: str) -> bytes:
        self.check(n, 1, what)
        data = self.file.read(n)
        if len(data) != n:
            raise self.error(f"{what} ended early")
        self.offset += n
        return data

    def unpack(self, layout: str, what: str) -> tuple[bytes, int]:
        raw = self.take(struct.calcsize(layout), what)
        return raw, struct.unpack(layout, raw)[0]


def _parse(path: Path, reader: _Reader) -> GgufHeader:
    if reader.size < 4 or (magic := reader.take(4, "magic")) != MAGIC:
        held = f"begins with {magic!r}" if reader.size >= 4 else f"has {reader.size} bytes"
        raise ConvertError(f"{path} is not a GGUF file: it {held} where {MAGIC!r} belongs; give a .gguf model")
    _, version = reader.unpack("<I", "version")
    if version & 0xFFFF == 0:
        raise ConvertError(f"{path} is a big-endian GGUF (version {version:#010x}): make a little-endian one")
    if version not in VERSIONS:
        raise ConvertError(f"{path} has GGUF version {version}: versions 2 and 3 can be read; convert the model again")
    _, n_tensors = reader.unpack("<Q", "tensor count")
    _, n_kv = reader.unpack("<Q", "key count")
    reader.check(n_kv, 8 + 1 + 4 + 1, f"a header of {n_kv} keys")
    reader.check(n_tensors, 8 + 4 + 4 + 8, f"a header of {n_tensors} tensors")
    if n_kv > MAX_KEYS:
        raise reader.error(f"a header of {n_kv} keys, at most {MAX_KEYS} are possible,")

    entries: dict[str, Entry] = {}
    for _ in range(n_kv):
        entry = _read_entry(reader)
        if entry.key in entries:
            raise reader.error(f"key {entry.key!r} stands twice")
        entries[entry.key] = entry
    alignment = _alignment(reader, entries)

    infos, (end, last) = bytearray(), (0, "")  # of hostile ones there may be millions
    for _ in range(n_tensors):
        name, raw, offset, size = _read_tensor_info(reader, alignment)
        infos += raw
        end, last = max((end, last), (offset + size, name))
    data_offset = reader.offset + (-reader.offset % alignment if n_tensors else 0)
    if n_tensors and data_offset + end > reader.size:
        raise ConvertError(
            f"{path} is truncated: tensor {last!r} ends at byte {data_offset + end} "
            f"of a file of {reader.size}; download it again"
        )
    return GgufHeader(
        path=path,
        file_size=reader.size,
        version=version,
        entries=entries,
        n_tensors=n_tensors,
        tensor_infos=bytes(infos),
        alignment=alignment,
        data_offset=data_offset,
    )


def _read_string(reader: _Reader, what: str) -> bytes:
    """A length-prefixed string, prefix included."""
    raw, length = reader.unpack("<Q", f"length of {what}")
    return raw + reader.take(length, what)


def _read_type(reader: _Reader, what: str) -> tuple[bytes, GGUFValueType]:
    raw, number = reader.unpack("<I", what)
    try:
        return raw, GGUFValueType(number)
    except ValueError:
        raise reader.error(f"{what} is {number}, of {len(GGUFValueType)} that GGUF has") from None


def _read_entry(reader: _Reader) -> Entry:
    raw_key = _read_string(reader, "a key")
    key = raw_key[8:].decode("utf-8", "surrogateescape")
    if not key:
        raise reader.error("an empty key")
    raw_type, type_ = _read_type(reader, f"value type of key {key!r}")
    head, count = raw_key + raw_type, None
    if type_ == GGUFValueType.ARRAY:
        raw_type, type_ = _read_type(reader, f"element type of key {key!r}")
        if type_ == GGUFValueType.ARRAY:
            raise reader.error(f"key {key!r} is an array of arrays, which llama.cpp does not load,")
        raw_count, count = reader.unpack("<Q", f"length of key {key!r}")
        head += raw_type + raw_count
    n, what = 1 if count is None else count, f"the value of key {key!r}"
    if type_ == GGUFValueType.STRING:
        reader.check(n, 8, what)
        body: bytes | bytearray = bytearray()  # an object for each would take ten times as much
        for _ in range(n):
            body += _read_string(reader, what)
    else:
        size = NUMPY_TYPES[type_].itemsize
        reader.check(n, size, what)
        body = reader.take(n * size, what)
    return Entry(key=key, raw=b"".join((head, body)), type=type_, count=count, value_offset=len(head))


def _by_c_string(entries: dict[str, Entry]) -> dict[str, Entry]:
    res: dict[str, Entry] = {}
    for name, entry in entries.items():
        res.setdefault(name.partition("\0")[0], entry)
    return res


def _alignment(reader: _Reader, entries: dict[str, Entry]) -> int:
    entry = _by_c_string(entries).get("general.alignment")
    if entry is None:
        return DEFAULT_ALIGNMENT
    if entry.type != GGUFValueType.UINT32 or entry.count is not None:
        raise reader.error(f"general.alignment has type {entry.type.name}, not UINT32,")
    value: Any = entry.value()
    alignment = int(value)
    if alignment == 0 or alignment & (alignment - 1):
        raise reader.error(f"general.alignment = {alignment} is not a power of two")
    return alignment


def _read_tensor_info(reader: _Reader, alignment: int) -> tuple[str, bytes, int, int]:
    """Name, raw bytes, offset within the tensor data and size in bytes of one tensor."""
    raw_name = _read_string(reader, "a tensor name")
    name = raw_name[8:].decode("utf-8", "replace")
    raw_n_dims, n_dims = reader.unpack("<I", f"dimension count of tensor {name!r}")
    if n_dims > MAX_DIMS:
        raise reader.error(f"tensor {name!r} has {n_dims} dimensions, at most {MAX_DIMS} are possible,")
    raw_shape = reader.take(8 * n_dims, f"shape of tensor {name!r}")
    shape = struct.unpack(f"<{n_dims}Q", raw_shape) or (1,)
    raw_type, type_ = reader.unpack("<I", f"type of tensor {name!r}")
    raw_offset, offset = reader.unpack("<Q", f"offset of tensor {name!r}")
    if type_ not in TENSOR_TYPES:
        raise reader.error(f"tensor {name!r} has type {type_}, which the pinned llama.cpp does not know,")
    block, block_size = TENSOR_TYPES[type_]
    if shape[0] % block:
        raise reader.error(f"tensor {name!r} has rows of {shape[0]} elements, not a multiple of its block of {block},")
    if offset % alignment:
        raise reader.error(f"tensor {name!r} begins at {offset}, not a multiple of the alignment {alignment},")
    size = block_size
    for n, step in zip(shape, (block, 1, 1, 1), strict=False):
        size *= n // step
    return name, raw_name + raw_n_dims + raw_shape + raw_type + raw_offset, offset, size
