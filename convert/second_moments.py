"""Objectives that need the second moments of queries and keys alone: a short text, no sorting, no keys kept."""

from __future__ import annotations

import numpy as np


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
        """See :meth:`fasa_edge.convert.objectives.Objective.update`."""
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
        """See :meth:`fasa_edge.convert.objectives.Objective.rank`."""
        variance = np.einsum("hii->hi", self._covariance())
        total = variance.sum(1, keepdims=True)
        return by_value(np.divide(variance, total, out=np.zeros_like(variance), where=total > 0))


class LeastSquares(_SecondMoments):
    """Ranks greedily by the variance of the full score that the chosen chunks leave unexplained.

    What a set leaves is the sum of the other chunks' scores; its variance is the sum of ``A[i, j]`` over the chunks
    left out. Each step adds the chunk after which that is least. The value of a chunk is the fraction of the full
    score's variance that adding it removed: the values of a ranking sum to 1, and one can be negative, where a chunk
    cancels part of another that is still left out.
    """

    def rank(self) -> tuple[np.ndarray, np.ndarray]:
        """See :meth:`fasa_edge.convert.objectives.Objective.rank`."""
        ranked = [_rank_least_squares(cov) for cov in self._covariance()]
        return np.stack([order for order, _ in ranked]), np.stack([gain for _, gain in ranked])


def by_value(value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Order of falling value, int32, and the values in that order, float32, of each row of ``[n_head_kv, n_chunk]``."""
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
