"""What makes a frequency chunk dominant: a small registry of objectives that rank the chunks of each KV head.

An objective sees one layer. It is fed the queries and keys of a calibration text block by block, in order, and then
ranks all chunks of every KV head, best first, so that any prefix of the ranking is a choice. Chunks are ranked per KV
head, not per query head as in arXiv 2602.03152, because one packed key serves its whole group. Scores are raw logits
``q . k``. Equal values go to the lower chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from .second_moments import Energy, LeastSquares
from .top_tokens import AttentionMass, ContextualAgreement


class Objective(Protocol):
    """Ranks the chunks of one layer."""

    uses_top_k: bool

    def update(self, q: np.ndarray, k: np.ndarray) -> None:
        """Takes the next block of the text.

        Args:
            q: float32 ``[n_tokens, n_head, n_embd_head]``, after RoPE.
            k: float32 ``[n_tokens, n_head_kv, n_embd_head]``, after RoPE.
        """
        ...

    def rank(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ranking, int32 ``[n_head_kv, n_chunk]``, and the value of each ranked chunk, float32 alike."""
        ...


OBJECTIVES: dict[str, Callable[[np.ndarray, int, int, int], Objective]] = {
    "agreement": ContextualAgreement,
    "energy": Energy,
    "lsq": LeastSquares,
    "mass": AttentionMass,
}
"""name: class, constructed per layer as ``(dims, n_head_kv, n_tokens, top_k)``.

``dims`` are the chunks' dimensions (:func:`fasa_edge.convert.rope.chunk_dims`), ``n_tokens`` the length of the
calibration and ``top_k`` the number of tokens that a query's top tokens are, for the objectives that look at those.
"""
