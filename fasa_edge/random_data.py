"""Random numbers in the types of ggml: weights and caches whose content does not matter for speed."""

from __future__ import annotations

from fasa_edge._capi import bytes_per_element, cache_type

import numpy as np

_BLOCKS = {  # bytes of a block of 32, standard deviation of its uniformly random integers, their mean
    "q4_0": (18, 4.61, -0.5),
    "q4_1": (20, 4.61, 7.5),
    "q5_0": (22, 9.23, -0.5),
    "q5_1": (24, 9.23, 15.5),
    "q8_0": (34, 73.9, -0.5),
    "iq4_nl": (18, 71.4, -6.8),
}
_WITH_MIN = ("q4_1", "q5_1")  # d and m before the integers, the others have d alone

CHUNK = 1 << 22
"""Numbers made at a time."""


def random_data(rng: np.random.Generator, type_name: str, n: int, std: float = 1.0) -> np.ndarray:
    """Numbers of mean 0 as they lie in memory: normally distributed, or in the types of blocks uniformly.

    Args:
        rng: where they come from.
        type_name: a name in :data:`fasa_edge._capi.CACHE_TYPES`.
        n: how many; whole blocks of 32.
        std: their standard deviation.

    Returns:
        uint8, flat.
    """
    if type_name in _BLOCKS:
        n_bytes, unit, mean = _BLOCKS[type_name]
        blocks = np.frombuffer(rng.bytes(n // 32 * n_bytes), np.uint8).reshape(-1, n_bytes).copy()
        scales = [std / unit, -mean * std / unit] if type_name in _WITH_MIN else [std / unit]
        blocks[:, : 2 * len(scales)] = np.array(scales, np.float16).view(np.uint8)
        return blocks.reshape(-1)
    values = rng.standard_normal(n, np.float32)
    values *= np.float32(std)
    if type_name == "f16":
        values = values.astype(np.float16)
    elif type_name == "bf16":
        values = (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.view(np.uint8)


def fill_random(rng: np.random.Generator, type_name: str, out: np.ndarray) -> None:
    """:func:`random_data` of standard deviation 1 into uint8 memory, whole blocks of it."""
    step = int(CHUNK * bytes_per_element(cache_type(type_name)))
    for start in range(0, len(out), step):
        part = out[start : start + step]
        part[:] = random_data(rng, type_name, round(len(part) / bytes_per_element(cache_type(type_name))))
