"""How many cells of context memory has room for, which llama.cpp itself says of a model without its weights."""

from __future__ import annotations

import contextlib
import os
from bisect import bisect_left
from collections.abc import Iterator

from fasa_edge.errors import ModelError
from fasa_edge.runtime import capi, memory
from fasa_edge.runtime.library import llama_cpp
from fasa_edge.runtime.log import unheard

_N_CTX_UNKNOWN = 512
N_CTX_STEP = 256
"""A context has a multiple of this (src/llama-context.cpp); the bindings' arrays have what is asked for."""

_HOST_SHARE = 0.5
"""The share of the host's memory free beside weights and compute buffers that a context takes: KV cache, tips, and
logits if kept. The rest is for all else that runs there."""

_DEVICE_RESERVE = 1 << 30
"""Bytes of a GPU that are left free, or a quarter if that is less: ggml takes buffers while it computes."""


def automatic_n_ctx(
    model_path: str | os.PathLike[str],
    profile: str | os.PathLike[str] | None,
    model_params: llama_cpp.llama_model_params,
    context_params: llama_cpp.llama_context_params,
    n_batch: int,
    n_ubatch: int,
    logits_all: bool,
    *,
    n_slots: int = 1,
    is_loaded: bool = True,
) -> int:
    """Choose the context that a model was trained for, as far as memory allows: the host's, and that of each device.

    Args:
        model_path: of the model.
        profile: FASA profile that replaces the model's own.
        model_params: that it was loaded with.
        context_params: of the context that will be made of it, but for the sizes.
        n_batch: tokens of a batch, if the context holds as many.
        n_ubatch: tokens of a micro-batch, likewise.
        logits_all: whether ``llama_cpp.Llama`` keeps the logits of all cells, not of a batch.
        n_slots: sequences, each of which gets a context of its own.
        is_loaded: whether the model is: its weights no longer count as free memory then.

    Returns:
        A multiple of :data:`N_CTX_STEP`, the cells of each slot.

    Raises:
        ModelError: the model is not loaded, and cannot be, or memory does not hold it with any context.
    """
    with _weightless(model_path, model_params) as model:
        if not model:
            if not is_loaded:
                raise ModelError(
                    f"{os.fspath(model_path)} cannot be loaded: `fasa-edge run -v` shows what llama.cpp says of it"
                )
            return N_CTX_STEP  # it was loaded before: there is no memory left for even this
        if profile is not None:
            capi.load_profile(model, profile, model_params.kv_overrides)
        n_most = -(-(llama_cpp.llama_model_n_ctx_train(model) or _N_CTX_UNKNOWN) // N_CTX_STEP) * N_CTX_STEP
        logits_row = 4 * llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

        def usage(n_ctx: int) -> list[capi.Memory] | None:
            params = type(context_params).from_buffer_copy(context_params)
            params.n_ctx, params.n_batch = n_ctx * n_slots, min(n_ctx, n_batch)
            params.n_ubatch = min(params.n_batch, n_ubatch)
            params.n_seq_max = n_slots
            if params.embeddings:  # the bindings say so as late as the sizes
                params.n_seq_max = min(params.n_batch, llama_cpp.llama_max_parallel_sequences())
                params.kv_unified = True
            if not (ctx := llama_cpp.llama_init_from_model(model, params)):
                return None
            try:
                return capi.memory(ctx)
            finally:
                llama_cpp.llama_free(ctx)

        def fits(n_ctx: int) -> bool:
            kinds = usage(n_ctx)
            n_batched = min(n_ctx, n_batch)
            # of all cells in the bindings, and of a batch in the library, which makes room for them as they come
            kept = (n_ctx + n_batched) * logits_row if logits_all else 0
            # each token of the bindings' batch has room for as many sequences as there are cells
            untouched = (0 if logits_all else n_batch * logits_row) + 4 * n_batched * n_ctx * n_slots
            return kinds is not None and room.holds(kinds, kept, untouched)

        room = _Room(
            maps=model_params.load_mode in (llama_cpp.LLAMA_LOAD_MODE_AUTO, llama_cpp.LLAMA_LOAD_MODE_MMAP),
            n_threads=max(context_params.n_threads, context_params.n_threads_batch) - 1,
            is_loaded=is_loaded,
        )
        sizes = range(N_CTX_STEP, n_most + 1, N_CTX_STEP)
        if fits(n_most):
            return n_most
        if not is_loaded and not fits(N_CTX_STEP):
            n_bytes = sum(kind.model for kind in usage(N_CTX_STEP) or ())
            raise ModelError(
                f"memory does not hold {os.fspath(model_path)}: {n_bytes} bytes of weights, {memory.available()}; end "
                "what else takes memory, or choose a smaller quantization or model"
            )
        return sizes[max(bisect_left(sizes, True, key=lambda n_ctx: not fits(n_ctx)) - 1, 0)]


class _Room:
    """Memory of the host and of devices, looked at once.

    Args:
        maps: weights that can stay in the mapped file do.
        n_threads: that will be started.
        is_loaded: whether weights are in memory already.
    """

    def __init__(self, maps: bool, n_threads: int, is_loaded: bool) -> None:
        self._maps = maps
        self._is_loaded = is_loaded
        self._n_threads = n_threads
        self._limits = memory.limits()
        self._on_device: dict[int, int] = {}

    def holds(self, kinds: list[capi.Memory], logits: int, untouched: int) -> bool:
        """Say whether a context fits.

        Args:
            kinds: what it takes.
            logits: bytes of logits that are kept besides.
            untouched: bytes that are allocated and hardly written to, but for threads'.
        """
        host = [kind for kind in kinds if kind.is_host]
        mapped = sum(kind.model for kind in host if kind.can_map) if self._maps else 0
        computing = sum(kind.compute for kind in host)
        context = sum(kind.context for kind in host) + logits
        weights = 0 if self._is_loaded else sum(kind.model for kind in host) - mapped
        devices = {kind.device for kind in kinds if kind.device}

        def besides(limit: memory.Available) -> int:
            by_kind = untouched + self._n_threads * limit.by_thread if limit.is_virtual else mapped
            return computing + weights + by_kind

        return all(context <= _HOST_SHARE * (limit.n_bytes - besides(limit)) for limit in self._limits) and all(
            sum(self._of_device(kind) for kind in kinds if kind.device == device) <= self._free(device)
            for device in devices
        )

    def _of_device(self, kind: capi.Memory) -> int:
        return kind.context + kind.compute + (0 if self._is_loaded else kind.model)

    def _free(self, device: int) -> int:
        if device not in self._on_device:
            free = capi.device_memory(device)
            self._on_device[device] = free - min(_DEVICE_RESERVE, free // 4)
        return self._on_device[device]


@contextlib.contextmanager
def without_weights(model_path: str | os.PathLike[str]) -> Iterator[int | None]:
    """Load what the metadata of a GGUF say: a ``llama_model *`` that cannot run; None for a file that does not load."""
    params = llama_cpp.llama_model_default_params()
    overrides = (llama_cpp.llama_model_kv_override * 2)()  # fasa.version = 0, and an empty one at the end
    overrides[0].key, overrides[0].tag = b"fasa.version", llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT
    params.kv_overrides = overrides
    with _weightless(model_path, params) as model:
        yield model


@contextlib.contextmanager
def _weightless(model_path: str | os.PathLike[str], model_params: llama_cpp.llama_model_params) -> Iterator[int | None]:
    """Load a ``llama_model *`` that is given no memory; None for a file that does not load. Nobody hears of it."""
    params = type(model_params).from_buffer_copy(model_params)
    params.no_alloc = True
    params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
    if params.split_mode == llama_cpp.LLAMA_SPLIT_MODE_TENSOR:
        params.split_mode = llama_cpp.LLAMA_SPLIT_MODE_LAYER  # much the same on each device, and can be asked about
    with unheard():
        model = llama_cpp.llama_model_load_from_file(os.fsencode(model_path), params)
    try:
        with unheard():
            yield model
    finally:
        if model:
            llama_cpp.llama_model_free(model)
