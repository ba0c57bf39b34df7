"""ctypes mirror of ``llama-fasa.h``: the C API of the patched library, one Python function for each of its own."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import reduce
from itertools import count
from operator import or_
from typing import Any

from fasa_edge.config import SELECTS, FasaConfig
from fasa_edge.errors import FasaError, LibraryError
from fasa_edge.runtime.capi_eval import FASA, policy_name, policy_number
from fasa_edge.runtime.library import ggml, llama_cpp

import numpy as np

_lib = llama_cpp.llama_cpp._lib
_ggml = ggml(llama_cpp, "ggml-base")


class Params(ctypes.Structure):
    """``struct llama_fasa_params``: settings of a context."""

    _fields_ = [
        ("enabled", ctypes.c_bool),
        ("exact", ctypes.c_bool),
        ("budget", ctypes.c_uint32),
        ("budget_ctx", ctypes.c_uint32),
        ("n_sink", ctypes.c_uint32),
        ("n_recent", ctypes.c_uint32),
        ("min_ctx", ctypes.c_uint32),
        ("max_batch", ctypes.c_uint32),
        ("n_tip", ctypes.c_uint32),
        ("n_dense_layers", ctypes.c_uint32),
        ("_select", ctypes.c_int),
        ("prompt_mass", ctypes.c_uint32),
        ("_policy", ctypes.c_int32),
    ]

    def __init__(self, *, select: str = FasaConfig.select, policy: str = FASA, **fields: int | bool) -> None:
        super().__init__(**fields)
        self.select, self.policy = select, policy

    @property
    def select(self) -> str:
        """One of :data:`fasa_edge.config.SELECTS`; the number of another, which the library refuses."""
        return _enumerator(SELECTS, self._select)

    @select.setter
    def select(self, name: str) -> None:
        self._select = SELECTS.index(name)

    @property
    def policy(self) -> str:
        """Who chooses (:func:`fasa_edge.runtime.capi_eval.policies`); the number of another, which is refused."""
        return policy_name(self._policy)

    @policy.setter
    def policy(self, name: str) -> None:
        self._policy = policy_number(name)

    def as_dict(self) -> dict[str, int | bool | str]:
        """Return the fields by name."""
        return {(name := field.removeprefix("_")): getattr(self, name) for field, *_ in self._fields_}


def _enumerator(names: tuple[str, ...], i: int) -> str:
    return names[i] if 0 <= i < len(names) else str(i)


class Memory(ctypes.Structure):
    """``struct llama_fasa_memory``: bytes by kind of memory; ``device`` (``ggml_backend_dev_t``) None: the host's."""

    _fields_ = [
        ("device", ctypes.c_void_p),
        ("is_host", ctypes.c_bool),
        ("can_map", ctypes.c_bool),
        ("model", ctypes.c_size_t),
        ("context", ctypes.c_size_t),
        ("compute", ctypes.c_size_t),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        ("n_head", ctypes.c_int32),
        ("n_head_kv", ctypes.c_int32),
        ("n_embd_head", ctypes.c_int32),
        ("n_rot", ctypes.c_int32),
        ("rope_type", ctypes.c_int32),
        ("is_swa", ctypes.c_bool),
    ]


def _function(name: str, restype: Any, *argtypes: Any, lib: ctypes.CDLL = _lib) -> Any:
    function = getattr(lib, name)
    function.restype = restype
    function.argtypes = argtypes
    return function


_ptr = ctypes.c_void_p


def _method(name: str, restype: Any, *argtypes: Any) -> Callable[..., Any]:
    """A function of a model or context, which it reads unchecked: ``llama_cpp.Llama`` has None once it is closed."""
    function = _function(name, restype, _ptr, *argtypes)

    def checked(handle: int | None, *args: Any) -> Any:
        if not handle:
            raise FasaError("the model is closed: load it again")
        return function(handle, *args)

    return checked


