"""Split GGUFs as llama.cpp's gguf-split writes them: ``<prefix>-00001-of-00003.gguf`` and so on, metadata in the first.

llama.cpp is given the first file and finds the others beside it by name, so names and ``split.*`` keys must agree.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from fasa_edge.errors import ConvertError
from fasa_edge.io.gguf_header import GgufHeader, read_header
from fasa_edge.schema import GGUFValueType

_NAME = re.compile(r"(.+?)(?:-(\d{5})-of-(\d{5}))?\.gguf")  # SPLIT_PATH_FORMAT in src/llama.cpp


class SplitName(NamedTuple):
    """What the name of a file says: ``no`` counts from 1; a file that is not split is the first of 1."""

    prefix: str
    no: int
    count: int  # type: ignore[assignment]  # a tuple's own is of no use here


def parse_name(name: str) -> SplitName:
    """Takes the name of a file apart, without its folder."""
    match = _NAME.fullmatch(name)
    if match is None:
        return SplitName(name, 1, 1)
    return SplitName(match[1], int(match[2] or 1), int(match[3] or 1))


def _name(prefix: str, no: int, count: int) -> str:
    return f"{prefix}-{no:05}-of-{count:05}.gguf"


def output_paths(out: Path, count: int) -> list[Path]:
    """Names the files of a copy: ``out`` itself for a model in one file, else the split names made of it.

    Args:
        out: file to be written; of a split model its name without ``.gguf`` is the prefix, or it is the first file.
        count: number of files of the model.

    Raises:
        ConvertError: ``out`` is named as a file of a split model, but not as the first of ``count``.
    """
    if count == 1:
        return [out]
    name = parse_name(out.name)
    if name.count > 1 and (name.no, name.count) != (1, count):
        raise ConvertError(
            f"{out} is named as file {name.no} of {name.count} but the model has {count}: "
            f"choose {name.prefix}.gguf or {_name(name.prefix, 1, count)}"
        )
    return [out.with_name(_name(name.prefix, no, count)) for no in range(1, count + 1)]


def model_files(path: Path) -> list[Path]:
    """Lists all files of a model: those of which ``path`` is named as the first, if they are there; else it alone."""
    name = parse_name(path.name)
    files = output_paths(path, name.count) if name.no == 1 else [path]
    return files if all(file.is_file() for file in files) else [path]


def read_shards(header: GgufHeader) -> list[GgufHeader]:
    """Finds and checks all files of a model.

    Args:
        header: of the first file, or of the only one.

    Returns:
        The headers in order, ``header`` first.

    Raises:
        ConvertError: ``header`` is not that of the first file; a file is missing, damaged or another one's; or names,
            counts and ``split.*`` keys contradict each other.
    """
    path, name = header.path, parse_name(header.path.name)
    count = max(header.get_integer("split.count", 1), 1)
    first = _name(name.prefix, 1, count)
    if name.count == 1:
        if count == 1:
            return [header]
        raise ConvertError(
            f"{path} is one of {count} files of a split model, which llama.cpp finds by their names: "
            f"name them {first} and so on, and give the first"
        )
    if count != name.count:
        raise ConvertError(
            f"{path} is named as one of {name.count} files but its split.count is {count}: download it again"
        )
    if name.no != 1:
        raise ConvertError(f"{path} is file {name.no} of {count} of a split model: give the first, {first}")
    shards = [header]
    for no in range(2, count + 1):
        other = path.with_name(_name(name.prefix, no, count))
        if not other.is_file():
            raise ConvertError(f"{other} is missing: {path.name} is split into {count} files, put them in one folder")
        shards.append(read_header(other))
    for i, shard in enumerate(shards):
        # llama.cpp aborts the process on another type
        entry = shard.find("split.no")
        if entry is None or entry.type != GGUFValueType.UINT16 or entry.count is not None or entry.value() != i:
            found = "missing" if entry is None else f"{entry.value()} ({entry.type.name})"
            raise ConvertError(
                f"{shard.path} is not file {i + 1} of {count}: its split.no is {found}, expected {i} (UINT16)"
            )
    n_found, expected = sum(shard.n_tensors for shard in shards), header.get_integer("split.tensors.count", -1)
    if n_found != expected:
        raise ConvertError(
            f"{path} and the {count - 1} files that follow hold {n_found} tensors but split.tensors.count is "
            f"{expected}: they are not of one model, download them again"
        )
    return shards
