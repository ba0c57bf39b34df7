"""Objectives that need the second moments of queries and keys alone: a short text, no sorting, no keys kept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .stretch import Depth


class _SecondMoments:
    """How much the chunks' partial scores vary over a context, from second moments of queries and keys alone.

    For a query ``q`` the partial score of chunk ``i`` is ``s_i = Re(q_i conj(k_i))``, planes being complex numbers.
    Over the keys it varies together with ``s_j`` by ``Re(q_i conj(q_j) conj(H_ij) + q_i q_j conj(S_ij)) / 2``, with
    ``H_ij`` the mean of ``k_i conj(k_j)`` and ``S_ij`` that of ``k_i k_j``, both of the keys less their mean. Averaged
    over queries, those of all heads of the group, that is ``A[i, j]``.

    Stretching takes no more than that: turned to a position uniform over ``[0, N)``, ``H_ij`` is multiplied with the
    mean turn of the angle ``theta_i - theta_j``, ``S_ij`` with that of ``theta_i + theta_j`` (before the means are
    subtracted, which turn by ``theta_i``); nothing is drawn. ``A`` is summed over the depths as a share of each one's
    variance of the full score, so that all weigh alike.

    The first block's queries know no context and are left out.
    """

    uses_top_k = False

    def __init__(self, n_head_kv: int, n_chunk: int, n_tokens: int, top_k: int, depths: Sequence[Depth]) -> None:
        self._depths = depths
        self._keys = _Moments(n_head_kv, n_chunk)
        self._queries = _Moments(n_head_kv, n_chunk)

    def update(self, q: np.ndarray, k: np.ndarray) -> None:
        """Takes the next block, see :meth:`fasa_edge.convert.objectives.Objective.update`."""
        if self._keys.n > 0:
            _, n_head_kv, n_chunk = k.shape
            q = q.reshape(len(q), n_head_kv, -1, n_chunk).transpose(1, 0, 2, 3)
            self._queries.add(q.reshape(n_head_kv, -1, n_chunk))  # every query of every head of the group
        self._keys.add(k.transpose(1, 0, 2))

    def _covariance(self) -> np.ndarray:
        """``A``, float64 ``[n_head_kv, n_chunk, n_chunk]``, mean over the depths, in shares of their variances."""
        res: np.ndarray = np.zeros(())
        for depth in self._depths:
            cov = self._covariance_at(depth)
            total = cov.sum((1, 2), keepdims=True)
            res = res + np.divide(cov, total, out=np.zeros_like(cov), where=total > 0)
        return res / len(self._depths)

    def _covariance_at(self, depth: Depth) -> np.ndarray:
        """``A`` at one depth, in logits squared."""
        keys, queries = self._keys, self._queries
        angles = depth.angles
        apart, together = angles[:, None] - angles, angles[:, None] + angles
        mean = keys.mean * depth.mean_turn(angles)
        k_conj = keys.conj * depth.mean_turn(apart) - mean[:, :, None] * mean[:, None, :].conj()
        k_plain = keys.plain * depth.mean_turn(together) - mean[:, :, None] * mean[:, None, :]
        q_conj, q_plain = queries.conj * np.exp(1j * depth.n * apart), queries.plain * np.exp(1j * depth.n * together)
        return (q_conj * k_conj.conj() + q_plain * k_plain.conj()).real / 2


class _Moments:
    """Means of planes ``x`` and of their products, over all that was added: complex128, 0 without any.

    Attributes:
        n: how many, of each KV head.
    """

    def __init__(self, n_head_kv: int, n_chunk: int) -> None:
        self.n = 0
        self._sum = np.zeros((n_head_kv, n_chunk), np.complex128)
        self._conj_sum = np.zeros((n_head_kv, n_chunk, n_chunk), np.complex128)
        self._plain_sum = np.zeros_like(self._conj_sum)

    def add(self, x: np.ndarray) -> None:
        """Takes complex128 ``[n_head_kv, n, n_chunk]``."""
        self.n += x.shape[1]
        self._sum += x.sum(1)
        transposed = x.transpose(0, 2, 1)
        self._conj_sum += transposed @ x.conj()
        self._plain_sum += transposed @ x

    @property
    def mean(self) -> np.ndarray:
        """The mean of ``x_i``, ``[n_head_kv, n_chunk]``."""
        return self._sum / max(self.n, 1)

    @property
    def conj(self) -> np.ndarray:
        """The mean of ``x_i conj(x_j)``, ``[n_head_kv, n_chunk, n_chunk]``."""
        return self._conj_sum / max(self.n, 1)

    @property
    def plain(self) -> np.ndarray:
        """The mean of ``x_i x_j``, likewise."""
        return self._plain_sum / max(self.n, 1)


class Energy(_SecondMoments):
    """Ranks by the variance of the chunk's own partial score, ``A[i, i]``.

    The value of a chunk is its share of the sum of these variances, 0 to 1.
    """

    def rank(self) -> tuple[np.ndarray, np.ndarray]:
        """Ranks the chunks, see :meth:`fasa_edge.convert.objectives.Objective.rank`."""
        variance = np.einsum("hii->hi", self._covariance())
        total = variance.sum(1, keepdims=True)
        return by_value(np.divide(variance, total, out=np.zeros_like(variance), where=total > 0))


class LeastSquares(_SecondMoments):
    """Ranks greedily by the variance of the full score that the chosen chunks leave unexplained.

    What a set leaves is the sum of the other chunks' scores; its variance is the sum of ``A[i, j]`` over the chunks
    left out. Each step adds the chunk after which that is least. The value of a chunk is the share of the full score's
    variance, mean over the depths, that adding it removed: the values of a ranking sum to 1, and one can be negative,
    where a chunk cancels part of another that is still left out.
    """

    def rank(self) -> tuple[np.ndarray, np.ndarray]:
        """Ranks the chunks, see :meth:`fasa_edge.convert.objectives.Objective.rank`."""
        ranked = [_rank_least_squares(cov) for cov in self._covariance()]
        return np.stack([order for order, _ in ranked]), np.stack([gain for _, gain in ranked])


def by_value(value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorts each row of ``[n_head_kv, n_chunk]`` by falling value: the order, int32, and the values in it, float32."""
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
