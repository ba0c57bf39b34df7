"""Stretching: what a short text says of a long context, its keys and queries turned to positions all over it.

A chunk's partial score is ``Re(q conj(k) e^(j theta (p_q - p_k)))``, so what a chunk is worth depends on the distances
that it will see, and those of a short text rank the slow chunks wrongly for every longer context. But keys before RoPE
hardly know where they stand. So each is turned back to position 0, as it was before RoPE, and from there to positions
drawn uniformly from ``[0, N)``, the queries to ``N``, for depths ``N`` up to the model's context.

Of a layer without RoPE, or a chunk that it leaves alone, the angle is 0 and the keys stay what they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MIN_DEPTH = 2048
SEED = 0


@dataclass(frozen=True, eq=False)
class Depth:
    """A context that one layer's keys are stretched over.

    Attributes:
        n: its positions.
        angles: float64 ``[n_chunk]``, radians by which one position turns each chunk.
    """

    n: int
    angles: np.ndarray

    def mean_turn(self, angles: np.ndarray) -> np.ndarray:
        """Computes the mean of ``e^(j angle p)`` over the positions ``p``.

        Args:
            angles: radians, float64 of any shape.

        Returns:
            complex128, shaped like ``angles``.
        """
        angles = angles - 2 * np.pi * np.round(angles / (2 * np.pi))
        half = np.sin(angles / 2)
        still = np.abs(half) < 1e-12  # then so is every multiple
        size = np.where(still, 1, np.sin(self.n * angles / 2) / (self.n * np.where(still, 1, half)))
        return size * np.exp(1j * angles * (self.n - 1) / 2)

    def spread(self, n_tokens: int) -> np.ndarray:
        """Draws ascending positions for the tokens of a text, int64 ``[n_tokens]``; always the same."""
        return np.sort(np.random.default_rng(SEED).integers(0, self.n, n_tokens))


def depths(n_ctx: int) -> list[int]:
    """Lists 2,048 and its doubles below ``n_ctx``, then ``n_ctx``."""
    res = []
    n = MIN_DEPTH
    while n < n_ctx:
        res.append(n)
        n *= 2
    return [*res, n_ctx]


def planes(x: np.ndarray, dims: np.ndarray) -> np.ndarray:
    """Reads the chunks of heads as complex numbers.

    Args:
        x: the heads, ``[..., n_embd_head]``.
        dims: int32 ``[n_chunk, 2]``, see :func:`fasa_edge.convert.rope.chunk_dims`.

    Returns:
        complex128 ``[..., n_chunk]``.
    """
    return x[..., dims[:, 0]].astype(np.float64) + 1j * x[..., dims[:, 1]]


def turn(planes: np.ndarray, angles: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Turns each token's chunks by its position.

    Args:
        planes: complex ``[n_tokens, n_head, n_chunk]``.
        angles: radians per position, ``[n_chunk]``.
        positions: ``[n_tokens]``; negative ones turn back.

    Returns:
        complex, shaped like ``planes``.
    """
    return planes * np.exp(1j * positions[:, None, None] * angles)
