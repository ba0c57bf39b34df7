"""Fills the KV cache of a context with random keys and values, through llama.cpp's own restoring of a saved sequence.

The state of one decoded token shows how a sequence lies in a state (``llama_kv_cache::state_write``); that of any
number of tokens is the same with more cells. Restoring it makes the tips, too.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from fasa_edge.bench.random_data import RandomFiller
from fasa_edge.errors import FasaError
from fasa_edge.runtime import capi, sequence

import numpy as np

_HEAD = struct.Struct("<IiII")  # magic, sequence, streams, cells
_CELL = np.dtype([("pos", "<i4"), ("n_seq", "<u4"), ("seq", "<i4")])
_DATA = struct.Struct("<II")  # whether V is transposed, layers
_ROWS = struct.Struct("<iQ")  # type, bytes of a row
_COLUMNS = struct.Struct("<iII")  # of transposed V: type, bytes of an element, elements of a cell


@dataclass(frozen=True)
class _Section:
    """K or V of one layer."""

    header: bytes
    type_name: str
    n_bytes: int  # of a cell


@dataclass(frozen=True)
class StateLayout:
    """How the state of one sequence lies in memory."""

    magic: int
    v_trans: int
    sections: tuple[_Section, ...]

    @classmethod
    def of(cls, ctx: int) -> StateLayout | None:
        """Find the layout of a context (``llama_context *``) in which sequence 0 has one token, or some in a row.

        Returns:
            ``None`` for a memory that is not one plain KV cache: sliding windows, recurrent layers, M-RoPE.
        """
        return cls.parse(sequence.save(ctx))

    @classmethod
    def parse(cls, state: np.ndarray) -> StateLayout | None:
        """Find the layout of a state, uint8 ``[n_bytes]``; ``None`` if it is of another kind."""
        data = state.data
        try:
            magic, _, n_stream, n_cells = _HEAD.unpack_from(data)
            offset = _HEAD.size + n_cells * _CELL.itemsize
            v_trans, n_layer = _DATA.unpack_from(data, offset)
            if n_stream != 1 or v_trans > 1 or n_layer > len(state):
                return None
            offset += _DATA.size
            sections = []
            for i in range(2 * n_layer):
                header = _COLUMNS if v_trans and i >= n_layer else _ROWS
                type_, *size = header.unpack_from(data, offset)
                n_bytes = int(np.prod(size))
                if not (name := _type_name(type_)):
                    return None
                sections.append(_Section(bytes(data[offset : offset + header.size]), name, n_bytes))
                offset += header.size + n_cells * n_bytes
        except struct.error:
            return None
        return cls(magic, v_trans, tuple(sections)) if offset == len(state) else None

    def n_bytes(self, n_cells: int) -> int:
        """Return the size in bytes of the state of so many cells."""
        rows = sum(len(section.header) + n_cells * section.n_bytes for section in self.sections)
        return _HEAD.size + n_cells * _CELL.itemsize + _DATA.size + rows

    def random_state(self, n_cells: int, seed: int = 0) -> np.ndarray:
        """Make the state of a sequence of so many tokens, with random keys and values: uint8 ``[n_bytes(n_cells)]``."""
        state = np.empty(self.n_bytes(n_cells), np.uint8)
        filler = RandomFiller(np.random.Generator(np.random.SFC64(seed)))
        for section, start in self._write_frame(state, n_cells):
            filler.fill(section.type_name, state[start : start + n_cells * section.n_bytes])
        return state

    def adopt(self, state: np.ndarray, n_cells: int) -> None:
        """Turn a random state of another layout into one of this, in place; they may differ in whether V is transposed.

        Args:
            state: uint8 ``[n_bytes(n_cells)]``, as :meth:`random_state` makes it.
            n_cells: its cells.

        Raises:
            FasaError: the state has another size.
        """
        if len(state) != self.n_bytes(n_cells):
            raise FasaError(f"a state of {len(state)} bytes is not of {n_cells} cells: {self.n_bytes(n_cells)} are")
        list(self._write_frame(state, n_cells))

    def _write_frame(self, state: np.ndarray, n_cells: int) -> Iterator[tuple[_Section, int]]:
        """Write all but the numbers themselves, and yield where those of each section begin."""
        cells = np.zeros(n_cells, _CELL)
        cells["pos"], cells["n_seq"] = np.arange(n_cells), 1
        head = _HEAD.pack(self.magic, 0, 1, n_cells) + cells.tobytes()
        head += _DATA.pack(self.v_trans, len(self.sections) // 2)
        offset = 0
        for section in (_Section(head, "", 0), *self.sections):
            state[offset : offset + len(section.header)] = np.frombuffer(section.header, np.uint8)
            offset += len(section.header)
            if section.n_bytes:
                yield section, offset
            offset += n_cells * section.n_bytes


def _type_name(ggml_type: int) -> str | None:
    return next((name for name in capi.CACHE_TYPES if capi.cache_type(name) == ggml_type), None)
