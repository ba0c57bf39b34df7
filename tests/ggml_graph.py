"""ggml functions that the op tests need besides those of :mod:`fasa_edge.runtime.ggml`."""

from __future__ import annotations

import ctypes

from fasa_edge.runtime import ggml
from fasa_edge.runtime.capi import cache_type
from fasa_edge.runtime.ggml import F16, F32, declare, f32, i64, ptr

__all__ = ["BF16", "CACHE_TYPES", "F16", "F32", "Graph"]

CACHE_TYPES = {name: cache_type(name) for name in ("f32", "f16", "bf16", "q8_0", "q4_0", "q5_1")}
BF16 = CACHE_TYPES["bf16"]

declare(
    {
        "ggml_cast": (ptr, ptr, ptr, ctypes.c_int),
        "ggml_get_rows": (ptr, ptr, ptr, ptr),
        "ggml_add": (ptr, ptr, ptr, ptr),
        "ggml_sub": (ptr, ptr, ptr, ptr),
        "ggml_log": (ptr, ptr, ptr),
        "ggml_soft_max_ext": (ptr, ptr, ptr, ptr, f32, f32),
        "ggml_pool_1d": (ptr, ptr, ptr, *[ctypes.c_int] * 4),
        "ggml_top_k": (ptr, ptr, ptr, ctypes.c_int),
        "ggml_view_4d": (ptr, ptr, ptr, *[i64] * 4, *[ctypes.c_size_t] * 4),
        "ggml_flash_attn_ext_add_sinks": (None, ptr, ptr),
        "ggml_backend_dev_supports_op": (ctypes.c_bool, ptr, ptr),
    }
)


class Graph(ggml.Graph):
    """With what takes no context as its first argument; on the CPU, or wherever the fixture ``gpu`` says."""

    ON_GPU = False

    def __init__(self, n_threads: int = 2) -> None:
        super().__init__(n_threads, on_gpu=self.ON_GPU)

    def supports(self, op: int) -> bool:
        """Whether the device can run an op."""
        return ggml.base.ggml_backend_dev_supports_op(self._device, op)

    def add_sinks(self, flash_attn: int, sinks: int) -> None:
        """Give a flash attention op its attention sinks."""
        ggml.base.ggml_flash_attn_ext_add_sinks(flash_attn, sinks)
