"""Writes a copy of a GGUF file with more keys, every other byte unchanged.

The copy holds the old key-value pairs verbatim (those of our prefix left out), the new ones after them, the tensor
infos verbatim, padding to ``general.alignment``, and the tensor data verbatim. Of a split model that is the first file;
the others are hard-linked beside it, or copied where that is impossible. A failure leaves nothing behind.
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from fasa_edge.errors import ConvertError
from fasa_edge.io.gguf_header import MAGIC, GgufHeader
from fasa_edge.io.output import check_outputs, fill, staged
from fasa_edge.io.split import output_paths
from fasa_edge.schema import NUMPY_TYPES, PREFIX, GGUFValueType

import numpy as np

BLOCK = 8 * 2**20  # bytes copied at a time

Metadata = Iterable[tuple[str, GGUFValueType, object]]
Progress = Callable[[int, int], None]

_ELEMENT_TYPES = {dtype: type_ for type_, dtype in NUMPY_TYPES.items()}


def encode_entry(key: str, type_: GGUFValueType, value: Any) -> bytes:
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


def check_destination(
    header: GgufHeader, destination: str | Path, others: Sequence[GgufHeader] = (), *, force: bool = False
) -> None:
    """Refuses what :func:`splice` would refuse, before any time is spent on the model.

    Args:
        header: of the source file.
        destination: file to be written.
        others: headers of the other files of a split model.
        force: allow an existing destination, and a source that already holds ``fasa.*`` keys.

    Raises:
        ConvertError: the source is annotated and ``force`` is not given, the disk has too little space, or as
            :func:`fasa_edge.io.output.check_outputs`.
    """
    destinations = output_paths(Path(destination), 1 + len(others))
    annotated = [key for key in header.entries if key.startswith(PREFIX)]
    if annotated and not force:
        raise ConvertError(
            f"{header.path} is already annotated ({len(annotated)} {PREFIX}* keys): --force replaces them"
        )
    shards = [header, *others]
    for i, path in enumerate(destinations):
        # an older copy of another file than the first may be a link to it
        inputs = [shard.path for shard in shards if shard is header or shard is not shards[i]]
        check_outputs([path], inputs, force=force)
    folder = destinations[0].parent
    free, device = shutil.disk_usage(folder).free, folder.stat().st_dev
    need = header.file_size + sum(shard.file_size for shard in others if shard.path.stat().st_dev != device)
    if free < need:
        raise ConvertError(
            f"{destinations[0]} needs {need} bytes but {folder} has {free} free: make room or choose another folder"
        )


def splice(
    header: GgufHeader,
    destination: str | Path,
    metadata: Metadata,
    others: Sequence[GgufHeader] = (),
    *,
    beside: Mapping[Path, bytes] | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> int:
    """Copies a GGUF file and puts ``metadata`` after its own keys; its old ``fasa.*`` keys are left out.

    Args:
        header: of the source file, as read by :func:`fasa_edge.io.gguf_header.read_header`.
        destination: file to be written, in an existing folder.
        metadata: ``(key, type, value)``, see :func:`encode_entry`.
        others: headers of the other files of a split model; see :func:`fasa_edge.io.split.output_paths` for what
            they are called beside the destination.
        beside: small files to be written as well; they take their places with the copy or not at all.
        force: allow existing destinations, and a source that already holds ``fasa.*`` keys.
        progress: called with the bytes of the model written so far and those to write in all.

    Returns:
        The size of what was written in bytes, all files together.

    Raises:
        ConvertError: as :func:`check_destination`; the source changed meanwhile; or reading or writing failed.
    """
    check_destination(header, destination, others, force=force)
    beside = beside or {}
    check_outputs(list(beside), [shard.path for shard in (header, *others)], force=force)
    first, *rest = output_paths(Path(destination), 1 + len(others))
    head = _encode_header(header, metadata)
    size = len(head) + max(header.file_size - header.data_offset, 0)
    # the first last: it makes them a model
    with staged([*beside, *rest, first], size, force=force) as (*temporaries, temporary):
        for data in beside.values():
            fill(temporaries.pop(0), header.path, data)
        pairs = [(s, t) for s, t in zip(others, temporaries, strict=True) if not _link(s.path, t)]
        report = _counter(size + sum(shard.file_size for shard, _ in pairs), progress)
        with temporary.open("wb") as target:
            target.write(head)
            report(len(head))
            _copy(header.path, header.data_offset, size - len(head), target, report)
        shutil.copymode(header.path, temporary)
        for shard, copy in pairs:
            with copy.open("wb") as target:
                _copy(shard.path, 0, shard.file_size, target, report)
            shutil.copymode(shard.path, copy)
    return size + sum(shard.file_size for shard in others) + sum(map(len, beside.values()))


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


def _link(source: Path, temporary: Path) -> bool:
    """Makes the temporary file a hard link to the source; False where the file system has no such thing."""
    try:
        os.link(source.resolve(), temporary)  # a hub's cache holds symlinks
    except OSError:
        return False
    return True


def _counter(total: int, progress: Progress | None) -> Callable[[int], None]:
    """Adds up what it is called with and passes the sum on."""
    done = 0

    def report(n: int) -> None:
        nonlocal done
        done += n
        if progress is not None:
            progress(done, total)

    return report


def _copy(source: Path, offset: int, size: int, target: BinaryIO, report: Callable[[int], None]) -> None:
    """Copies ``size`` bytes of a file from ``offset`` on, down to the disk."""
    with source.open("rb") as file:
        file.seek(offset)
        while size > 0:
            block = file.read(min(BLOCK, size))
            if not block:
                raise ConvertError(f"{source} ended {size} bytes early while it was copied: it has changed")
            target.write(block)
            size -= len(block)
            report(len(block))
    target.flush()
    os.fsync(target.fileno())