_model_has_profile = _method("llama_fasa_model_has_profile", ctypes.c_bool)
_model_load_profile = _method(
    "llama_fasa_model_load_profile",
    ctypes.c_bool,
    ctypes.c_char_p,
    ctypes.POINTER(llama_cpp.llama_model_kv_override),
)
_model_override_report = _method("llama_fasa_model_override_report", ctypes.c_char_p)
_get_params = _method("llama_fasa_get_params", ctypes.c_bool, ctypes.POINTER(Params))
_set_params = _method("llama_fasa_set_params", ctypes.c_bool, ctypes.POINTER(Params))
_reason_name = _function("llama_fasa_reason_name", ctypes.c_char_p, ctypes.c_int)
_reason_description = _function("llama_fasa_reason_description", ctypes.c_char_p, ctypes.c_int)
_tips_size = _method("llama_fasa_tips_size", ctypes.c_size_t)
_min_ctx = _method("llama_fasa_min_ctx", ctypes.c_uint32)
_get_memory = _method("llama_fasa_get_memory", ctypes.c_bool, ctypes.c_int32, ctypes.POINTER(Memory))
_get_layer = _method("llama_fasa_get_layer", ctypes.c_bool, ctypes.c_int32, ctypes.POINTER(_Layer))
_chunk_dims = _function(
    "llama_fasa_chunk_dims", ctypes.c_bool, ctypes.POINTER(_Layer), ctypes.c_int32, ctypes.c_int32 * 2
)
_get_angles = _method(
    "llama_fasa_get_angles", ctypes.c_bool, ctypes.c_int32, ctypes.c_uint32, ctypes.POINTER(ctypes.c_float)
)
_fingerprint = _method("llama_fasa_fingerprint", ctypes.c_char_p)
_set_prompt = _method("llama_fasa_set_prompt", None, ctypes.c_bool)
_set_capture = _method("llama_fasa_set_capture", None, ctypes.c_uint32)
_get_capture = _method(
    "llama_fasa_get_capture", ctypes.c_int32, ctypes.c_int32, ctypes.c_int, ctypes.POINTER(ctypes.c_int64), _ptr
)

_type_name = _function("ggml_type_name", ctypes.c_char_p, ctypes.c_int, lib=_ggml)
_dev_memory = _function("ggml_backend_dev_memory", None, _ptr, *[ctypes.POINTER(ctypes.c_size_t)] * 2, lib=_ggml)
_row_size = _function("ggml_row_size", ctypes.c_size_t, ctypes.c_int, ctypes.c_int64, lib=_ggml)

CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")
"""Types of K and V in a cache, as ``--cache-type-k`` of llama.cpp names them (common/arg.cpp)."""


def type_name(ggml_type: int) -> str:
    """Return the name of a type (``enum ggml_type``)."""
    return _type_name(ggml_type).decode()


def bytes_per_element(ggml_type: int) -> float:
    """Return the bytes of an element of a type (``enum ggml_type``), the mean over a block."""
    return _row_size(ggml_type, 256) / 256  # every block of a KV cache's types divides it


def cache_type(name: str) -> int:
    """Find the ``enum ggml_type`` of a name in :data:`CACHE_TYPES`, as ``type_k`` of ``llama_cpp.Llama`` takes it."""
    return next(ggml_type for ggml_type in count() if type_name(ggml_type) == name)


def _names(name_of: Callable[[int], bytes | None]) -> tuple[str, ...]:
    names: list[str] = []
    while (name := name_of(len(names))) is not None:
        names.append(name.decode())
    return tuple(names)


REASONS = tuple((name, _reason_description(i).decode()) for i, name in enumerate(_names(_reason_name)))
"""``enum llama_fasa_reason``: (name, description) of why a layer did not run sparse; the first, "none": it did."""


class Stats(ctypes.Structure):
    """``struct llama_fasa_stats``: counters of a context."""

    _fields_ = [
        ("n_steps_prompt", ctypes.c_uint64),
        ("n_steps_decode", ctypes.c_uint64),
        ("n_layers", ctypes.c_uint64 * len(REASONS)),
        ("n_layers_exact", ctypes.c_uint64),
        ("bytes_kv", ctypes.c_uint64),
        ("bytes_tips", ctypes.c_uint64),
        ("bytes_kv_dense", ctypes.c_uint64),
    ]


