"""A few ggml calls through ctypes, enough to run one graph on numpy arrays.

Arrays are numpy's way round, outermost dimension first; ``ne`` of the tensor is their shape reversed.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

from fasa_edge._lib import llama_cpp

import numpy as np

_LIB_DIR = Path(llama_cpp.llama_cpp._lib._name).parent
_base = ctypes.CDLL(str(next(_LIB_DIR.glob("*ggml-base.*"))))
_cpu = ctypes.CDLL(str(next(_LIB_DIR.glob("*ggml-cpu.*"))))

F32, F16, I8, I32, I64, BF16 = 0, 1, 24, 26, 27, 30
CACHE_TYPES = {"f32": F32, "f16": F16, "bf16": BF16, "q8_0": 8, "q4_0": 2, "q5_1": 7}
_TYPES = {
    np.dtype(np.float32): F32,
    np.dtype(np.float16): F16,
    np.dtype(np.int8): I8,
    np.dtype(np.int32): I32,
    np.dtype(np.int64): I64,
}

_ptr, _i64, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SIGNATURES = {
    "ggml_new_tensor": (_ptr, _ptr, ctypes.c_int, ctypes.c_int, ctypes.POINTER(_i64)),
    "ggml_get_data": (_ptr, _ptr),
    "ggml_nbytes": (ctypes.c_size_t, _ptr),
    "ggml_new_graph": (_ptr, _ptr),
    "ggml_build_forward_expand": (None, _ptr, _ptr),
    "ggml_fasa_new_tips": (_ptr, _ptr, _i64, _i64, _i64, _i64),
    "ggml_fasa_store": (_ptr, _ptr, _ptr, _ptr, _ptr, _ptr, ctypes.c_int),
    "ggml_fasa_select": (_ptr, _ptr, _ptr, _ptr, _ptr, _ptr, _ptr, _i64, _float),
    "ggml_fasa_attend": (_ptr, _ptr, _ptr, _ptr, _ptr, _ptr, _ptr, _ptr, _float, _float),
    "ggml_cast": (_ptr, _ptr, _ptr, ctypes.c_int),
    "ggml_cont": (_ptr, _ptr, _ptr),
    "ggml_permute": (_ptr, _ptr, _ptr, *[ctypes.c_int] * 4),
    "ggml_get_rows": (_ptr, _ptr, _ptr, _ptr),
    "ggml_mul_mat": (_ptr, _ptr, _ptr, _ptr),
    "ggml_add": (_ptr, _ptr, _ptr, _ptr),
    "ggml_sub": (_ptr, _ptr, _ptr, _ptr),
    "ggml_log": (_ptr, _ptr, _ptr),
    "ggml_soft_max_ext": (_ptr, _ptr, _ptr, _ptr, _float, _float),
    "ggml_pool_1d": (_ptr, _ptr, _ptr, *[ctypes.c_int] * 4),
    "ggml_top_k": (_ptr, _ptr, _ptr, ctypes.c_int),
    "ggml_reshape_3d": (_ptr, _ptr, _ptr, _i64, _i64, _i64),
    "ggml_view_4d": (_ptr, _ptr, _ptr, *[_i64] * 4, *[ctypes.c_size_t] * 4),
    "ggml_flash_attn_ext": (_ptr, _ptr, _ptr, _ptr, _ptr, _ptr, _float, _float, _float),
    "ggml_flash_attn_ext_add_sinks": (None, _ptr, _ptr),
}
for _name, (_restype, *_argtypes) in _SIGNATURES.items():
    getattr(_base, _name).restype = _restype
    getattr(_base, _name).argtypes = _argtypes
_base.ggml_init.restype = _ptr
_cpu.ggml_graph_compute_with_ctx.argtypes = (_ptr, _ptr, ctypes.c_int)


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", _ptr), ("no_alloc", ctypes.c_bool)]


class Graph:
    """Tensors and ops of one graph: ``g.ggml_add(a, b)`` adds the op, :meth:`run` computes and reads results."""

    def __init__(self, mem_size: int = 256 << 20) -> None:
        self._ctx = _base.ggml_init(_InitParams(mem_size, None, False))

    def __enter__(self) -> Graph:
        return self

    def __exit__(self, *_: object) -> None:
        _base.ggml_free(ctypes.c_void_p(self._ctx))

    def __getattr__(self, name: str):
        return lambda *args: getattr(_base, name)(self._ctx, *args)

    def tensor(self, array: np.ndarray) -> int:
        """A tensor with the contents of an array."""
        ne = (_i64 * array.ndim)(*reversed(array.shape))
        tensor = _base.ggml_new_tensor(self._ctx, _TYPES[array.dtype], array.ndim, ne)
        self.write(tensor, array)
        return tensor

    def write(self, tensor: int, array: np.ndarray) -> None:
        """Replace a tensor's contents."""
        ctypes.memmove(_base.ggml_get_data(tensor), np.ascontiguousarray(array).ctypes.data, array.nbytes)

    def clear(self, tensor: int) -> None:
        """Fill a tensor with zero bytes."""
        ctypes.memset(_base.ggml_get_data(tensor), 0, _base.ggml_nbytes(tensor))

    def read(self, tensor: int, dtype: type, shape: tuple[int, ...] = (-1,)) -> np.ndarray:
        """A copy of a tensor's contents."""
        raw = ctypes.string_at(_base.ggml_get_data(tensor), _base.ggml_nbytes(tensor))
        return np.frombuffer(raw, dtype).reshape(shape).copy()

    def add_sinks(self, flash_attn: int, sinks: int) -> None:
        """Give a flash attention op its attention sinks."""
        _base.ggml_flash_attn_ext_add_sinks(flash_attn, sinks)

    def run(self, *results: int, n_threads: int = 2) -> None:
        """Compute the results and whatever they need, in this order."""
        graph = _base.ggml_new_graph(self._ctx)
        for result in results:
            _base.ggml_build_forward_expand(graph, result)
        status = _cpu.ggml_graph_compute_with_ctx(self._ctx, graph, n_threads)
        assert status == 0
