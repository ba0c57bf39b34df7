"""Objectives that look at which tokens a query ranks highest, by sampled queries."""

from __future__ import annotations

from collections.abc import Sequence

from fasa_edge.errors import ConvertError

import numpy as np

from .second_moments import by_value
from .stretch import Depth, turn

N_QUERIES = 64
N_BLOCKS = 4  # of queries that are ranked together: more of them hide fewer keys, fewer take fewer calls


class _SampledQueries:
    """Keeps all keys of a text and some of its queries.

    Sampled are the queries at ``N_QUERIES`` positions, evenly spread over those that see at least 2K tokens, of all
    heads. Each sees the keys up to its own position. The tokens are stretched over the greatest depth, in their order,
    so that nearest ones stay nearest.
    """

    uses_top_k = True

    def __init__(self, n_head_kv: int, n_chunk: int, n_tokens: int, top_k: int, depths: Sequence[Depth]) -> None:
        if n_tokens < 4 * top_k:
            raise ConvertError(
                f"an objective with top_k = {top_k} needs {4 * top_k} tokens but the calibration has {n_tokens}: "
                f"use more text, or top_k = {max(n_tokens // 4, 1)}"
            )
        self._dims = np.arange(2 * n_chunk).reshape(-1, 2)
        self._top_k = top_k
        self._positions = np.unique(np.linspace(2 * top_k - 1, n_tokens - 1, N_QUERIES).astype(int))
        self._angles, self._stretched = depths[-1].angles, depths[-1].spread(n_tokens)
        self._keys = np.empty((n_head_kv, n_tokens, 2 * n_chunk), np.float32)
        self._queries: list[np.ndarray] = []
        self._n_tokens = 0

    def update(self, q: np.ndarray, k: np.ndarray) -> None:
        """Takes the next block, see :meth:`fasa_edge.convert.objectives.Objective.update`."""
        start, self._n_tokens = self._n_tokens, self._n_tokens + len(k)
        q, k = (self._stretch(x, self._stretched[start : self._n_tokens]) for x in (q, k))
        self._keys[:, start : self._n_tokens] = k.transpose(1, 0, 2)
        self._queries += [q[i - start] for i in self._positions if start <= i < self._n_tokens]

    def _stretch(self, planes: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Planes at position 0 turned to others, as real dims that stand two by two, float32 ``[..., n_embd_head]``."""
        turned = np.ascontiguousarray(turn(planes, self._angles, positions))
        return turned.view(np.float64).astype(np.float32)

    def _groups(self) -> np.ndarray:
        """The sampled queries by KV head, float32 ``[n_head_kv, n_query, n_group, n_embd_head]``."""
        queries = np.stack(self._queries)
        return queries.reshape(len(queries), len(self._keys), -1, queries.shape[-1]).transpose(1, 0, 2, 3)


class ContextualAgreement(_SampledQueries):
    """The paper's mean contextual agreement CA_K (arXiv 2602.03152): ``|TopK(full) & TopK(chunk)| / K``.

    For a query, TopK(full) are the K tokens up to it of highest full score, TopK(chunk) those of highest partial score
    of one chunk. The value of a chunk is the mean over the sampled queries and the group's query heads.
    """

    def rank(self) -> tuple[np.ndarray, np.ndarray]:
        """Ranks the chunks, see :meth:`fasa_edge.convert.objectives.Objective.rank`."""
        return by_value(np.stack([self._agreement(*head) for head in zip(self._groups(), self._keys, strict=True)]))

    def _agreement(self, queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Mean CA_K of every chunk of a KV head, float64 ``[n_chunk]``."""
        overlap = np.zeros(len(self._dims))
        for position, group in zip(self._positions, queries, strict=True):
            for query in group:
                partial = (keys[: position + 1] * query)[:, self._dims].sum(-1).T  # [n_chunk, n_kv]
                full = _top_k_mask(partial.sum(0, keepdims=True), self._top_k)
                overlap += (_top_k_mask(partial, self._top_k) & full).sum(1) / self._top_k
        return overlap / (queries.shape[0] * queries.shape[1])


class AttentionMass(_SampledQueries):
    """Ranks greedily by the attention mass that the chosen chunks' top tokens hold.

    A query's recall is what the K tokens of highest score, summed over the chosen chunks, hold of its full softmax
    attention. Each step adds the chunk after which the mean recall, over the sampled queries and the group's query
    heads, is highest. The value of a chunk is what adding it gained, so the values of a ranking sum to the recall of
    the K tokens that attention itself ranks highest; a value can be negative.

    For the softmax, logits are scaled by ``1 / sqrt(n_embd_head)``. What an architecture really takes is not captured:
    where it scales the queries already and attends with 1 (Gemma) or with a constant of its own (Granite), the softmax
    here is flatter or sharper than the model's. That weighs the queries' tokens otherwise, but orders them alike.
    """

    def rank(self) -> tuple[np.ndarray, np.ndarray]:
        """Ranks the chunks, see :meth:`fasa_edge.convert.objectives.Objective.rank`."""
        ranked = [self._rank_head(*head) for head in zip(self._groups(), self._keys, strict=True)]
        return np.stack([order for order, _ in ranked]), np.stack([gain for _, gain in ranked])

    def _rank_head(self, queries: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        blocks = [
            _MassRecall(queries[rows], keys, self._positions[rows], self._top_k)
            for rows in np.array_split(np.arange(len(queries)), min(N_BLOCKS, len(queries)))
        ]
        left = list(range(len(self._dims)))
        order, recall = [], [0.0]
        while left:
            recalls = [sum(block.recall(self._dims[chunk]) for block in blocks) for chunk in left]
            best = int(np.argmax(recalls))
            recall.append(recalls[best] / (queries.shape[0] * queries.shape[1]))
            order.append(left.pop(best))
            for block in blocks:
                block.add(self._dims[order[-1]])
        return np.array(order, np.int32), np.diff(recall).astype(np.float32)


class _MassRecall:
    """Some queries of a KV head, their attention and their scores over the chunks chosen so far.

    Args:
        queries: float32 ``[n_query, n_group, n_embd_head]``.
        keys: float32 ``[n_kv, n_embd_head]``; those after the last query are not looked at.
        positions: of the queries, rising.
        top_k: tokens whose attention counts.
    """

    def __init__(self, queries: np.ndarray, keys: np.ndarray, positions: np.ndarray, top_k: int) -> None:
        n_query, n_group, n_embd_head = queries.shape
        self._queries = queries.reshape(-1, n_embd_head)
        self._keys = keys[: positions[-1] + 1]
        self._top_k = top_k
        hidden = np.arange(len(self._keys)) > np.repeat(positions, n_group)[:, None]
        logits = np.where(hidden, np.float32(-np.inf), self._queries @ self._keys.T / np.float32(np.sqrt(n_embd_head)))
        mass = np.exp(logits - logits.max(1, keepdims=True))
        self._mass = mass / mass.sum(1, keepdims=True)
        self._scores = np.where(hidden, np.float32(-np.inf), np.float32(0))

    def _scores_with(self, dims: np.ndarray) -> np.ndarray:
        return self._scores + self._queries[:, dims] @ self._keys[:, dims].T

    def add(self, dims: np.ndarray) -> None:
        """Takes a chunk, its two dimensions, into the scores."""
        self._scores = self._scores_with(dims)

    def recall(self, dims: np.ndarray) -> float:
        """Sum over the queries of the attention that the top tokens would hold with one chunk more."""
        top = _top_k_mask(self._scores_with(dims), self._top_k)
        return float(np.einsum("rt,rt->r", self._mass, top).sum(dtype=np.float64))


def _top_k_mask(scores: np.ndarray, k: int) -> np.ndarray:
    """Marks the ``k`` greatest of each row of ``scores`` ``[n, n_kv]``; equal scores go to the lower index."""
    last = scores.shape[1] - k
    threshold = np.partition(scores, last, axis=1)[:, last, None]
    mask = scores >= threshold
    for row in np.flatnonzero(np.count_nonzero(mask, axis=1) > k):
        tied = np.flatnonzero(scores[row] == threshold[row])
        mask[row, tied[k - np.count_nonzero(mask[row]) :]] = False
    return mask
