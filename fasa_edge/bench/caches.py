"""K and V of several layers that share no memory, as the ops alone are measured on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from fasa_edge.bench.geometry import Heads
from fasa_edge.errors import FasaError
from fasa_edge.runtime import capi, memory
from fasa_edge.runtime.ggml import F32, Graph
from fasa_edge.runtime.memory import Available

import numpy as np

_N_KV_PAD = 256  # llama.cpp attends to whole blocks of so many cells, and masks those not in use
_N_FILL = 8192  # cells written at a time
_KV_BYTES = 1 << 30  # of K and V in all layers, by default
_MAX_LAYERS = 64


def check_caches(geometries: Sequence[Heads], type_k: str, type_v: str, n_layers: int | None) -> None:
    """Refuse what :class:`Caches` cannot be made of.

    Raises:
        FasaError: the number of layers is out of range, or a type does not fit the heads.
    """
    if n_layers is not None and not 1 <= n_layers <= _MAX_LAYERS:
        raise FasaError(f"{n_layers} layers of ops: choose 1 to {_MAX_LAYERS}")
    for heads in geometries:
        if heads.n_embd_head % 32 and not {type_k, type_v} <= {"f32", "f16", "bf16"}:
            raise FasaError(f"{type_k} and {type_v} of {heads}: quantized heads take a multiple of 32 dims; use f16")


class Caches:
    """The caches; see :meth:`fill`.

    Args:
        graph: that they belong to.
        heads: of a layer.
        depth: cells in use; ``n_kv`` is that rounded up as in llama.cpp.
        type_k: type of K, a name in :data:`fasa_edge.runtime.capi.CACHE_TYPES`.
        type_v: the same for V.
        n_layers: number of layers; None for as many as 1 GiB of K and V has, 2 to 32.
        n_tokens: that attend. By default there are as many times fewer layers, as each takes longer.
        more_bytes: what else a layer takes for each of its ``n_kv`` cells.

    Raises:
        FasaError: there is too little memory.
    """

    def __init__(
        self,
        graph: Graph,
        heads: Heads,
        depth: int,
        type_k: str,
        type_v: str,
        n_layers: int | None,
        *,
        n_tokens: int = 1,
        more_bytes: int = 0,
    ) -> None:
        self.graph, self.heads, self.depth, self.type_k, self.type_v = graph, heads, depth, type_k, type_v
        self.n_kv = -(-depth // _N_KV_PAD) * _N_KV_PAD
        self.types = [capi.cache_type(name) for name in (type_k, type_v)]
        self._n_embd = heads.n_head_kv * heads.n_embd_head
        self.kv_row_bytes = int(self._n_embd * sum(map(capi.bytes_per_element, self.types)))
        by_memory = min(max(_KV_BYTES // (self.n_kv * self.kv_row_bytes), 2), 32)
        self.n = n_layers or max(by_memory // n_tokens, 1)
        self._check_memory(self.n * self.n_kv * (self.kv_row_bytes + more_bytes))
        self.k, self.v = ([graph.new(type_, self.n_kv, self._n_embd) for _ in range(self.n)] for type_ in self.types)

    def _check_memory(self, n_bytes: int) -> None:
        if n_bytes > (available := self.available()).n_bytes:
            raise FasaError(
                f"{self.n} layers of {self.heads} with {self.n_kv} cells take {n_bytes} bytes of memory, {available}: "
                "measure fewer cells or layers"
            )

    def available(self) -> Available:
        """Return the memory that is left where the caches lie."""
        graph = self.graph
        return Available(graph.free_memory(), "the GPU's memory") if graph.on_gpu else memory.available()

    def fill(self, rng: np.random.Generator, more: Callable[[int, int], list[int]] = lambda k, cells: []) -> None:
        """Write random rows into K and V of each layer, the same in all, by the op that does it in llama.cpp.

        Args:
            rng: makes the rows.
            more: makes ops that are computed with them, of keys ``[n, n_head_kv, n_embd_head]``, float32, and their
                cells ``[n]``, int64.
        """
        graph = self.graph
        n = min(self.n_kv, _N_FILL)
        rows, cells = graph.new(F32, n, self._n_embd), graph.tensor(np.arange(n))
        heads = graph.ggml_reshape_3d(rows, self.heads.n_embd_head, self.heads.n_head_kv, n)
        written = [graph.ggml_set_rows(cache, rows, cells) for cache in (*self.k, *self.v)]
        plan = graph.plan(*written, *more(heads, cells))
        for start in range(0, self.n_kv, n):
            graph.write(cells, min(start, self.n_kv - n) + np.arange(n))
            graph.write(rows, rng.standard_normal((n, self._n_embd), np.float32))
            graph.compute(plan)

    def k_and_v(self) -> Iterator[tuple[int, int]]:
        """Yield K and V of each layer, each ``[n_kv, n_head_kv, n_embd_head]``.

        These are new tensors each time: ggml-cuda knows a graph that it has recorded by the first of its nodes.
        """
        shape = (self.heads.n_embd_head, self.heads.n_head_kv, self.n_kv)
        for k, v in zip(self.k, self.v, strict=True):
            yield self.graph.ggml_reshape_3d(k, *shape), self.graph.ggml_reshape_3d(v, *shape)

    def flash_attn(self, q: int, mask: int) -> list[int]:
        """Make stock's flash attention in each layer.

        Args:
            q: float32 ``[n_tokens, n_head, n_embd_head]``.
            mask: float16 ``[n_tokens, n_kv]``.

        Returns:
            Of each layer float32 ``[n_tokens, n_head, n_embd_head]``.
        """
        inside, attn = self.cells_inside, self.graph.ggml_flash_attn_ext
        return [attn(inside(q), inside(k), inside(v), mask, self.scale, 0.0, 0.0) for k, v in self.k_and_v()]

    def fasa_attend(self, q: int, ids: Sequence[int | None], mask: int | None) -> list[int]:
        """Make FASA_ATTEND in each layer: over the cells of its ids, or, where these are None, of the mask."""
        attend = self.graph.ggml_fasa_attend
        pairs = zip(self.k_and_v(), ids, strict=True)
        return [attend(q, k, v, idx, mask, None, self.scale, 0.0) for (k, v), idx in pairs]

    def cells_inside(self, tensor: int) -> int:
        """Permute ``[n, n_head, n_embd_head]`` to ``[n_head, n, n_embd_head]``, or back."""
        return self.graph.ggml_permute(tensor, 0, 2, 1, 3)

    @property
    def scale(self) -> float:
        """Of the logits."""
        return self.heads.n_embd_head**-0.5
