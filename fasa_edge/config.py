"""The defaults of the runtime: how many tokens a sparse decode step keeps, and when it runs at all.

Every field is stored in a GGUF under the key ``fasa.<field>`` (see :mod:`fasa_edge.schema`). The budget is ``N_fac`` of
arXiv 2602.03152, and its first layer is dense too; sinks and recent tokens inside the budget are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fasa_edge.errors import SchemaError

INT32_MAX = 2**31 - 1  # cell ids and counts are int32 in the runtime

SELECTS = ("group", "head")

LIMITS = {  # inclusive range of each number, in the unit of its field
    "budget": (1, INT32_MAX),
    "n_sink": (0, INT32_MAX),
    "n_recent": (0, INT32_MAX),
    "n_dense_layers": (0, INT32_MAX),
    "min_ctx": (0, INT32_MAX),
    "max_batch": (1, 64),
}


@dataclass(frozen=True)
class FasaConfig:
    """Settings of sparse decoding; every one of them can be overridden when a model is loaded.

    Attributes:
        enabled: False attends to all tokens everywhere.
        exact: what stays dense in a decode step on the CPU (short contexts, dense layers, or all of it) is attended
            with FASA's kernel, exact within rounding and faster, instead of llama.cpp's flash attention.
        budget: tokens attended per KV head and step, sinks and recent tokens included.
        n_sink: first tokens of the context that are always attended.
        n_recent: latest tokens that are always attended.
        n_dense_layers: leading layers that stay dense.
        min_ctx: cached tokens below which a step stays dense; 0 means twice the budget, on a GPU also until
            it pays there (``ggml_kernels/fasa-cost.cpp``).
        max_batch: tokens per sequence up to which a batch counts as decoding; larger ones are prompts and stay dense.
        select: who chooses the tokens: "group", each KV head for all query heads that read it, or "head", each query
            head for itself, as in the paper; that reads and scores as many times more as a group has heads.

    Raises:
        SchemaError: a value of the wrong type, out of range, or ``n_sink + n_recent > budget``.
    """

    enabled: bool = True
    exact: bool = False
    budget: int = 512
    n_sink: int = 4
    n_recent: int = 32
    n_dense_layers: int = 1
    min_ctx: int = 0
    max_batch: int = 16  # a decoded token and the 10 that llama-cpp-python's draft model adds
    select: str = "group"

    def __post_init__(self) -> None:
        for name in ("enabled", "exact"):
            if not isinstance(getattr(self, name), bool):
                raise SchemaError(f"{name} = {getattr(self, name)!r}: expected True or False")
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise SchemaError(f"{name} = {value!r}: expected a whole number from {low} to {high}")
            if not low <= value <= high:
                raise SchemaError(f"{name} = {value} is out of range: choose {low} to {high}")
        if self.select not in SELECTS:
            raise SchemaError(f"select = {self.select!r} is unknown: choose from {', '.join(SELECTS)}")
        if self.n_sink + self.n_recent > self.budget:
            raise SchemaError(
                f"n_sink + n_recent = {self.n_sink} + {self.n_recent} = {self.n_sink + self.n_recent} exceeds "
                f"budget = {self.budget}: raise the budget or keep fewer sinks and recent tokens"
            )


def default_n_tip(n_embd_head: int) -> int:
    """Chunks per KV head for a head of ``n_embd_head`` dimensions: three quarters of them up to 24, then half, if more.

    24 of 32 at head size 64, 32 of 64 at 128, 64 of 128 at 256; a multiple of 4, as tips are packed, or all.
    """
    n_chunk = n_embd_head // 2
    n_tip = max(min(24, 3 * n_chunk / 4), n_chunk / 2)
    return min(4 * math.ceil(n_tip / 4), n_chunk)


def tip_bytes(n_tip: int) -> int:
    """Bytes of the tips of one cell and KV head: four bits for each dim of a chunk, in blocks of eight dims."""
    return 4 * math.ceil(2 * n_tip / 8)
