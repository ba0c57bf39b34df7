"""Random numbers in the types of ggml: weights and caches whose content does not matter for speed."""

from __future__ import annotations

from fasa_edge.runtime.capi import bytes_per_element, cache_type

import numpy as np

_BLOCKS = {  # bytes of a block of 32, root mean square of its integers (less their mean if there is a minimum), minimum
    "q4_0": (18, 4.64, None),
    "q4_1": (20, 4.61, -7.5),
    "q5_0": (22, 9.25, None),
    "q5_1": (24, 9.23, -15.5),
    "q8_0": (34, 73.9, None),
    "iq4_nl": (18, 67.4, None),
}

_N_UNIT = 32  # numbers of a block, the same in all types of blocks
_N_DIRECT = 1 << 20  # up to so many are drawn afresh
_N_DRAWN = 1 << 23  # otherwise these are used again and again; they stay in a large CPU's cache


def random_data(rng: np.random.Generator, type_name: str, n: int, std: float = 1.0) -> np.ndarray:
    """Draws numbers of mean 0 as they lie in memory: normally distributed, or in the types of blocks uniformly.

    Args:
        rng: where they come from.
        type_name: a name in :data:`fasa_edge.runtime.capi.CACHE_TYPES`.
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


class RandomFiller:
    """Fills large memory with random numbers about as fast as memory can be written.

    Of each type a block is drawn once, and copied on from random places in it. So numbers come again, in other rows and
    other layers: no kernel takes longer or shorter for that, and to draw all of them takes minutes for a large model.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._drawn: dict[tuple[str, float], np.ndarray] = {}

    def fill(self, type_name: str, out: np.ndarray, std: float = 1.0) -> None:
        """Writes numbers as :func:`random_data` makes them into memory.

        Args:
            type_name: a name in :data:`fasa_edge.runtime.capi.CACHE_TYPES`.
            out: uint8, flat, whole blocks of the type.
            std: their standard deviation.
        """
        unit = _N_UNIT * bytes_per_element(cache_type(type_name))  # bytes of what is never torn apart
        if len(out) <= _N_DIRECT // _N_UNIT * unit:
            out[:] = random_data(self._rng, type_name, round(len(out) / unit * _N_UNIT), std)
            return
        if (type_name, std) not in self._drawn:
            self._drawn[type_name, std] = random_data(self._rng, type_name, _N_DRAWN, std)
        drawn, done = self._drawn[type_name, std], 0
        while done < len(out):
            start = int(self._rng.integers(_N_DRAWN // _N_UNIT) * unit)
            piece = drawn[start : start + len(out) - done]
            out[done : done + len(piece)] = piece
            done += len(piece)
