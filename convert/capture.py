"""Runs a text through a model in the patched llama.cpp and hands out the queries and keys of its attention layers.

The library keeps Q and K as they enter attention (``llm_graph_context::build_attn``, src/llama-graph.cpp): after RoPE,
scaled or normalized as the architecture wants, and before the Hadamard rotation of a quantized K cache. So whatever
architecture and quantization llama.cpp runs can be calibrated, with no second model implementation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasa_edge.errors import ConvertError, FasaError
from fasa_edge.runtime import capi, sequence
from fasa_edge.runtime.capi import Capture
from fasa_edge.runtime.library import llama_cpp
from fasa_edge.runtime.log import error_log

import numpy as np

BLOCK = 512  # tokens decoded at a time, as one micro-batch


@dataclass(frozen=True, eq=False)
class Reading:
    """What a model has read, so that another context of it need not.

    Attributes:
        tokens: from the beginning on.
        state: uint8 ``[n_bytes]``, see :func:`fasa_edge.runtime.sequence.save`.
    """

    tokens: list[int]
    state: np.ndarray


class ModelRun:
    """A model loaded for calibration; close it, or use it as a context manager.

    Attributes:
        geometry: one ``fasa_edge.runtime.capi.LayerGeometry`` a layer.
        fingerprint: of the model's architecture and geometry.

    Args:
        path: the model.
        n_ctx: tokens of its context.
        annotated: whether it carries a profile, which is ignored.
        options: ``n_threads``, ``n_gpu_layers`` and the like, of ``llama_cpp.Llama``.

    Raises:
        ConvertError: llama.cpp cannot load the file or has too little memory for it.
        LibraryError: the patched library is missing.
    """

    def __init__(self, path: str | Path, n_ctx: int, *, annotated: bool = False, **options: Any) -> None:
        self._path = Path(path)
        # version 0: an old annotation is ignored, so that a damaged one can be replaced, too
        overrides = {"fasa.version": 0} if annotated else None
        with error_log() as log:
            try:
                self._llm = llama_cpp.Llama(
                    str(path),
                    n_ctx=n_ctx,
                    n_batch=BLOCK,
                    n_ubatch=BLOCK,
                    flash_attn=True,
                    kv_overrides=overrides,
                    verbose=False,
                    **options,
                )
            except Exception as error:  # the bindings raise whatever comes: ValueError, AssertionError, jinja2's ...
                reason = log[0] if log else str(error)
                raise ConvertError(
                    f"{path} cannot be run by llama.cpp: {reason}; check that the file is complete and fits the memory"
                ) from error
        self.geometry = capi.layer_geometry(self._llm.model)
        self.fingerprint: str = capi.fingerprint(self._llm.model)

    def __enter__(self) -> ModelRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the model."""
        self._llm.close()

    def angles(self, il: int, n_ctx: int = 0) -> np.ndarray:
        """Computes by how many radians one position turns each chunk of a head of a layer that was captured last.

        Args:
            il: the layer.
            n_ctx: in a context of that many tokens; 0: in this one.

        Returns:
            float64 ``[n_chunk]``, see :func:`fasa_edge.runtime.capi.rope_angles`.
        """
        return capi.rope_angles(self._llm.ctx, il, self.geometry[il].n_embd_head // 2, n_ctx)

    def window(self, il: int) -> int:
        """Returns how many tokens a layer with a sliding window attends to; 0: it has none."""
        return llama_cpp.llama_model_n_swa(self._llm.model) if self.geometry[il].is_swa else 0

    def reading(self, tokens: Sequence[int]) -> Reading:
        """Saves what :meth:`capture` decoded last, of which these were the tokens."""
        return Reading(list(tokens), sequence.save(self._llm.ctx))

    def tokenize(self, text: str, n: int) -> list[int]:
        """Tokenizes the beginning of a text, see :func:`first_tokens`."""
        return first_tokens(self._llm, text, n)

    def capture(
        self, tokens: Sequence[int], layers: Sequence[int], n_block: int = BLOCK
    ) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
        """Decodes tokens from position 0 on and yields each layer's queries and keys, block after block.

        Layers that decoding leaves out (those for multi-token prediction) are left out here too.

        Args:
            tokens: at most as many as the context holds.
            layers: indices of the layers wanted.
            n_block: tokens decoded at a time, 1 to ``BLOCK``.

        Yields:
            ``(n_done, il, q, k)``: tokens decoded so far, the layer, and of the latest block its queries, float32
            ``[n_tokens, n_head, n_embd_head]``, and keys, float32 ``[n_tokens, n_head_kv, n_embd_head]``.

        Raises:
            ConvertError: decoding failed, or a captured value is not finite.
        """
        sequence.clear(self._llm.ctx)
        capi.set_capture(self._llm.ctx, Capture.Q, Capture.K)
        try:
            for start in range(0, len(tokens), n_block):
                block = tokens[start : start + n_block]
                try:
                    sequence.decode(self._llm.ctx, block, n_logits=1)
                except FasaError as error:
                    raise ConvertError(f"{self._path} failed at token {start} of {len(tokens)}: {error}") from error
                for il in layers:
                    q, k = (capi.captured(self._llm.ctx, il, which) for which in (Capture.Q, Capture.K))
                    if q is not None and k is not None:
                        self._check(il, q, k, len(block))
                        yield start + len(block), il, q, k
        finally:
            capi.set_capture(self._llm.ctx)

    def _check(self, il: int, q: np.ndarray, k: np.ndarray, n_tokens: int) -> None:
        layer = self.geometry[il]
        for name, values, n_head in (("Q", q, layer.n_head), ("K", k, layer.n_head_kv)):
            shape = (n_tokens, n_head, layer.n_embd_head)
            if values.shape != shape:
                raise ConvertError(
                    f"{self._path}: {name} of layer {il} has shape {values.shape} where the model's geometry says "
                    f"{shape}; this architecture cannot be calibrated"
                )
            if not np.isfinite(values).all():
                raise ConvertError(f"{self._path}: {name} of layer {il} is not finite; the weights are damaged")


def first_tokens(llm: llama_cpp.Llama, text: str, n: int) -> list[int]:
    """Returns the first ``n`` tokens of a text, or all where it has fewer.

    The token with which the model begins a text, if it has one, comes first and counts as one of them.

    Special tokens of the model come as text.
    """
    n_chars = 8 * n
    while True:
        tokens = llm.tokenize(text[:n_chars].encode("utf-8"), add_bos=True, special=False)
        if len(tokens) > n or n_chars >= len(text):  # one more, so that the cut is not felt
            return tokens[:n]
        n_chars *= 4
