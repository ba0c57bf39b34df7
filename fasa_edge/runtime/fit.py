"""How many cells of context memory has room for, which llama.cpp itself says of a model without its weights."""

from __future__ import annotations

import contextlib
import os
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence

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
) -> int:
    """Choose the context that a loaded model was trained for, as far as memory allows: the host's, and each device's.

    Args:
        model_path: of the model.
        profile: FASA profile that replaces the model's own.
        model_params: that it was loaded with.
        context_params: of the context that will be made of it, but for the sizes.
        n_batch: tokens of a batch, if the context holds as many.
        n_ubatch: tokens of a micro-batch, likewise.
        logits_all: whether ``llama_cpp.Llama`` keeps the logits of all cells, not of a batch.

    Returns:
        A multiple of :data:`N_CTX_STEP`.
    """
    with weightless(model_path, model_params, profile) as model:
        if not model:
            return N_CTX_STEP  # it was loaded before: there is no memory left for even this
        room = Room(
            memory.limits(),
            capi.device_memory,
            maps=maps(model_params),
            n_threads=max(context_params.n_threads, context_params.n_threads_batch) - 1,
            is_loaded=True,
        )
        logits_row = 4 * llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

        def fits(n_ctx: int) -> bool:
            kinds = usage(model, context_params, n_ctx, n_batch, n_ubatch)
            n_batched = min(n_ctx, n_batch)
            # of all cells in the bindings, and of a batch in the library, which makes room for them as they come
            kept = (n_ctx + n_batched) * logits_row if logits_all else 0
            # each token of the bindings' batch has room for as many sequences as there are cells
            untouched = (0 if logits_all else n_batch * logits_row) + 4 * n_batched * n_ctx
            return kinds is not None and room.holds(kinds, kept, untouched)

        return longest(n_ctx_train(model), fits) or N_CTX_STEP


def longest(n_most: int, fits: Callable[[int], bool]) -> int:
    """Find the most cells that fit, a multiple of :data:`N_CTX_STEP` up to what holds ``n_most``; 0: none do."""
    sizes = range(N_CTX_STEP, padded(n_most) + 1, N_CTX_STEP)
    if fits(sizes[-1]):
        return sizes[-1]
    return N_CTX_STEP * bisect_left(sizes, True, key=lambda n_ctx: not fits(n_ctx))