def check_sizes(build: Any) -> None:
    """Compare the structs mirrored here with the library's.

    Args:
        build: what the library says of itself, a :class:`fasa_edge.runtime.library.Build`.

    Raises:
        LibraryError: one has another size, so its fields would be read and written where they are not.
    """
    for name, struct in (("params", Params), ("stats", Stats), ("memory", Memory), ("layer", _Layer)):
        size = getattr(build, f"sizeof_fasa_{name}")
        if ctypes.sizeof(struct) != size:
            raise LibraryError(
                f"llama_fasa_{name} has {ctypes.sizeof(struct)} bytes in these sources of fasa_edge and {size} in the "
                "library, which was built from others: build it again (`make install`), or reinstall fasa-edge"
            )


check_sizes(_lib.llama_fasa_get_build())

_get_stats = _method("llama_fasa_get_stats", None, ctypes.POINTER(Stats))
_reset_stats = _method("llama_fasa_reset_stats", None)


class Capture(IntEnum):
    """``enum llama_fasa_capture``: what can be kept of a micro-batch, with its shape."""

    Q = 1
    """float32 [n_tokens, n_head, n_embd_head], after RoPE, before any Hadamard rotation."""
    K = 2
    """float32 [n_tokens, n_head_kv, n_embd_head], likewise."""
    CELLS = 4
    """int32 [n_tokens, n_head_kv or n_head, n_list], chosen cells, ascending, then -1; of sparse layers."""
    MASS = 8
    """float32 [n_tokens, n_head], attention weight that these cells hold of 1; of sparse layers, computed slowly."""


@dataclass(frozen=True)
class LayerGeometry:
    """One layer as FASA sees it (``struct llama_fasa_layer``); ``n_head_kv`` is 0 without a K cache of its own."""

    n_head: int
    n_head_kv: int
    n_embd_head: int
    n_rot: int
    rope_type: int
    is_swa: bool


def has_profile(model: int) -> bool:
    """Say whether the model (``llama_model *``) carries ``fasa.*`` metadata."""
    return _model_has_profile(model)


def load_profile(
    model: int, path: str | os.PathLike[str], overrides: ctypes.Array | ctypes._Pointer | None = None
) -> bool:
    """Give a model (``llama_model *``) the profile in another GGUF file, before a context is made.

    Args:
        model: it.
        path: a profile, or an annotated model.
        overrides: ``kv_overrides`` of ``llama_model_params``, whose ``fasa.*`` settings apply.

    Returns:
        Whether it did; if not, llama.cpp's log says why and the model stays as it was.
    """
    return _model_load_profile(model, os.fsencode(path), overrides)


def override_report(model: int) -> list[str]:
    """List the ``fasa.*`` overrides that had no effect on the model, one line each."""
    return _model_override_report(model).decode().splitlines()


def get_params(ctx: int) -> Params | None:
    """Return the settings in force in a context (``llama_context *``); ``None`` without a profile or ``fasa.exact``."""
    params = Params()
    return params if _get_params(ctx, ctypes.byref(params)) else None


def set_params(ctx: int, params: Params) -> None:
    """Change the settings from the next decode on.

    Raises:
        FasaError: they are refused; llama.cpp's log says why.
    """
    if not _set_params(ctx, ctypes.byref(params)):
        raise FasaError(f"the library refused the settings {params.as_dict()}: its log names the field and the limit")


def set_prompt(ctx: int, prompt: bool) -> None:
    """Say whether all batches are prompts from the next decode on, or only those of more than ``max_batch`` tokens."""
    _set_prompt(ctx, prompt)


def get_stats(ctx: int) -> Stats:
    """Return the counters since the context was made, or since the last :func:`reset_stats`."""
    stats = Stats()
    _get_stats(ctx, ctypes.byref(stats))
    return stats


def reset_stats(ctx: int) -> None:
    """Set the counters to zero."""
    _reset_stats(ctx)


