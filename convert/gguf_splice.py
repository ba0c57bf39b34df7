"""Writes a copy of a GGUF file with more keys, every other byte unchanged.

The copy holds the old key-value pairs verbatim (those of our prefix left out), the new ones after them, the tensor
infos verbatim, padding to ``general.alignment``, and the tensor data verbatim. It is streamed into a temporary file
beside the destination and renamed when complete, so that a failure leaves nothing behind.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

from fasa_edge.errors import ConvertError
from fasa_edge.schema import NUMPY_TYPES, PREFIX, GGUFValueType

import numpy as np

from .gguf_header import MAGIC, GgufHeader
from .output import check_output, replacing

BLOCK = 8 * 2**20  # bytes copied at a time

Metadata = Iterable[tuple[str, GGUFValueType, object]]
Progress = Callable[[int, int], None]

_ELEMENT_TYPES = {dtype: type_ for type_, dtype in NUMPY_TYPES.items()}


def encode_entry(key: str, type_: GGUFValueType, value: object) -> bytes:
    """Encodes one key-value pair as GGUF stores it.

    Args:
        key: its name.
        type_: a scalar type, STRING or ARRAY.
        value: a Python or numpy scalar, a string, or for ARRAY a one-dimensional numpy array of the element type.

    Raises:
        ConvertError: the array has an element type that GGUF does not have.
        OverflowError: the number does not fit its type.
    """
    head = _encode_string(key) + struct.pack("<I", type_)
    if type_ == GGUFValueType.STRING:
        return head + _encode_string(value)
    if type_ != GGUFValueType.ARRAY:
        return head + np.array(value, NUMPY_TYPES[type_]).tobytes()
    element = _ELEMENT_TYPES.get(value.dtype)
    if element is None:
        raise ConvertError(f"{key} has elements of {value.dtype}: GGUF holds bool, integers and floats of 8 to 64 bits")
    return head + struct.pack("<IQ", element, value.size) + value.tobytes()


def check_destination(header: GgufHeader, destination: str | Path, *, force: bool = False) -> None:
    """Refuses what :func:`splice` would refuse, before any time is spent on the model.

    Args:
        header: of the source file.
        destination: file to be written.
        force: allow an existing destination, and a source that already holds ``fasa.*`` keys.

    Raises:
        ConvertError: the source is annotated and ``force`` is not given; or as
            :func:`fasa_edge.convert.output.check_output`.
    """
    annotated = [key for key in header.entries if key.startswith(PREFIX)]
    if annotated and not force:
        raise ConvertError(
            f"{header.path} is already annotated ({len(annotated)} {PREFIX}* keys): --force replaces them"
        )
    check_output(destination, header.path, header.file_size, force=force)


def splice(
    header: GgufHeader,
    destination: str | Path,
    metadata: Metadata,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> int:
    """Copies a GGUF file and puts ``metadata`` after its own keys; its old ``fasa.*`` keys are left out.

    Args:
        header: of the source file, as read by :func:`fasa_edge.convert.gguf_header.read_header`.
        destination: file to be written, in an existing folder.
        metadata: ``(key, type, value)``, see :func:`encode_entry`.
        force: allow an existing destination, and a source that already holds ``fasa.*`` keys.
        progress: called with the bytes written so far and those to write in all.

    Returns:
        The size of the new file in bytes.

    Raises:
        ConvertError: as :func:`check_destination`; the source changed meanwhile; or reading or writing failed.
    """
    check_destination(header, destination, force=force)
    head = _encode_header(header, metadata)
    total = len(head) + max(header.file_size - header.data_offset, 0)
    with replacing(destination, header.path, total) as target, header.path.open("rb") as source:
        target.write(head)
        _copy(header, source, target, len(head), total, progress or (lambda done, total: None))
    return total


def _encode_string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _encode_header(header: GgufHeader, metadata: Metadata) -> bytes:
    """Everything before the tensor data, padding included."""
    pairs = [entry.raw for key, entry in header.entries.items() if not key.startswith(PREFIX)]
    pairs += [encode_entry(*item) for item in metadata]
    head = MAGIC + struct.pack("<IQQ", header.version, header.n_tensors, len(pairs))
    head += b"".join(pairs) + header.tensor_infos
    return head + bytes(-len(head) % header.alignment if header.n_tensors else 0)


def _copy(header: GgufHeader, source: BinaryIO, target: BinaryIO, done: int, total: int, progress: Progress) -> None:
    """Copies the tensor data, ``total - done`` bytes of it."""
    source.seek(header.data_offset)
    while done < total:
        progress(done, total)
        block = source.read(min(BLOCK, total - done))
        if not block:
            raise ConvertError(f"{header.path} ended {total - done} bytes early while it was copied: it has changed")
        target.write(block)
        done += len(block)
    progress(done, total)
