"""Calibration: a model, tokens and an objective in, ranked frequency chunks of every layer out."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from fasa_edge.errors import ConvertError

import numpy as np

from .capture import BLOCK, ModelRun
from .objectives import OBJECTIVES, Objective
from .rope import chunk_dims


def plan_chunks(model: ModelRun) -> dict[int, np.ndarray]:
    """The dimensions of the chunks of every layer that FASA can serve.

    Returns:
        layer index to int32 ``[n_chunk, 2]``, see :func:`fasa_edge.convert.rope.chunk_dims`.

    Raises:
        ConvertError: a layer has no RoPE planes, or no layer has keys in a plain KV cache.
    """
    dims = {}
    for il, layer in enumerate(model.geometry):
        if layer.n_head_kv > 0:
            dims[il] = chunk_dims(layer.n_embd_head, layer.n_rot, layer.rope_type)
    if not dims:
        raise ConvertError(
            f"none of the {len(model.geometry)} layers keeps keys of attention heads in a plain KV cache "
            "(recurrent, latent-attention or encoder model): there is nothing to select from, run it without FASA"
        )
    return dims


def rank_chunks(
    model: ModelRun,
    dims: dict[int, np.ndarray],
    tokens: Sequence[int],
    objective: str,
    top_k: int,
    progress: Callable[[str, int, int], None],
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Ranks the chunks of every KV head by what they do on a text.

    Args:
        model: a loaded model.
        dims: as :func:`plan_chunks` returns.
        tokens: the calibration text, at least 2.
        objective: a name in :data:`fasa_edge.convert.objectives.OBJECTIVES`.
        top_k: K of the objectives that look at top tokens.
        progress: called with a stage, what is done and what there is to do: tokens in stage ``"calibrate"``, layers in
            stage ``"rank"``.

    Returns:
        Ranked chunks, int32, and their values, float32: one array ``[n_head_kv, n_chunk]`` a layer, ``[0, 0]`` for a
        layer that ``dims`` or decoding leaves out.

    Raises:
        ConvertError: as :meth:`ModelRun.capture`; no layer was captured; or the text is too short for the objective.
    """
    make = OBJECTIVES[objective]
    objectives: dict[int, Objective] = {}
    progress("calibrate", 0, len(tokens))
    for n_done, il, q, k in model.capture(tokens, sorted(dims), min(BLOCK, len(tokens) // 2)):
        if il not in objectives:
            objectives[il] = make(dims[il], model.geometry[il].n_head_kv, len(tokens), top_k)
        objectives[il].update(q, k)
        progress("calibrate", n_done, len(tokens))
    if not objectives:
        raise ConvertError(f"llama.cpp ran none of the {len(dims)} attention layers on a KV cache: run it without FASA")
    no_heads = (np.zeros((0, 0), np.int32), np.zeros((0, 0), np.float32))
    ranked = [no_heads] * len(model.geometry)
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # numpy lets go of the lock where it sorts and multiplies
        rankings = threads.map(lambda il: objectives[il].rank(), objectives)
        for n_done, (il, ranking) in enumerate(zip(objectives, rankings, strict=True), start=1):
            ranked[il] = ranking
            progress("rank", n_done, len(objectives))
    return [chunks for chunks, _ in ranked], [agreement for _, agreement in ranked]
