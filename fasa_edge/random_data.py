"""Random numbers in the types of ggml: weights and caches whose content does not matter for speed."""

from __future__ import annotations

from fasa_edge._capi import bytes_per_element, cache_type

import numpy as np

_BLOCKS = {  # bytes of a block of 32, root mean square of its integers (less their mean if there is a minimum), minimum
    "q4_0": (18, 4.64, None),
    "q4_1": (20, 4.61, -7.5),
    "q5_0": (22, 9.25, None),
    "q5_1": (24, 9.23, -15.5),
    "q8_0": (34, 73.9, None),
    "iq4_nl": (18, 67.4, None),
}

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
        n_bytes, unit, minimum = _BLOCKS[type_name]
        blocks = np.frombuffer(bytearray(rng.bytes(n // 32 * n_bytes)), np.uint8).reshape(-1, n_bytes)
        scales = blocks[:, :4].view(np.uint16)  # d, and m where there is a minimum
        d = np.float16(std / unit)
        if minimum is None:  # of either sign, because the integers reach lower than high
            scales[:, 0] = scales[:, 0] & 0x8000 | d.view(np.uint16)
        else:
            scales[:] = np.array([d, np.float16(d * minimum)]).view(np.uint16)
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
