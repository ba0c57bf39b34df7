"""Random inputs of the ops, and how near to a reference results have to be."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NMSE_REFERENCE = 1e-6  # f16 K and V against a float64 oracle


@dataclass(frozen=True)
class Shape:
    """One case; ``n_kv`` cells of which the last token sees all but ``n_hidden``."""

    n_embd_head: int = 64
    n_head: int = 9
    n_head_kv: int = 3
    n_kv: int = 256
    n_tokens: int = 1
    n_dim: int = 24
    n_hidden: int = 0


@dataclass
class Case:
    """Random inputs of a shape, numpy's way round."""

    q: np.ndarray  # float32 [n_tokens, n_head, n_embd_head]
    k: np.ndarray  # float32 [n_kv, n_head_kv, n_embd_head]
    v: np.ndarray  # float16, the same
    dims: np.ndarray  # int32 [n_head_kv, n_dim]
    ranges: np.ndarray  # float32 [n_head_kv, 2, n_dim]
    mask: np.ndarray  # float16 [n_tokens, n_kv]
    scale: float


def make_case(shape: Shape, seed: int = 0) -> Case:
    rng = np.random.default_rng(seed)
    normal = lambda *size: rng.standard_normal(size, dtype=np.float32)  # noqa: E731
    mask = np.zeros((shape.n_tokens, shape.n_kv), np.float16)
    visible = shape.n_kv - shape.n_hidden - np.arange(shape.n_tokens)[::-1]
    mask[np.arange(shape.n_kv)[None, :] >= visible[:, None]] = -np.inf
    mask[:, 3] = -np.inf  # a hole, as seq_rm leaves it
    ranges = np.stack(
        [rng.uniform(-1, 1, (shape.n_head_kv, shape.n_dim)), rng.uniform(0.2, 0.5, (shape.n_head_kv, shape.n_dim))], 1
    )
    ranges[:, 1, -1] = 0  # never moves
    return Case(
        q=normal(shape.n_tokens, shape.n_head, shape.n_embd_head),
        k=normal(shape.n_kv, shape.n_head_kv, shape.n_embd_head),
        v=normal(shape.n_kv, shape.n_head_kv, shape.n_embd_head).astype(np.float16),
        dims=np.stack([rng.permutation(shape.n_embd_head)[: shape.n_dim] for _ in range(shape.n_head_kv)]).astype(
            np.int32
        ),
        ranges=ranges.astype(np.float32),
        mask=mask,
        scale=shape.n_embd_head**-0.5,
    )


def unpack(tips: np.ndarray, n_head_kv: int, n_dim: int) -> np.ndarray:
    """The levels in a tip cache of one stream, uint8 [n_kv, n_head_kv, n_dim]; what fills them up must be 0.

    Args:
        tips: its bytes; ``ggml_kernels/fasa-tips.h`` has their order.
        n_head_kv: KV heads.
        n_dim: dims kept of each.
    """
    blocks = tips.reshape(n_head_kv, -1, -(-n_dim // 8), 32, 4)  # [head, block, eight dims, cell, byte]
    halves = np.stack([blocks & 15, blocks >> 4], 4)
    levels = halves.transpose(1, 3, 0, 2, 4, 5).reshape(-1, n_head_kv, halves.shape[2] * 8)
    assert (levels[..., n_dim:] == 0).all()
    return levels[..., :n_dim]
