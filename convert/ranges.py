"""Where the keys of each chunk lie: centre and step of their tips of four bits.

A tip is a level 0 to 15 for each of a chunk's two dims: ``floor((k - centre) / step) + 8``, clipped, which stands for
``centre + (level - 7.5) step``. One step serves both dims, since RoPE turns one into the other. The centre is the mean
of the keys over the longest context that they are stretched over (:mod:`fasa_edge.convert.stretch`), and 16 steps span
``CLIP`` standard deviations to either side.
"""

from __future__ import annotations

import numpy as np

from .stretch import Depth

CLIP = 2.8
N_LEVEL = 16
_STILL = 1e-6  # of the keys' size: as little is rounding


class KeyRanges:
    """Gathers the keys of one layer.

    Args:
        n_head_kv: KV heads.
        n_chunk: chunks of a head.
    """

    def __init__(self, n_head_kv: int, n_chunk: int) -> None:
        self._n = 0
        self._sum = np.zeros((n_head_kv, n_chunk), np.complex128)
        self._square_sum = np.zeros((n_head_kv, n_chunk))

    def update(self, k: np.ndarray) -> None:
        """Takes keys, turned back to position 0: complex128 ``[n_tokens, n_head_kv, n_chunk]``."""
        self._n += len(k)
        self._sum += k.sum(0)
        self._square_sum += (k.real**2 + k.imag**2).sum(0)

    def measure(self, depth: Depth) -> tuple[np.ndarray, np.ndarray]:
        """Measures centre and step over a context.

        Returns:
            Centre, float32 ``[n_head_kv, n_chunk, 2]``, and step, float32 ``[n_head_kv, n_chunk]``; that is 0 for a
            chunk whose keys never move, of which no tip can be made.
        """
        centre = self._sum / self._n * depth.mean_turn(depth.angles)
        square = self._square_sum / self._n  # turning changes none
        variance = np.maximum(square - centre.real**2 - centre.imag**2, 0) / 2  # mean of the two dims
        step = 2 * CLIP / N_LEVEL * np.sqrt(np.where(variance > _STILL**2 * square, variance, 0))
        return np.stack([centre.real, centre.imag], -1).astype(np.float32), step.astype(np.float32)


def clipped(k: np.ndarray, centre: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Finds the values of keys that lie outside of the range of their tips.

    Args:
        k: ``[..., n_chunk, 2]``.
        centre: ``[n_chunk, 2]``, or as many more as ``k`` has before.
        step: ``[n_chunk]``, likewise.

    Returns:
        bool, shaped like ``k``: whether a value lies outside.
    """
    return np.abs(k - centre) > N_LEVEL / 2 * step[..., None]
