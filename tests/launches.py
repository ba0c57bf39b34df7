"""What the emulated devices (tests/simt) launch."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

from conftest import _built

SELECT_ATTEND = "FASA_SELECT+FASA_ATTEND"
ROWS_STORE = "SET_ROWS+FASA_STORE"
NAMES = ("FASA_STORE", "FASA_SELECT", "FASA_ATTEND", SELECT_ATTEND, ROWS_STORE)


@contextmanager
def launches() -> Iterator[dict[str, int]]:
    """Holds, at the end, how many FASA ops and pairs of ops in one launch were computed inside, zeros left out."""
    lib = ctypes.CDLL(str(_built("fasa-simt.so")))
    count = lambda: {name: lib.simt_launches(name.encode()) for name in NAMES}  # noqa: E731
    before, res = count(), {}
    yield res
    res.update({name: n - before[name] for name, n in count().items() if n > before[name]})
