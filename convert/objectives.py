"""What makes a frequency chunk dominant: a small registry of objectives that rank the chunks of each KV head.

An objective sees one layer. It is fed the queries and keys of a calibration text block by block, in order, and then
ranks all chunks of every KV head, best first, so that any prefix of the ranking is a choice. Chunks are ranked per KV
head, not per query head as in arXiv 2602.03152, because one packed key serves its whole group. Scores are raw logits
``q . k``. Equal values go to the lower chunk. What it is fed stands at position 0; the objective stretches it over
the depths of a context (:mod:`fasa_edge.convert.stretch`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from .second_moments import Energy, LeastSquares
from .stretch import Depth
from .top_tokens import AttentionMass, ContextualAgreement


class Objective(Protocol):
    """Ranks the chunks of one layer."""

    uses_top_k: bool

    def update(self, q: np.ndarray, k: np.ndarray) -> None:
        """Takes the next block of the text.

        Args:
            q: the planes of its queries, turned back to position 0, complex128 ``[n_tokens, n_head, n_chunk]``.
            k: those of its keys, likewise, complex128 ``[n_tokens, n_head_kv, n_chunk]``.
        """
        ...

    def rank(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ranking, int32 ``[n_head_kv, n_chunk]``, and the value of each ranked chunk, float32 alike."""
        ...


class ObjectiveClass(Protocol):
    """Makes the objective of one layer; see :data:`OBJECTIVES`."""

    uses_top_k: bool

    def __call__(
        self, n_head_kv: int, n_chunk: int, n_tokens: int, top_k: int, depths: Sequence[Depth], /
    ) -> Objective:
        """Makes the objective, which has seen nothing yet."""
        ...


OBJECTIVES: dict[str, ObjectiveClass] = {
    "agreement": ContextualAgreement,
    "energy": Energy,
    "lsq": LeastSquares,
    "mass": AttentionMass,
}
"""name: class, constructed per layer as ``(n_head_kv, n_chunk, n_tokens, top_k, depths)``.

``n_tokens`` is the length of the calibration, ``top_k`` the number of tokens that a query's top tokens are, for the
objectives that look at those, and ``depths`` the contexts to stretch over, the greatest last.
"""
