"""FASA stated in numpy: what the three ops compute, one function for each (``ggml_kernels/README.md`` is the contract).

Shapes follow numpy, outermost first: queries ``[n_tokens, n_head, n_embd_head]``, keys and values
``[n_kv, n_head_kv, n_embd_head]``. Query head ``h`` reads KV head ``h // (n_head / n_head_kv)``. Everything is one
stream; arithmetic is float64 except where a stored type rounds.
"""

from __future__ import annotations

import numpy as np

MASKED = -np.inf
F32_MAX = float(np.finfo(np.float32).max)

# of a query in 8 bits, times the scale of the logits: a greater one counts as this, and no float32 score is infinite
MAX_STEP = 1e24 * np.log(2)


def store(k: np.ndarray, dims: np.ndarray, ranges: np.ndarray, k_type: type | None = np.float16) -> np.ndarray:
    """The tips of keys: the dominant dims of each key in 4 bits.

    A dim ``x`` is at level ``floor((x - centre) / step) + 8``, from 0 to 15, which stands for
    ``centre + (level - 7.5) step``; what is not a number is at level 0.

    Args:
        k: float32 [n_kv, n_head_kv, n_embd_head], after RoPE.
        dims: int32 [n_head_kv, n_dim], the dims of each head that are kept (two for every chunk).
        ranges: float32 [n_head_kv, 2, n_dim], of these dims the centre and the step; step 0: the dim never moves.
        k_type: type of the K cache, to which the key is rounded first; ``None``: not at all.

    Returns:
        uint8 [n_kv, n_head_kv, n_dim], the levels.
    """
    dom = np.take_along_axis(np.asarray(k, np.float32), dims[None, :, :], axis=2)
    centre, step = ranges[:, 0].astype(np.float32), ranges[:, 1].astype(np.float32)
    inverse = np.divide(np.float32(1), step, out=np.zeros_like(step), where=step > 0)
    with np.errstate(invalid="ignore", over="ignore"):
        if k_type is not None:
            dom = dom.astype(k_type).astype(np.float32)
        steps = (dom - centre) * inverse
    return (np.floor(np.clip(np.where(np.isnan(steps), -8, steps), -8, 7)) + 8).astype(np.uint8)


