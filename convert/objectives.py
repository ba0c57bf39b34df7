"""What makes a frequency chunk dominant: a small registry of objectives that rank the chunks of each KV head.

An objective sees one layer. It is fed the queries and keys of a calibration text block by block, in order, and then
ranks all chunks of every KV head, best first, so that any prefix of the ranking is a choice. Chunks are ranked per KV
head, not per query head as in arXiv 2602.03152, because one packed key serves its whole group. All work on raw logits
``q . k``, without scale or softmax. Equal values go to the lower chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from fasa_edge.errors import ConvertError

import numpy as np

N_QUERIES = 64  # sampled by ContextualAgreement


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


class _SecondMoments:
    """How much the chunks' partial scores vary over the context, from second moments of queries and keys alone.

    For a query ``q`` the partial score of chunk ``i`` is ``s_i``, the sum of ``q_a k_a`` over its dims ``a``. Over the
    keys it varies together with ``s_j`` by the sum of ``q_a q_b Cov_k[a, b]`` over ``a`` in ``i``, ``b`` in ``j``.
    Averaged over queries, those of all heads of the group, that is::

        A[i, j] = sum of E[q_a q_b] Cov_k[a, b] over a in i, b in j

    Causality is kept block by block: queries of a block meet the keys of all blocks up to it. The first block has no
    context and contributes keys only.
    """

    uses_top_k = False

    def __init__(self, dims: np.ndarray, n_head_kv: int, n_tokens: int, top_k: int) -> None:
        n_chunk, width = dims.shape
        self._order = dims.ravel()
        self._n_keys = self._n_queries = 0
        self._k_sum = np.zeros((n_head_kv, n_chunk * width))
        self._kk_sum = np.zeros((n_head_kv, n_chunk * width, n_chunk * width))
        self._cov_sum = np.zeros((n_head_kv, n_chunk, n_chunk))

    def update(self, q: np.ndarray, k: np.ndarray) -> None:
        """See :meth:`Objective.update`."""
        n_head_kv, n_chunk, _ = self._cov_sum.shape
        n_dim = self._order.size
        first = self._n_keys == 0
        k = k[..., self._order].astype(np.float64).transpose(1, 0, 2)  # [n_head_kv, n_tokens, n_dim]
        self._n_keys += k.shape[1]
        self._k_sum += k.sum(1)
        self._kk_sum += k.transpose(0, 2, 1) @ k
        if first:
            return
        mean = self._k_sum / self._n_keys
        cov_k = self._kk_sum / self._n_keys - mean[:, :, None] * mean[:, None, :]
        q = q[..., self._order].astype(np.float64).reshape(len(q), n_head_kv, -1, n_dim)
        q = q.transpose(1, 0, 2, 3).reshape(n_head_kv, -1, n_dim)  # every query of every head of the group
        self._n_queries += q.shape[1]
        cov = (q.transpose(0, 2, 1) @ q) * cov_k
        self._cov_sum += cov.reshape(n_head_kv, n_chunk, -1, n_chunk, n_dim // n_chunk).sum((2, 4))

    def _covariance(self) -> np.ndarray:
        """``A``, float64 ``[n_head_kv, n_chunk, n_chunk]``, in logits squared."""
        return self._cov_sum / self._n_queries


class Energy(_SecondMoments):
    """Ranks by the variance of the chunk's own partial score, ``A[i, i]``.

    The value of a chunk is its share of the sum of these variances, 0 to 1.
    """

    def rank(self) -> tuple[np.ndarray, np.ndarray]:
        """See :meth:`Objective.rank`."""
        variance = np.einsum("hii->hi", self._covariance())
        total = variance.sum(1, keepdims=True)
        return _by_value(np.divide(variance, total, out=np.zeros_like(variance), where=total > 0))


class LeastSquares(_SecondMoments):
    """Ranks greedily by the variance of the full score that the chosen chunks leave unexplained.

    What a set leaves is the sum of the other chunks' scores; its variance is the sum of ``A[i, j]`` over the chunks
    left out. Each step adds the chunk after which that is least. The value of a chunk is the fraction of the full
    score's variance that adding it removed: the values of a ranking sum to 1, and one can be negative, where a chunk
    cancels part of another that is still left out.
    """

    def rank(self) -> tuple[np.ndarray, np.ndarray]:
        """See :meth:`Objective.rank`."""
        ranked = [_rank_least_squares(cov) for cov in self._covariance()]
        return np.stack([order for order, _ in ranked]), np.stack([gain for _, gain in ranked])


class ContextualAgreement:
    """The paper's mean contextual agreement CA_K (arXiv 2602.03152): ``|TopK(full) & TopK(chunk)| / K``.

    For a query, TopK(full) are the K tokens up to it of highest full score, TopK(chunk) those of highest partial score
    of one chunk. The value of a chunk is the mean over sampled queries, evenly spread over the positions that see at
    least 2K tokens, and over the group's query heads. All keys are kept in memory.
    """

    uses_top_k = True

    def __init__(self, dims: np.ndarray, n_head_kv: int, n_tokens: int, top_k: int) -> None:
        if n_tokens < 4 * top_k:
            raise ConvertError(
                f"agreement with top_k = {top_k} needs {4 * top_k} tokens but the calibration has {n_tokens}: "
                f"use more text, or top_k = {max(n_tokens // 4, 1)}"
            )
        self._dims = dims
        self._top_k = top_k
        self._queries = np.unique(np.linspace(2 * top_k - 1, n_tokens - 1, N_QUERIES).astype(int))
        self._keys = np.zeros((n_head_kv, 0, dims.size), np.float32)
        self._overlap = np.zeros((n_head_kv, len(dims)))

    def update(self, q: np.ndarray, k: np.ndarray) -> None:
        """See :meth:`Objective.update`."""
        start = self._keys.shape[1]
        self._keys = np.concatenate([self._keys, k.transpose(1, 0, 2)], axis=1)
        for position in self._queries[(start <= self._queries) & (self._queries < start + len(k))]:
            for head, keys in enumerate(self._keys[:, : position + 1]):
                group = q[position - start].reshape(len(self._keys), -1, q.shape[-1])[head]
                for query in group:
                    self._overlap[head] += self._agreement(query, keys) / (len(self._queries) * len(group))

    def _agreement(self, query: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """CA_K of every chunk, float64 ``[n_chunk]``, for one query ``[n_embd_head]`` and its keys."""
        products = (keys * query)[:, self._dims]  # [n_kv, n_chunk, 2]
        partial = products.sum(-1).T
        full = _top_k_mask(partial.sum(0, keepdims=True), self._top_k)
        return (_top_k_mask(partial, self._top_k) & full).sum(1) / self._top_k

    def rank(self) -> tuple[np.ndarray, np.ndarray]:
        """See :meth:`Objective.rank`."""
        return _by_value(self._overlap)


OBJECTIVES: dict[str, Callable[[np.ndarray, int, int, int], Objective]] = {
    "agreement": ContextualAgreement,
    "energy": Energy,
    "lsq": LeastSquares,
}
"""name: class, constructed per layer as ``(dims, n_head_kv, n_tokens, top_k)``.