def tips_size(ctx: int) -> int:
    """Return the bytes of the tip cache."""
    return _tips_size(ctx)


def min_ctx(ctx: int) -> int:
    """Return the cells from which on the first layers run sparse, with the settings in force; 0: none ever does."""
    return _min_ctx(ctx)


def memory(ctx: int) -> list[Memory]:
    """Return what a context and its model take of each kind of memory; without weights, what they would take."""
    kinds: list[Memory] = []
    while _get_memory(ctx, len(kinds), ctypes.byref(kind := Memory())):
        kinds.append(kind)
    return kinds


def device_memory(device: int) -> int:
    """Return the bytes that a device (``ggml_backend_dev_t``) has left."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    _dev_memory(device, free, total)
    return free.value


def layer_geometry(model: int) -> list[LayerGeometry]:
    """List all layers of a model (``llama_model *``)."""
    layers: list[LayerGeometry] = []
    layer = _Layer()
    while _get_layer(model, len(layers), ctypes.byref(layer)):
        layers.append(LayerGeometry(*(getattr(layer, name) for name, *_ in _Layer._fields_)))
    return layers


def chunk_dims(layer: LayerGeometry) -> np.ndarray:
    """Pair the dims of a head into chunks as the runtime does, int32 [n_chunk, 2]; empty: it knows no planes."""
    c_layer = _Layer(*(getattr(layer, name) for name, *_ in _Layer._fields_))
    dims = (ctypes.c_int32 * 2)()
    rows: list[tuple[int, ...]] = []
    while _chunk_dims(ctypes.byref(c_layer), len(rows), dims):
        rows.append(tuple(dims))
    return np.array(rows, dtype=np.int32).reshape(-1, 2)


def rope_angles(ctx: int, il: int, n_chunk: int, n_ctx: int = 0) -> np.ndarray:
    """Compute by how much RoPE turns each chunk of a head of layer ``il`` from one position to the next.

    That is how the last micro-batch turned the layer's keys, which must have been captured.

    Args:
        ctx: ``llama_context *``.
        il: the layer.
        n_chunk: chunks of a head, half of its dims.
        n_ctx: with the frequency factors of a context of that many cells, where they depend on it; 0: of this one.

    Returns:
        float64 [n_chunk], radians from -pi to pi, from the chunk's first dim towards its second; 0 where it does not
        turn, or its two dims do not turn as one.

    Raises:
        FasaError: nothing was captured, or RoPE could not be computed; llama.cpp's log says which.
    """
    angles = np.empty(n_chunk, np.float32)
    if not _get_angles(ctx, il, n_ctx, angles.ctypes.data_as(ctypes.POINTER(ctypes.c_float))):
        raise FasaError(f"the angles of layer {il} could not be computed: the library's log says why")
    return angles.astype(np.float64)


def fingerprint(model: int) -> str:
    """Return architecture and head geometry of a model in one line."""
    return _fingerprint(model).decode()


def set_capture(ctx: int, *what: Capture) -> None:
    """Keep ``what`` of every attention layer for :func:`captured` from the next micro-batch on; by default nothing."""
    _set_capture(ctx, reduce(or_, what, 0))


def captured(ctx: int, il: int, what: Capture) -> np.ndarray | None:
    """Return what was kept of layer ``il`` in the last micro-batch.

    Returns:
        As :class:`Capture` says, or ``None`` if the layer was not captured.

    Raises:
        FasaError: another thread is decoding with the context, or has done so meanwhile.
    """
    ne = (ctypes.c_int64 * 3)()
    if not _is_captured(_get_capture(ctx, il, what, ne, None)):
        return None
    res = np.empty(tuple(reversed(ne)), dtype=np.int32 if what == Capture.CELLS else np.float32)
    if not _is_captured(_get_capture(ctx, il, what, ne, res.ctypes.data)):
        return None
    return res[..., 0] if what == Capture.MASS else res


def _is_captured(status: int) -> bool:
    if status < 0:
        raise FasaError("another thread decodes with this context: ask for what was captured when it has returned")
    return status == 1