def score(
    q: np.ndarray,
    tips: np.ndarray,
    dims: np.ndarray,
    ranges: np.ndarray,
    mask: np.ndarray,
    scale: float,
    by_head: bool = False,
) -> np.ndarray:
    """Token importance of every cell for each head that chooses (TIP, arXiv 2602.03152 section 4.2).

    A query head's scores are its logits on the dominant chunks alone, but for a constant: the sum of the levels, each
    times the query in units of its step, rounded to 8 bits, and scaled down where it might overflow. The heads of a
    group are made comparable by log-softmax over the visible cells, and the greatest counts; one head alone keeps its
    raw scores, the paper's rule.

    Args:
        q: float32 [n_tokens, n_head, n_embd_head].
        tips: uint8 [n_kv, n_head_kv, n_dim] from :func:`store`.
        dims: int32 [n_head_kv, n_dim].
        ranges: float32 [n_head_kv, 2, n_dim], as the tips were stored with.
        mask: float [n_tokens, n_kv], 0 visible, -inf not.
        scale: of the logits.
        by_head: each query head chooses for itself, not each KV head for its group.

    Returns:
        float64 [n_tokens, n_head_kv, n_kv], by head [n_tokens, n_head, n_kv].
    """
    n_tokens, n_head, n_embd_head = q.shape
    n_head_kv, n_dim = dims.shape
    grouped = q.reshape(n_tokens, n_head_kv, n_head // n_head_kv, n_embd_head)
    dom = np.take_along_axis(grouped, np.broadcast_to(dims[None, :, None, :], (*grouped.shape[:3], n_dim)), axis=3)
    with np.errstate(invalid="ignore", over="ignore"):
        dom = dom * ranges[None, :, None, 1].astype(np.float32)
        rounded, unit = _round_to_8_bits(dom, scale)
        heads = np.einsum("thgd,chd->thgc", rounded, tips.astype(np.float64)) * unit  # of whole numbers: ties are exact
    heads = np.where(mask[:, None, None, :] > MASKED, heads, MASKED)
    if by_head:
        heads = heads.reshape(n_tokens, n_head, 1, -1)
    if heads.shape[2] > 1:
        with np.errstate(invalid="ignore"):
            heads = heads - np.logaddexp.reduce(heads, axis=3, keepdims=True)
    return np.where(np.isnan(heads), MASKED, heads).max(axis=2)


def _round_to_8_bits(x: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows of float32 as multiples of a 127th of their greatest magnitude; that, scaled, or NaN if it is not finite."""
    top = np.abs(x).max(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore", over="ignore"):
        inverse = np.divide(np.float32(127), top, out=np.zeros_like(top), where=top > 1e-30)
        step = np.clip(scale * top.astype(np.float64) / 127, -MAX_STEP, MAX_STEP)
        return np.nan_to_num(np.rint(x * inverse)), np.where(np.isfinite(top), step, np.nan)


def select(scores: np.ndarray, n_fac: int, forced: np.ndarray | None = None) -> np.ndarray:
    """The cells that each head attends to: the ``n_fac`` best, equal scores by the lower id.

    Args:
        scores: float64 [n_tokens, n_head_sel, n_kv] from :func:`score`; -inf: not visible.
        n_fac: budget, forced cells included.
        forced: int32 [n_tokens, n_forced], cells chosen whatever their score if they are visible; -1: none.

    Returns:
        int32 [n_tokens, n_head_sel, n_fac], ascending, then -1.
    """
    scores = scores.copy()
    for it, cells in enumerate(forced if forced is not None else ()):
        cells = cells[cells >= 0]
        scores[it][:, cells] = np.where(scores[it][:, cells] > MASKED, np.inf, MASKED)

    res = np.full((*scores.shape[:2], n_fac), -1, np.int32)
    for index in np.ndindex(scores.shape[:2]):
        order = np.argsort(-scores[index], kind="stable")[:n_fac]
        cells = np.sort(order[scores[index][order] > MASKED])
        res[index][: len(cells)] = cells
    return res


PROMPT_ROWS = 144  # query heads of neighbouring tokens that attend to the same blocks, about
PROMPT_BLOCK = 64  # cells
PROMPT_ASKED = 4  # tokens that are asked for all of these


def prompt_blocks(
    q: np.ndarray, tips: np.ndarray, dims: np.ndarray, ranges: np.ndarray, mask: np.ndarray, scale: float, mass: float
) -> np.ndarray:
    """The cells that the tokens of a prompt attend to for each KV head: those they see in the blocks that matter.

    Of a tile of neighbouring tokens a few are asked. Blocks are taken by the greatest share of attention that one of
    their query heads gives them, by its scores on the tips, until each head is left with ``mass`` of its own. Always
    taken are the first block that is seen, those that only some of the tile's tokens see, and those before these.

    Args:
        q: float32 [n_tokens, n_head, n_embd_head].
        tips: uint8 [n_kv, n_head_kv, n_dim] from :func:`store`.
        dims: int32 [n_head_kv, n_dim].
        ranges: float32 [n_head_kv, 2, n_dim].
        mask: float [n_tokens, n_kv], 0 visible, -inf not.
        scale: of the logits.
        mass: share of attention, less than 1.

    Returns:
        int32 [n_tokens, n_head_kv, n_kv] ids, -1 where a cell is not attended to.
    """
    n_tokens, n_head, _ = q.shape
    n_kv, n_head_kv = tips.shape[:2]
    n_group, n_blocks = n_head // n_head_kv, -(-n_kv // PROMPT_BLOCK)
    blocks = np.arange(n_kv) // PROMPT_BLOCK
    visible = mask > MASKED
    scores = score(q, tips, dims, ranges, mask, scale, by_head=True)
    res = np.full((n_tokens, n_head_kv, n_kv), -1, np.int32)
    n_tile = min(n_tokens, max(PROMPT_ROWS // n_group, 1))
    for start in range(0, n_tokens, n_tile):
        tile = np.arange(start, min(start + n_tile, n_tokens))
        seen = np.array([visible[tile][:, blocks == block].mean() for block in range(n_blocks)])
        always = (seen > 0) & (seen < 1)
        always[:-1] |= (seen[:-1] == 1) & (seen[1:] < 1)
        always[(seen > 0).argmax()] |= (seen > 0).any()
        asked = tile[[max((i + 1) * len(tile) // PROMPT_ASKED - 1, 0) for i in range(PROMPT_ASKED)]]
        for ih in range(n_head_kv):
            logits = scores[asked, ih * n_group : (ih + 1) * n_group].reshape(-1, n_kv)
            weights = np.exp(logits - np.maximum(logits.max(axis=1, keepdims=True), -F32_MAX))
            shares = np.stack([weights[:, blocks == block].sum(axis=1) for block in range(n_blocks)], 1)
            totals = shares.sum(axis=1, keepdims=True)
            shares = np.where(totals > 0, shares / np.where(totals > 0, totals, 1), np.arange(n_blocks) == 0)
            order = np.argsort(-np.where(always, np.inf, shares.max(axis=0)), kind="stable")
            n_before = np.append(0, np.cumsum(shares[:, order], axis=1).min(axis=0)[:-1])
            taken = np.zeros(n_blocks, bool)
            taken[order] = always[order] | (n_before < mass)
            cells = taken[blocks] & visible[tile]
            res[tile, ih] = np.where(cells, np.arange(n_kv), -1)
    return res


def attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    idx: np.ndarray,
    scale: float,
    logit_softcap: float = 0.0,
    sinks: np.ndarray | None = None,
) -> np.ndarray:
    """Exact softmax attention over the listed cells (FAC, arXiv 2602.03152 section 4.3).

    A cell whose logit is -inf has no weight, as if it was not listed; a logit that is inf or NaN makes the head NaN.

    Args:
        q: float32 [n_tokens, n_head, n_embd_head_k].
        k: [n_kv, n_head_kv, n_embd_head_k] as cached.
        v: [n_kv, n_head_kv, n_embd_head_v] as cached.
        idx: int32 [n_tokens, n_head_kv or n_head, n_fac] from :func:`select`.
        scale: of the logits.
        logit_softcap: ``c`` of ``c * tanh(logit / c)``; 0: none.
        sinks: float [n_head], logits that take a share of the softmax and give nothing; -inf: none.

    Returns:
        float64 [n_tokens, n_head, n_embd_head_v]; zeros where no cell has a weight.
    """
    n_tokens, n_head, _ = q.shape
    n_group = n_head // k.shape[1]
    res = np.zeros((n_tokens, n_head, v.shape[2]))
    for it, ih in np.ndindex(n_tokens, n_head):
        cells = idx[it, ih * idx.shape[1] // n_head]
        cells = cells[cells >= 0]
        if len(cells) == 0:
            continue
        with np.errstate(invalid="ignore"):
            logits = scale * (k[cells, ih // n_group].astype(np.float64) @ q[it, ih].astype(np.float64))
            logits[np.abs(logits) > F32_MAX] *= np.inf
            if logit_softcap:
                logits = logit_softcap * np.tanh(logits / logit_softcap)
            sink = MASKED if sinks is None else sinks[ih]
            top = np.max([-F32_MAX, sink, logits.max()])
            weights = np.exp(logits - top)
            total = weights.sum() + np.exp(sink - top)
            if total != 0:
                res[it, ih] = (weights / total) @ v[cells, ih // n_group].astype(np.float64)
    return res
