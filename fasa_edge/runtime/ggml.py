"""Graphs of ggml ops on one backend, through ctypes: what ``bench --op`` and the op tests compute with.

Arrays are numpy's way round, outermost dimension first; ``ne`` of a tensor is their shape reversed. Tensors and graphs
are plain addresses.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

from fasa_edge.errors import FasaError
from fasa_edge.runtime import capi, library

import numpy as np

_registry, base = (library.ggml(library.llama_cpp, name) for name in ("ggml", "ggml-base"))

F32, F16, I8, I32, I64 = 0, 1, 24, 26, 27
"""Values of ``enum ggml_type``; for the others see :func:`fasa_edge.runtime.capi.cache_type`."""

_TYPES = {np.dtype(np.float32): F32, np.dtype(np.float16): F16, np.dtype(np.int8): I8}
_TYPES |= {np.dtype(np.int32): I32, np.dtype(np.int64): I64}

ptr, i64, f32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_DEVICE_CPU, _DEVICE_GPU = 0, 1  # enum ggml_backend_dev_type


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ptr), ("no_alloc", ctypes.c_bool)]


def declare(signatures: Mapping[str, tuple], lib: ctypes.CDLL = base) -> None:
    """Tell ctypes the types of ggml functions.

    Args:
        signatures: name to the type of the result, followed by those of the arguments.
        lib: the library of ggml that has them.
    """
    for name, (restype, *argtypes) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = restype, argtypes


declare({"ggml_backend_init_by_type": (ptr, ctypes.c_int, ctypes.c_char_p)}, _registry)
declare(
    {
        "ggml_backend_free": (None, ptr),
        "ggml_backend_buffer_free": (None, ptr),
        "ggml_backend_alloc_ctx_tensors": (ptr, ptr, ptr),
        "ggml_backend_graph_compute": (ctypes.c_int, ptr, ptr),
        "ggml_backend_get_device": (ptr, ptr),
        "ggml_backend_dev_backend_reg": (ptr, ptr),
        "ggml_backend_reg_get_proc_address": (ptr, ptr, ctypes.c_char_p),
        "ggml_init": (ptr, _InitParams),
        "ggml_free": (None, ptr),
        "ggml_backend_dev_description": (ctypes.c_char_p, ptr),
        "ggml_backend_tensor_set": (None, ptr, ptr, ctypes.c_size_t, ctypes.c_size_t),
        "ggml_backend_tensor_get": (None, ptr, ptr, ctypes.c_size_t, ctypes.c_size_t),
        "ggml_backend_tensor_memset": (None, ptr, ctypes.c_uint8, ctypes.c_size_t, ctypes.c_size_t),
        "ggml_cpy": (ptr, ptr, ptr, ptr),
        "ggml_get_data": (ptr, ptr),
        "ggml_nbytes": (ctypes.c_size_t, ptr),
        "ggml_new_tensor": (ptr, ptr, ctypes.c_int, ctypes.c_int, ctypes.POINTER(i64)),
        "ggml_new_graph": (ptr, ptr),
        "ggml_build_forward_expand": (None, ptr, ptr),
        "ggml_reshape_3d": (ptr, ptr, ptr, i64, i64, i64),
        "ggml_permute": (ptr, ptr, ptr, *[ctypes.c_int] * 4),
        "ggml_cont": (ptr, ptr, ptr),
        "ggml_set_rows": (ptr, ptr, ptr, ptr, ptr),
        "ggml_mul_mat": (ptr, ptr, ptr, ptr),
        "ggml_soft_max_ext_inplace": (ptr, ptr, ptr, ptr, f32, f32),
        "ggml_flash_attn_ext": (ptr, ptr, ptr, ptr, ptr, ptr, f32, f32, f32),
        "ggml_fasa_new_tips": (ptr, ptr, i64, i64, i64, i64),
        "ggml_fasa_store": (ptr, ptr, ptr, ptr, ptr, ptr, ptr, ctypes.c_int),
        "ggml_fasa_store_cached": (ptr, ptr, ptr, ptr, ptr, ptr, ptr),
        "ggml_fasa_select": (ptr, ptr, ptr, ptr, ptr, ptr, ptr, ptr, i64, i64, f32),
        "ggml_fasa_attend": (ptr, ptr, ptr, ptr, ptr, ptr, ptr, ptr, f32, f32),
        "ggml_fasa_us_dense": (f32, f32, ctypes.c_size_t, i64),
        "ggml_fasa_us_sparse": (f32, f32, ctypes.c_size_t, ctypes.c_size_t, i64, i64),
        "ggml_fasa_min_cells": (i64, f32, ctypes.c_size_t, ctypes.c_size_t, i64),
        "ggml_fasa_bandwidth": (f32, ptr),
        "ggml_fasa_prefer_huge_pages": (None, ptr),
    }
)


class Graph:
    """Tensors and ops: ``g.ggml_add(a, b)`` adds an op, :meth:`run` computes it, :meth:`read` takes the result.

    The backend, and with it its threads and its work buffer, lives as long as the graph, as in a llama.cpp context.

    Args:
        n_threads: that compute, on the CPU.
        on_gpu: on the first GPU, in whose memory the tensors lie then, not on the CPU.

    Raises:
        FasaError: there is no GPU, or no memory for a tensor.
    """

    def __init__(self, n_threads: int = 2, *, on_gpu: bool = False) -> None:
        self.on_gpu = on_gpu
        self._buffers: list[int] = []
        self._backend = _registry.ggml_backend_init_by_type(_DEVICE_GPU if on_gpu else _DEVICE_CPU, None)
        if not self._backend:
            raise FasaError(
                "there is no GPU that ggml knows: on a machine with one install with CMAKE_ARGS=-DGGML_CUDA=ON (Metal "
                "needs no option), or leave out -ngl"
            )
        self._ctx = base.ggml_init(_InitParams(64 << 20, None, True))  # no data, only what describes it
        self._device = base.ggml_backend_get_device(self._backend)
        if not on_gpu:
            registry = base.ggml_backend_dev_backend_reg(self._device)
            address = base.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_set_n_threads")
            self._set_n_threads = ctypes.CFUNCTYPE(None, ptr, ctypes.c_int)(address)
            self._set_n_threads(self._backend, n_threads)

    def __enter__(self) -> Graph:
        return self

    def __exit__(self, *_: object) -> None:
        for buffer in self._buffers:
            base.ggml_backend_buffer_free(buffer)
        base.ggml_backend_free(self._backend)
        base.ggml_free(self._ctx)

    def __getattr__(self, name: str) -> Any:
        function = getattr(base, name)
        return lambda *args: function(self._ctx, *args)

    def new(self, ggml_type: int, *shape: int) -> int:
        """Make a tensor of a shape, outermost dimension first; its contents are undefined."""
        return self.ggml_new_tensor(ggml_type, len(shape), (i64 * len(shape))(*reversed(shape)))

    def tensor(self, array: np.ndarray) -> int:
        """Make a tensor with the shape, type and contents of an array: float32, float16, int8, int32 or int64."""
        tensor = self.new(_TYPES[array.dtype], *array.shape)
        self.write(tensor, array)
        return tensor

    @property
    def device(self) -> str:
        """The name that the device gives itself."""
        return base.ggml_backend_dev_description(self._device).decode()

    def free_memory(self) -> int:
        """Return the bytes that the device has left."""
        return capi.device_memory(self._device)

    def n_bytes(self, tensor: int) -> int:
        """Return the bytes of a tensor."""
        return base.ggml_nbytes(tensor)

    def write(self, tensor: int, array: np.ndarray) -> None:
        """Replace a tensor's contents by an array of as many bytes, else a ``ValueError``."""
        self._allocate(tensor)
        array = np.ascontiguousarray(array)
        if array.nbytes != self.n_bytes(tensor):
            raise ValueError(f"{array.nbytes} bytes for a tensor of {self.n_bytes(tensor)}")
        base.ggml_backend_tensor_set(tensor, array.ctypes.data, 0, array.nbytes)

    def clear(self, tensor: int) -> None:
        """Fill a tensor with zero bytes."""
        self._allocate(tensor)
        base.ggml_backend_tensor_memset(tensor, 0, 0, self.n_bytes(tensor))

    def read(self, tensor: int, dtype: type, shape: tuple[int, ...] = (-1,)) -> np.ndarray:
        """Copy a tensor's contents into an array of ``dtype`` and ``shape``; by default flat."""
        res = np.empty(self.n_bytes(tensor), np.uint8)
        base.ggml_backend_tensor_get(tensor, res.ctypes.data, 0, res.nbytes)
        return res.view(dtype).reshape(shape)

    def plan(self, *results: int) -> int:
        """Make a graph that computes the results and whatever they need, in this order."""
        graph = self.ggml_new_graph()
        for result in results:
            self._allocate(result)
            base.ggml_build_forward_expand(graph, result)
        return graph

    def compute(self, graph: int) -> None:
        """Compute a graph that :meth:`plan` made."""
        if status := base.ggml_backend_graph_compute(self._backend, graph):
            raise FasaError(f"{self.device} returned status {status}: see ggml's log")

    def run(self, *results: int, n_threads: int | None = None) -> None:
        """Call :meth:`plan` and :meth:`compute`, from then on with another number of threads if given."""
        if n_threads is not None and not self.on_gpu:
            self._set_n_threads(self._backend, n_threads)
        self.compute(self.plan(*results))

    def _allocate(self, tensor: int) -> None:
        """Give memory to all tensors that have none yet, this one among them."""
        if not base.ggml_get_data(tensor) and (buffer := base.ggml_backend_alloc_ctx_tensors(self._ctx, self._backend)):
            self._buffers.append(buffer)
            base.ggml_fasa_prefer_huge_pages(buffer)  # as under a KV cache with tips
        if not base.ggml_get_data(tensor):
            raise FasaError(f"no memory for a tensor of {self.n_bytes(tensor)} bytes: use fewer layers or cells")
