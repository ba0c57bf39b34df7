"""Calibration: a model, tokens and an objective in, ranked frequency chunks of every layer out."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from fasa_edge.errors import ConvertError

import numpy as np

from .capture import BLOCK, ModelRun
from .objectives import OBJECTIVES, Objective
from .ranges import KeyRanges
from .rope import chunk_dims
from .stretch import Depth, depths, planes, turn


def plan_chunks(model: ModelRun) -> dict[int, np.ndarray]:
    """Finds the dimensions of the chunks of every layer that FASA can serve.

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


@dataclass(frozen=True, eq=False)
class Ranking:
    """The chunks of one layer, best first.

    Attributes:
        chunks: int32 ``[n_head_kv, n_chunk]``.
        agreement: what the objective gave each, float32 alike.
        centre: that of the keys of each, float32 ``[n_head_kv, n_chunk, 2]``, see :mod:`fasa_edge.convert.ranges`.
        step: that of the tips of each, float32 ``[n_head_kv, n_chunk]``.
    """

    chunks: np.ndarray
    agreement: np.ndarray
    centre: np.ndarray
    step: np.ndarray


_NO_HEADS = Ranking(
    chunks=np.zeros((0, 0), np.int32),
    agreement=np.zeros((0, 0), np.float32),
    centre=np.zeros((0, 0, 2), np.float32),
    step=np.zeros((0, 0), np.float32),
)


def rank_chunks(
    model: ModelRun,
    dims: dict[int, np.ndarray],
    tokens: Sequence[int],
    objective: str,
    top_k: int,
    n_ctx: int,
    progress: Callable[[str, int, int], None],
) -> list[Ranking]:
    """Ranks the chunks of every KV head by what they do on a text, stretched over a context.

    Args:
        model: a loaded model.
        dims: as :func:`plan_chunks` returns.
        tokens: the calibration text, at least 2.
        objective: a name in :data:`fasa_edge.convert.objectives.OBJECTIVES`.
        top_k: K of the objectives that look at top tokens.
        n_ctx: positions of the longest context to stretch over; layers with a sliding window see no more than that.
        progress: called with a stage, what is done and what there is to do: tokens in stage ``"calibrate"``, layers in
            stage ``"rank"``.

    Returns:
        One a layer, without heads for a layer that ``dims`` or decoding leaves out.

    Raises:
        ConvertError: as :meth:`ModelRun.capture`; no layer was captured; or the text is too short for the objective.
    """
    layers: dict[int, _Layer] = {}
    progress("calibrate", 0, len(tokens))
    for n_done, il, q, k in model.capture(tokens, sorted(dims), min(BLOCK, len(tokens) // 2)):
        if il not in layers:
            layers[il] = _Layer(model, il, dims[il], OBJECTIVES[objective], len(tokens), top_k, n_ctx)
        layers[il].update(q, k)
        progress("calibrate", n_done, len(tokens))
    if not layers:
        raise ConvertError(f"llama.cpp ran none of the {len(dims)} attention layers on a KV cache: run it without FASA")
    ranked = [_NO_HEADS] * len(model.geometry)
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # numpy lets go of the lock where it sorts and multiplies
        rankings = threads.map(lambda il: layers[il].rank(), layers)
        for n_done, (il, ranking) in enumerate(zip(layers, rankings, strict=True), start=1):
            ranked[il] = ranking
            progress("rank", n_done, len(layers))
    return ranked


class _Layer:
    """What one layer's blocks go through: back to position 0, then to the objective and to the ranges."""

    def __init__(
        self,
        model: ModelRun,
        il: int,
        dims: np.ndarray,
        make: Callable[..., Objective],
        n_tokens: int,
        top_k: int,
        n_ctx: int,
    ) -> None:
        n_head_kv, n_chunk = model.geometry[il].n_head_kv, len(dims)
        self._dims = dims
        self._angles = model.angles(il)
        self._depths = [Depth(n, model.angles(il, n)) for n in depths(min(n_ctx, model.window(il) or n_ctx))]
        self._objective = make(n_head_kv, n_chunk, n_tokens, top_k, self._depths)
        self._ranges = KeyRanges(n_head_kv, n_chunk)
        self._n_tokens = 0

    def update(self, q: np.ndarray, k: np.ndarray) -> None:
        """Takes the next block, as it was captured."""
        positions = np.arange(self._n_tokens, self._n_tokens + len(k))
        q, k = (turn(planes(x, self._dims), self._angles, -positions) for x in (q, k))
        self._objective.update(q, k)
        self._ranges.update(k)
        self._n_tokens += len(k)

    def rank(self) -> Ranking:
        """Ranks; chunks whose keys never move come last, whatever the objective says."""
        chunks, agreement = self._objective.rank()
        centre, step = self._ranges.measure(self._depths[-1])
        step = np.take_along_axis(step, chunks, 1)
        order = np.argsort(step == 0, axis=1, kind="stable")
        chunks, agreement, step = (np.take_along_axis(x, order, 1) for x in (chunks, agreement, step))
        return Ranking(chunks, agreement, np.take_along_axis(centre, chunks[..., None], 1), step)
