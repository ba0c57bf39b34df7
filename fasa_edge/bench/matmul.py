"""How fast this machine multiplies f32 matrices: what a kernel that computes is measured against."""

from __future__ import annotations

import os
import subprocess
import sys

from fasa_edge.errors import FasaError

_PROGRAM = """
import sys, time
from concurrent.futures import ThreadPoolExecutor
import numpy as np

n_threads, size, n_products, n_repetitions = map(int, sys.argv[1:])
operands = [np.ones((3, size, size), np.float32) for _ in range(n_threads)]

def multiply(matrices):
    for _ in range(n_products):
        np.matmul(*matrices[:2], out=matrices[2])

best = float("inf")
with ThreadPoolExecutor(n_threads) as pool:
    for _ in range(n_repetitions):
        start = time.perf_counter()
        list(pool.map(multiply, operands))
        best = min(best, time.perf_counter() - start)
print(n_threads * n_products * 2 * size**3 / best)
"""
_SIZES = 768, 4, 6  # of a matrix, products, repetitions: a tenth of a second

_ONE_THREAD = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS", "OMP_NUM_THREADS")


def matmul_flops(n_threads: int) -> float:
    """Return the f32 operations per second of numpy's matrix product, ``n_threads`` of them at a time.

    It is a lower bound of what the machine's FMA units can do, and of the products at hand the nearest to it: 0.91 of
    it with OpenBLAS on an AMD EPYC with AVX-512, where ``ggml_mul_mat`` reaches 0.67. Another process computes it, for
    a BLAS decides when it is loaded how many threads it has, and these would fight with those that are measured.

    Raises:
        FasaError: that process failed.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENBLAS_")}
    environment |= dict.fromkeys(_ONE_THREAD, "1")
    command = [sys.executable, "-c", _PROGRAM, *map(str, (n_threads, *_SIZES))]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise FasaError(f"{sys.executable} could not multiply matrices with numpy: {result.stderr.strip()}")
    return float(result.stdout)