``dims`` are the chunks' dimensions (:func:`fasa_edge.convert.rope.chunk_dims`), ``n_tokens`` the length of the
calibration and ``top_k`` the K of the contextual agreement.
"""


def _by_value(value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(-value, axis=1, kind="stable")
    return order.astype(np.int32), np.take_along_axis(value, order, axis=1).astype(np.float32)


def _rank_least_squares(cov: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Greedy ranking for one KV head, ``cov`` being ``A`` ``[n_chunk, n_chunk]``."""
    n_chunk, total = len(cov), cov.sum()
    left = np.ones(n_chunk, bool)
    order, gain = np.empty(n_chunk, np.int32), np.empty(n_chunk)
    for rank in range(n_chunk):
        removed = 2 * cov[:, left].sum(1) - cov.diagonal()  # of the variance left, if this chunk is added
        best = int(np.argmax(np.where(left, removed, -np.inf)))
        order[rank], gain[rank] = best, removed[best]
        left[best] = False
    return order, (gain / total if total > 0 else np.zeros(n_chunk)).astype(np.float32)


def _top_k_mask(scores: np.ndarray, k: int) -> np.ndarray:
    """Marks the ``k`` greatest of each row of ``scores`` ``[n, n_kv]``; equal scores go to the lower index."""
    threshold = np.partition(scores, -k, axis=1)[:, -k, None]
    above, tied = scores > threshold, scores == threshold
    return above | (tied & (np.cumsum(tied, axis=1) <= k - above.sum(1, keepdims=True)))
