"""Which dimensions of a head form a RoPE plane: the frequency chunks (FCs) of arXiv 2602.03152 in llama.cpp's layouts.

RoPE turns plane ``i`` by ``base^(-2i / n_rot)`` per position. The pairs follow ggml_rope_ext and ggml_rope_multi
(ggml/src/ggml-cpu/ops.cpp): consecutive dimensions in NORM models, dimensions ``n_rot / 2`` apart in NEOX models, the
convention of Hugging Face. Multimodal RoPE (M-RoPE, interleaved or not) turns the planes of NEOX, each by one of a
token's several positions, which are all the same in text. With partial rotary, the dimensions from ``n_rot`` on are
not rotated; any two of them form a plane of frequency 0. A few architectures rotate the *last* dimensions instead
(MiniCPM3, PLM): there, chunks are pairs of dimensions that do not all turn as one, see docs/design.md.
"""

from __future__ import annotations

from fasa_edge.errors import ConvertError
from fasa_edge.runtime import capi
from fasa_edge.runtime.library import llama_cpp

import numpy as np

ROPE_NONE = llama_cpp.LLAMA_ROPE_TYPE_NONE
ROPE_NORM = llama_cpp.LLAMA_ROPE_TYPE_NORM
ROPE_NEOX = llama_cpp.LLAMA_ROPE_TYPE_NEOX
ROPE_MROPE = llama_cpp.LLAMA_ROPE_TYPE_MROPE
ROPE_VISION = llama_cpp.LLAMA_ROPE_TYPE_VISION
ROPE_IMROPE = llama_cpp.LLAMA_ROPE_TYPE_IMROPE

_KNOWN = (ROPE_NORM, ROPE_NEOX, ROPE_MROPE, ROPE_IMROPE)

_REFUSED = {
    ROPE_NONE: "the model has no rotary embedding (RoPE), so its heads have no frequency chunks",
    ROPE_VISION: "vision RoPE belongs to an image encoder, not to a language model",
}


def chunk_dims(n_embd_head: int, n_rot: int, rope_type: int) -> np.ndarray:
    """Finds the two dimensions of every frequency chunk of a head.

    Args:
        n_embd_head: dimensions of a key head.
        n_rot: number of rotated ones, taken for the leading dimensions of the head.
        rope_type: of ``enum llama_rope_type``.

    Returns:
        int32 ``[n_embd_head / 2, 2]``: rotated planes by falling frequency, then the unrotated ones; where the last
        dimensions are rotated, pairs that partition the head all the same.

    Raises:
        ConvertError: a RoPE type without such planes, or sizes that are odd or out of range.
    """
    if rope_type not in _KNOWN:
        reason = _REFUSED.get(rope_type, "its layout is unknown")
        known = ", ".join(map(str, _KNOWN))
        raise ConvertError(f"RoPE type {rope_type} cannot be converted, only {known}: {reason}")
    if n_embd_head < 2 or n_embd_head % 2:
        raise ConvertError(f"head size {n_embd_head} cannot be split into planes: it must be even and at least 2")
    if not 0 <= n_rot <= n_embd_head or n_rot % 2:
        raise ConvertError(f"n_rot = {n_rot} does not fit a head of {n_embd_head}: it must be even and not larger")
    return capi.chunk_dims(capi.LayerGeometry(1, 1, n_embd_head, n_rot, rope_type, is_swa=False))
