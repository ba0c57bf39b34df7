"""Geometries of well-known models: what decides how fast one decodes, without its weights."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fasa_edge.errors import FasaError


@dataclass(frozen=True)
class Heads:
    """The attention of one layer.

    Attributes:
        n_head: query heads.
        n_head_kv: KV heads.
        n_embd_head: dims of a head.
    """

    n_head: int
    n_head_kv: int
    n_embd_head: int

    def __str__(self) -> str:
        """Write the heads as in ``fasa.fingerprint``."""
        return f"{self.n_head}/{self.n_head_kv}x{self.n_embd_head}"


@dataclass(frozen=True)
class Geometry:
    """A model; names as in its GGUF.

    Attributes:
        arch: ``general.architecture``: llama, qwen2 or qwen3.
        n_layer: layers.
        n_embd: width of the model.
        n_ff: width of the feed-forward layers.
        heads: of every layer.
        n_vocab: tokens of the vocabulary.
        rope_base: frequency base of RoPE.
        tied: whether the output matrix is that of the embeddings.
    """

    arch: str
    n_layer: int
    n_embd: int
    n_ff: int
    heads: Heads
    n_vocab: int
    rope_base: float
    tied: bool


GEOMETRIES = {
    "llama-3.1-8b": Geometry("llama", 32, 4096, 14336, Heads(32, 8, 128), 128256, 5e5, False),
    "llama-3.2-1b": Geometry("llama", 16, 2048, 8192, Heads(32, 8, 64), 128256, 5e5, True),
    "llama-3.2-3b": Geometry("llama", 28, 3072, 8192, Heads(24, 8, 128), 128256, 5e5, True),
    "mistral-7b": Geometry("llama", 32, 4096, 14336, Heads(32, 8, 128), 32768, 1e6, False),
    "qwen2.5-7b": Geometry("qwen2", 28, 3584, 18944, Heads(28, 4, 128), 152064, 1e6, False),
    "qwen3-0.6b": Geometry("qwen3", 28, 1024, 3072, Heads(16, 8, 128), 151936, 1e6, True),
    "qwen3-4b": Geometry("qwen3", 36, 2560, 9728, Heads(32, 8, 128), 151936, 1e6, True),
    "qwen3-8b": Geometry("qwen3", 36, 4096, 12288, Heads(32, 8, 128), 151936, 1e6, False),
    "smollm2-135m": Geometry("llama", 30, 576, 1536, Heads(9, 3, 64), 49152, 1e5, True),
    "smollm2-1.7b": Geometry("llama", 24, 2048, 8192, Heads(32, 32, 64), 49152, 1.3e5, True),
}
"""Geometries by the names that people know them by; hyperparameters from their config.json."""


def find_geometry(name: str) -> Geometry:
    """Find a geometry by its name.

    Raises:
        FasaError: there is none of that name.
    """
    if name not in GEOMETRIES:
        raise FasaError(f"geometry {name} is unknown: choose from {', '.join(GEOMETRIES)}")
    return GEOMETRIES[name]


def find_heads(name: str) -> Heads:
    """Find the attention of a geometry, or take one given as ``HEADS/KV_HEADSxSIZE``: ``32/8x64``.

    Raises:
        FasaError: it is neither, or such heads cannot be.
    """
    if name in GEOMETRIES:
        return GEOMETRIES[name].heads
    if not (match := re.fullmatch(r"(\d+)/(\d+)x(\d+)", name)):
        raise FasaError(
            f"geometry {name} is unknown: give query heads / KV heads x head size, as 32/8x64, or one of "
            f"{', '.join(GEOMETRIES)}"
        )
    heads = Heads(*map(int, match.groups()))
    if not heads.n_head_kv or heads.n_head % heads.n_head_kv or not heads.n_head:
        raise FasaError(f"geometry {name}: the query heads must be a multiple of the KV heads")
    if not 16 <= heads.n_embd_head <= 512 or heads.n_embd_head % 16:
        raise FasaError(f"geometry {name}: the head size must be a multiple of 16, from 16 to 512")
    return heads
