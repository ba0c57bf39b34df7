"""The state of a sequence, taken apart into rows of tokens.

llama.cpp writes a KV cache as sections: of each cell its position, then of each cell K of the first layer, and so on,
the sections apart by a few bytes (``llama_kv_cache::state_write``, src/llama-kv-cache.cpp). So the rows of any tokens
can be kept by themselves, and be put together to the state of any prefix. What follows, of a memory that cannot forget
a part of a sequence (sliding windows, recurrent states), is its tail: the same bytes that
``LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY`` asks for.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

HEAD = 8
"""Bytes before the first memory: magic and sequence."""

_COUNT = HEAD + 4
"""Offset of the number of cells, after that of streams."""

_CELL = 12
"""Bytes of a cell: position, number of sequences, sequence; those of ``llama_kv_cell_ext`` follow where it is kept."""

_EXT = (0, 12, 8)


@dataclass(frozen=True)
class Layout:
    """What a state has besides its rows and its tail, the same for any number of tokens.

    Attributes:
        literals: what stands before each section; in the first of them the number of cells is 0. Empty: there are no
            rows.
        row_sizes: bytes of a token in each section; the first is of the cells, then K of the layers, then V of the
            layers.
    """

    literals: tuple[bytes, ...]
    row_sizes: tuple[int, ...]

    @property
    def token_size(self) -> int:
        """Bytes of a token."""
        return sum(self.row_sizes)

    def size(self, n_tokens: int) -> int:
        """Bytes of a state without its tail."""
        return sum(map(len, self.literals)) + n_tokens * self.token_size

    def sections(self, state: np.ndarray, n_tokens: int) -> list[np.ndarray]:
        """Views of a state's sections, each uint8 [n_tokens, row_size]."""
        views, offset = [], 0
        for literal, row_size in zip(self.literals, self.row_sizes, strict=True):
            offset += len(literal)
            views.append(state[offset : offset + n_tokens * row_size].reshape(n_tokens, row_size))
            offset += n_tokens * row_size
        return views

    def empty(self, n_tokens: int, n_tail: int) -> np.ndarray:
        """Make a state, uint8 [n_bytes], in which rows and tail are left to be filled in."""
        state = np.empty(self.size(n_tokens) + n_tail, np.uint8)
        offset = 0
        for literal, row_size in zip(self.literals, self.row_sizes, strict=True):
            state[offset : offset + len(literal)] = np.frombuffer(literal, np.uint8)
            offset += len(literal) + n_tokens * row_size
        if self.literals:
            state[_COUNT : _COUNT + 4] = np.frombuffer(struct.pack("<I", n_tokens), np.uint8)
        return state

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain values for JSON."""
        return {"literals": [literal.hex() for literal in self.literals], "row_sizes": list(self.row_sizes)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Layout:
        """Make it of what :meth:`as_dict` returned."""
        return cls(tuple(map(bytes.fromhex, fields["literals"])), tuple(map(int, fields["row_sizes"])))


def parse(state: np.ndarray, n_tail: int, types: Sequence[int]) -> tuple[Layout, int] | None:
    """Find the sections of a state.

    Args:
        state: uint8 [n_bytes].
        n_tail: bytes at its end that are no rows.
        types: ``enum ggml_type`` of cached K and V.

    Returns:
        The layout and the number of cells; None for a memory of another kind, or one that is shared among sequences.
    """
    end = len(state) - n_tail
    head = state[: _COUNT + 4].tobytes()
    if len(head) < _COUNT + 4 or end < _COUNT + 4:
        return None
    n_stream, n_cells = struct.unpack_from("<II", head, HEAD)
    if n_stream != 1 or n_cells == 0:
        return None
    for ext in _EXT:
        with contextlib.suppress(ValueError, struct.error):
            return _parse(state[:end], head, n_cells, _CELL + ext, types), n_cells
    return None


def _parse(state: np.ndarray, head: bytes, n_cells: int, cell_size: int, types: Sequence[int]) -> Layout:
    """The layout, if a cell has so many bytes, else a ValueError."""
    offset = len(head) + n_cells * cell_size
    v_trans, n_layer = struct.unpack("<II", state[offset : offset + 8].tobytes())
    if v_trans or not 0 < n_layer < 1 << 16:
        raise ValueError
    literals, row_sizes = [head[:_COUNT] + bytes(4)], [cell_size]
    n_before = 8
    while offset + n_before < len(state):
        literal = state[offset : offset + n_before + 12].tobytes()
        ggml_type, row_size = struct.unpack_from("<iQ", literal, n_before)
        # K of all layers, then V of as many, or of none
        if ggml_type != types[len(literals) > n_layer] or row_size * n_cells > len(state):
            raise ValueError
        literals.append(literal)
        row_sizes.append(row_size)
        offset += len(literal) + n_cells * row_size
        n_before = 0
    if offset != len(state) or len(literals) - 1 not in (n_layer, 2 * n_layer):
        raise ValueError
    return Layout(tuple(literals), tuple(row_sizes))


def positions(cells: np.ndarray) -> np.ndarray:
    """Positions of the cells of a state's first section, int32 [n_tokens]."""
    return np.ascontiguousarray(cells[:, :4]).view("<i4")[:, 0]
