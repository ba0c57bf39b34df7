"""What an evaluation has measured so far: kept in memory, and in a file from which a later run goes on."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from fasa_edge.errors import FasaError
from fasa_edge.eval.engine import engine, sha256
from fasa_edge.eval.runner import Runner
from fasa_edge.runtime import capi
from fasa_edge.version import __version__

import numpy as np

_START = b'{"key": '


class Results:
    """Values by key, both JSON objects; a key holds everything that determines its value.

    Args:
        path: a file of JSON lines, each a key and a value; read now, made if there is none, and longer by a line with
            every value. None: in memory only.

    Raises:
        FasaError: the file cannot be read or written, or is no such file.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._values: dict[str, dict[str, Any]] = {}
        self._path = path
        if path is None:
            return
        if path.exists() and not path.is_file():
            raise FasaError(f"{path} is a folder, a device or the like: name a file for the results")
        try:
            with path.open("ab+") as file:
                file.seek(0)
                content = file.read()
                if not _START.startswith(content[: len(_START)]):
                    raise FasaError(f"{path} holds no results of `fasa-edge eval`: name another file, or a new one")
                n_damaged = sum(not self._read(line) for line in content.split(b"\n") if line)
                if content and not content.endswith(b"\n"):  # a run was broken off while it wrote
                    file.write(b"\n")
        except OSError as error:
            raise FasaError(f"{path} cannot be read and written: {error.strerror}") from error
        if n_damaged:
            warnings.warn(f"{path}: {n_damaged} damaged line(s) ignored, and measured again", stacklevel=2)

    def _read(self, line: bytes) -> bool:
        try:
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
        except (ValueError, TypeError, KeyError):
            return False
        if not isinstance(key, dict) or not isinstance(value, dict):
            return False
        self._values[_canonical(key)] = value
        return True

    def get(self, key: Mapping[str, Any], fields: Collection[str] = ()) -> dict[str, Any] | None:
        """The value of a key; None if it was not measured, or lacks one of the fields."""
        value = self._values.get(_canonical(key))
        return value if value is not None and value.keys() >= set(fields) else None

    def put(self, key: Mapping[str, Any], value: dict[str, Any]) -> dict[str, Any]:
        """Keep a value, and write it down at once; returns it.

        Raises:
            FasaError: it cannot be written.
        """
        self._values[_canonical(key)] = value
        if self._path is not None:
            line = json.dumps({"key": dict(key), "value": value}).encode() + b"\n"
            try:
                with self._path.open("ab", buffering=0) as file:
                    if file.write(line) < len(line):  # at once, so that the lines of two runs never mix
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    os.fsync(file.fileno())
            except OSError as error:
                raise FasaError(f"{self._path} cannot be written: {error.strerror}") from error
        return value


def _canonical(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


def identity(runner: Runner, files: Sequence[Path]) -> dict[str, Any]:
    """What a result depends on besides its task and method.

    Args:
        runner: what runs it.
        files: all files of the model, and its profile; hashed as a whole.
    """
    llm = runner.llm
    return {
        "fasa_edge": __version__,
        "fingerprint": capi.fingerprint(llm.model),
        "files": [sha256(path) for path in (*files, *([Path(llm.lora_path)] if llm.lora_path else []))],
        "lora_scale": llm.lora_scale,
        "base": runner.settings,
        "overrides": dict(llm.kv_overrides or {}),
        **engine(llm),
    }


def hash_tokens(tokens: Sequence[int]) -> str:
    """A short name for a sequence of tokens."""
    return hashlib.sha256(np.asarray(tokens, "<i4").tobytes()).hexdigest()[:32]