def padded(n_ctx: int) -> int:
    """Round up to cells that a context can have."""
    return -(-n_ctx // N_CTX_STEP) * N_CTX_STEP


def n_ctx_train(model: int) -> int:
    """Return the context that a model (``llama_model *``) was trained for: with YaRN, once a context was made of it."""
    return llama_cpp.llama_model_n_ctx_train(model) or _N_CTX_UNKNOWN


def usage(
    model: int,
    context_params: llama_cpp.llama_context_params,
    n_ctx: int,
    n_batch: int,
    n_ubatch: int,
    n_slots: int = 1,
) -> list[capi.Memory] | None:
    """Ask llama.cpp what a context takes, and the model that it is made of.

    Args:
        model: ``llama_model *``, best without weights.
        context_params: of the context, but for the sizes; ``n_outputs_max`` is that of a slot.
        n_ctx: cells of each slot.
        n_batch: tokens of a batch, if all slots together hold as many.
        n_ubatch: tokens of a micro-batch, likewise.
        n_slots: sequences, each of which gets cells of its own.

    Returns:
        Bytes by kind of memory; None: no context can be made.
    """
    params = type(context_params).from_buffer_copy(context_params)
    params.n_ctx = n_ctx * n_slots
    params.n_batch = min(params.n_ctx, n_batch)  # llama.cpp does the same, but not where attention is not causal
    params.n_ubatch = min(params.n_batch, n_ubatch)
    params.n_seq_max = n_slots
    params.n_outputs_max *= n_slots
    if params.embeddings:  # the bindings say so as late as the sizes
        params.n_seq_max = min(params.n_batch, llama_cpp.llama_max_parallel_sequences())
        params.kv_unified = True
    if not (ctx := llama_cpp.llama_init_from_model(model, params)):
        return None
    try:
        return capi.memory(ctx)
    finally:
        llama_cpp.llama_free(ctx)


def maps(model_params: llama_cpp.llama_model_params) -> bool:
    """Say whether weights that can stay in the mapped file do."""
    return model_params.load_mode in (llama_cpp.LLAMA_LOAD_MODE_AUTO, llama_cpp.LLAMA_LOAD_MODE_MMAP)


class Room:
    """Memory of the host and of devices, looked at once.

    Args:
        limits: what each limit of the host leaves.
        device_memory: says how many bytes a device (``ggml_backend_dev_t``) has left.
        maps: weights that can stay in the mapped file do.
        n_threads: that will be started.
        is_loaded: whether weights are in memory already.
    """

    def __init__(
        self,
        limits: Sequence[memory.Available],
        device_memory: Callable[[int], int],
        *,
        maps: bool,
        n_threads: int,
        is_loaded: bool,
    ) -> None:
        self._limits = limits
        self._device_memory = device_memory
        self._maps = maps
        self._is_loaded = is_loaded
        self._n_threads = n_threads
        self._on_device: dict[int, int] = {}

    def holds(self, kinds: Sequence[capi.Memory], logits: int = 0, untouched: int = 0) -> bool:
        """Say whether a context fits.

        Args:
            kinds: what it takes.
            logits: bytes of logits that are kept besides.
            untouched: bytes that are allocated and hardly written to, but for threads'.
        """
        context = _context(kinds) + logits
        return self.devices_hold(kinds) and all(
            context <= _HOST_SHARE * beside_weights for beside_weights in self._beside_weights(kinds, untouched)
        )

    def devices_hold(self, kinds: Sequence[capi.Memory]) -> bool:
        """Say whether what a context takes of devices fits there."""
        return all(
            sum(self._of_device(kind) for kind in kinds if kind.device == device) <= self._free(device)
            for device in {kind.device for kind in kinds if kind.device}
        )

    def left(self, kinds: Sequence[capi.Memory]) -> int:
        """Return the bytes of the host that a context leaves, and its weights and compute buffers."""
        return max(0, min(self._beside_weights(kinds, 0)) - _context(kinds))

    def describe(self, kinds: Sequence[capi.Memory]) -> str:
        """Say what there is: of the host the least, and of the devices that a context takes memory of."""
        least = min(self._limits, key=lambda limit: limit.n_bytes)
        devices = {kind.device: None for kind in kinds if kind.device}
        return ", ".join([str(least), *(f"{max(self._free(device), 0)} of a GPU's" for device in devices)])

    def _beside_weights(self, kinds: Sequence[capi.Memory], untouched: int) -> Iterator[int]:
        """Bytes that each limit of the host leaves beside weights and compute buffers."""
        host = [kind for kind in kinds if kind.is_host]
        mapped = sum(kind.model for kind in host if kind.can_map) if self._maps else 0
        weights = 0 if self._is_loaded else sum(kind.model for kind in host) - mapped
        computing = sum(kind.compute for kind in host)
        for limit in self._limits:
            by_kind = untouched + self._n_threads * limit.by_thread if limit.is_virtual else mapped
            yield limit.n_bytes - computing - weights - by_kind

    def _of_device(self, kind: capi.Memory) -> int:
        return kind.context + kind.compute + (0 if self._is_loaded else kind.model)

    def _free(self, device: int) -> int:
        if device not in self._on_device:
            free = self._device_memory(device)
            self._on_device[device] = free - min(_DEVICE_RESERVE, free // 4)
        return self._on_device[device]


def _context(kinds: Sequence[capi.Memory]) -> int:
    return sum(kind.context for kind in kinds if kind.is_host)


@contextlib.contextmanager
def without_weights(model_path: str | os.PathLike[str]) -> Iterator[int | None]:
    """Load what the metadata of a GGUF say: a ``llama_model *`` that cannot run; None for a file that does not load."""
    params = llama_cpp.llama_model_default_params()
    overrides = (llama_cpp.llama_model_kv_override * 2)()  # fasa.version = 0, and an empty one at the end
    overrides[0].key, overrides[0].tag = b"fasa.version", llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT
    params.kv_overrides = overrides
    with weightless(model_path, params) as model:
        yield model


@contextlib.contextmanager
def weightless(
    model_path: str | os.PathLike[str],
    model_params: llama_cpp.llama_model_params,
    profile: str | os.PathLike[str] | None = None,
) -> Iterator[int | None]:
    """Load a ``llama_model *`` that is given no memory; None for a file that does not load. Nobody hears of it."""
    params = type(model_params).from_buffer_copy(model_params)
    params.no_alloc = True
    params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
    if params.split_mode == llama_cpp.LLAMA_SPLIT_MODE_TENSOR:
        params.split_mode = llama_cpp.LLAMA_SPLIT_MODE_LAYER  # much the same on each device, and can be asked about
    with unheard():
        model = llama_cpp.llama_model_load_from_file(os.fsencode(model_path), params)
        if model and profile is not None:
            capi.load_profile(model, profile, model_params.kv_overrides)
    try:
        with unheard():
            yield model
    finally:
        if model:
            llama_cpp.llama_model_free(model)
