"""How fast this machine moves memory: what a kernel that moves a number of bytes is measured against."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

from fasa_edge.runtime.ggml import I8, Graph

import numpy as np

N_BYTES = 1 << 30
"""Bytes read at a time: several times the largest caches, so that it also drives everything else out of them."""

_N_PARTS = 64  # a part a thread at a time, so that no thread waits long for another


class MemoryReader:
    """A buffer read by several threads.

    Args:
        n_threads: that read it.
    """

    def __init__(self, n_threads: int) -> None:
        self._parts = np.array_split(np.ones(N_BYTES, np.uint8), _N_PARTS)
        self._pool = ThreadPoolExecutor(n_threads)

    def __enter__(self) -> MemoryReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def read(self) -> float:
        """Read all of it once and return the bytes per second."""
        start = time.perf_counter()
        list(self._pool.map(np.max, self._parts))  # numpy's fastest reduction; it holds no lock
        return N_BYTES / (time.perf_counter() - start)


class DeviceCopier:
    """A buffer in the memory of a graph's device, copied there.

    Args:
        graph: its backend copies.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._plan = graph.plan(graph.ggml_cpy(*(graph.new(I8, N_BYTES) for _ in range(2))))

    def read(self) -> float:
        """Copy all of it once and return the bytes per second, those read and those written."""
        start = time.perf_counter()
        self._graph.compute(self._plan)
        return 2 * N_BYTES / (time.perf_counter() - start)
