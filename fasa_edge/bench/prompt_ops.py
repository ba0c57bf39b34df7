"""Speed of the attention of prompts, against both of stock's ways and against what the machine can multiply.

The tokens of a micro-batch attend at the end of a cache: they are the last of its cells, each sees its own and those
before it. All ops are interleaved in one run; before each sample a large buffer is read, as in
:mod:`fasa_edge.bench.ops`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from fasa_edge.bench import matmul
from fasa_edge.bench.bandwidth import MemoryReader
from fasa_edge.bench.caches import Caches, check_caches
from fasa_edge.bench.geometry import Heads
from fasa_edge.bench.op_times import OpTimes, where
from fasa_edge.bench.rounds import ratios, rounds
from fasa_edge.errors import FasaError
from fasa_edge.runtime import capi
from fasa_edge.runtime.ggml import Graph

import numpy as np

STOCK = ("flash_attn_ext", "mul_mat+soft_max_ext")
"""Stock's ways to attend: with flash attention, and without."""

_MASK_BYTES = 2 + 4  # of a token and cell: float16 with flash attention, float32 without
_LOGIT_BYTES = 4 + 4  # of a token, head and cell: the logit, and the probability in V's type for the second product


@dataclass(frozen=True)
class Ratio:
    """A rival's times over those of an op, of the same rounds: above 1 the op is faster.

    Attributes:
        median: of the rounds.
        min: least of them.
        max: greatest of them.
    """

    median: float
    min: float
    max: float


@dataclass(kw_only=True)
class PromptOpRow(OpTimes):
    """One op at one depth, of a micro-batch of a prompt; with the attributes of :class:`OpTimes`.

    Attributes:
        op: those of :data:`STOCK`; ``exact``: FASA_ATTEND over all cells that the mask shows.
        n_prompt: tokens of the micro-batch, the last of the ``n_depth`` cells.
        n_flops: floating-point operations of both products over the cells that the mask shows, and over no others.
        matmul_flops: f32 operations per second of numpy's matrix product by the same number of threads, the greatest of
            the run: see :func:`fasa_edge.bench.matmul.matmul_flops`.
        ratios: against each op of :data:`STOCK` that was measured.
    """

    n_prompt: int
    n_flops: int
    matmul_flops: float = 0.0
    ratios: dict[str, Ratio] = field(default_factory=dict)

    floor: ClassVar[str] = "numpy's matrix product on as many operations"

    @property
    def label(self) -> str:
        """The op and its tokens."""
        return f"{self.op}, {self.n_prompt} tokens"

    @property
    def floor_ns(self) -> float:
        """Nanoseconds that numpy's matrix product takes for ``n_flops``."""
        return 1e9 * self.n_flops / self.matmul_flops

    @property
    def flops(self) -> float:
        """Floating-point operations per second, of the median time."""
        return 1e9 * self.n_flops / self.median_ns

    @property
    def matmul_share(self) -> float:
        """:attr:`flops` over :attr:`matmul_flops`."""
        return self.floor_ns / self.median_ns

    def as_dict(self) -> dict:
        """Return the row for JSON."""
        return super().as_dict() | {"flops": self.flops, "floor_ns": self.floor_ns, "matmul_share": self.matmul_share}


def run(
    geometries: Sequence[Heads],
    n_prompts: Sequence[int],
    depths: Sequence[int],
    n_threads: int,
    n_repetitions: int,
    *,
    type_k: str = "f16",
    type_v: str = "f16",
    n_layers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[PromptOpRow]:
    """Measure all ops for each geometry, depth and micro-batch, on the CPU.

    Args:
        geometries: heads of a layer.
        n_prompts: tokens that attend.
        depths: cells in use, those of these tokens among them.
        n_threads: threads of the CPU backend.
        n_repetitions: rounds of measurements, after one that warms up.
        type_k: type of K, a name in :data:`fasa_edge.runtime.capi.CACHE_TYPES`.
        type_v: the same for V. Of a quantized one there is no row without flash attention: llama.cpp transposes none.
        n_layers: layers of a sample; None for as many as of one token, over the tokens, at least one.
        progress: called with the rounds done and those to do.

    Yields:
        For each geometry, depth and micro-batch a row of each op. Warns where memory does not hold the logits of stock
        without flash attention, whose row is left out then.

    Raises:
        FasaError: a number is out of range, a micro-batch is longer than a depth, or there is too little memory.
    """
    if min(n_prompts, default=0) < 1 or min(depths, default=0) < 1 or n_threads < 1 or n_repetitions < 1:
        raise FasaError(
            f"{list(n_prompts)} tokens, {list(depths)} cells, {n_threads} threads, {n_repetitions} repetitions: "
            "an op needs at least 1 of each"
        )
    if max(n_prompts) > min(depths):
        raise FasaError(
            f"{max(n_prompts)} tokens of a prompt do not fit {min(depths)} cells, of which they are the last: take a "
            "greater depth or fewer tokens"
        )
    check_caches(geometries, type_k, type_v, n_layers)
    batches = [(depth, n) for depth in sorted(set(depths)) for n in sorted(set(n_prompts))]
    n_steps, n_done = len(geometries) * len(batches) * (1 + n_repetitions), 0
    with MemoryReader(n_threads) as reader:
        for heads in geometries:
            for depth, n_prompt in batches:
                with Graph(n_threads) as graph:
                    layers = _Layers(graph, heads, depth, type_k, type_v, n_prompt, n_layers)
                    row_of = where(layers, n_threads) | {"n_prompt": n_prompt, "n_flops": layers.n_flops}
                    ops = [(PromptOpRow(op=op, **row_of), graph.plan(*res)) for op, res in _ops(layers).items()]
                    matmul_flops = 0.0
                    for counts, turn in rounds(ops, 1, n_repetitions):
                        matmul_flops = max(matmul_flops, matmul.matmul_flops(n_threads))
                        for row, plan in turn:
                            reader.read()
                            row.measure(graph, plan, counts)
                        n_done += 1
                        progress(n_done, n_steps)
                rows = [row for row, _ in ops]
                stock = [row for row in rows if row.op in STOCK]
                for row in rows:
                    row.matmul_flops = matmul_flops
                    row.ratios = {one.op: Ratio(*ratios(one.samples_ns, row.samples_ns)) for one in stock}
                yield from rows


class _Layers(Caches):
    """The caches, and what a micro-batch brings."""

    def __init__(
        self, graph: Graph, heads: Heads, depth: int, type_k: str, type_v: str, n_prompt: int, n_layers: int | None
    ) -> None:
        masks = _MASK_BYTES * n_prompt
        super().__init__(graph, heads, depth, type_k, type_v, n_layers, n_tokens=n_prompt, more_bytes=masks)
        rng = np.random.default_rng(0)
        self.n_prompt = n_prompt
        self.q = graph.tensor(rng.standard_normal((n_prompt, heads.n_head, heads.n_embd_head), np.float32))
        positions = np.arange(depth - n_prompt, depth)[:, None]
        self.visible = np.arange(self.n_kv) <= positions  # of n_kv cells, those after depth are not in use
        self.fill(rng)

    @property
    def n_flops(self) -> int:
        """Of the products of one layer: a multiplication and an addition for each dim, of K and of V."""
        return 2 * 2 * self.heads.n_embd_head * self.heads.n_head * int(self.visible.sum())

    def mask(self, dtype: type) -> int:
        """Make the mask ``[n_prompt, n_kv]``."""
        return self.graph.tensor(np.where(self.visible, dtype(0), dtype(-np.inf)))

    def transposed_v(self) -> Iterator[int]:
        """Yield V of each layer as llama.cpp keeps it without flash attention: ``[n_head_kv, n_embd_head, n_kv]``."""
        graph, heads = self.graph, self.heads
        for _, v in self.k_and_v():
            stored = graph.new(self.types[1], heads.n_head_kv, heads.n_embd_head, self.n_kv)
            graph.run(graph.ggml_cpy(graph.ggml_permute(v, 1, 2, 0, 3), stored))
            yield stored

    def without_flash_attn(self) -> list[int]:
        """Make stock's attention without flash attention in each layer, as ``llm_graph_context::build_attn_mha``."""
        graph, mask = self.graph, self.mask(np.float32)
        results = []
        for (k, _), v in zip(self.k_and_v(), self.transposed_v(), strict=True):
            kq = graph.ggml_mul_mat(self.cells_inside(k), self.cells_inside(self.q))
            kq = graph.ggml_soft_max_ext_inplace(kq, mask, self.scale, 0.0)  # where llama.cpp's allocator puts it
            results.append(graph.ggml_cont(self.cells_inside(graph.ggml_mul_mat(v, kq))))
        return results

    def bytes_without_flash_attn(self) -> int:
        """Bytes that this takes in all layers: logits, and V once more."""
        logits = self.n_prompt * self.heads.n_head * _LOGIT_BYTES
        v = self.heads.n_head_kv * self.heads.n_embd_head * capi.bytes_per_element(self.types[1])
        return int(self.n * self.n_kv * (logits + v))


def _ops(layers: _Layers) -> dict[str, list[int]]:
    """Make the ops that are measured: by name the results of all layers."""
    mask = layers.mask(np.float16)
    ops = {STOCK[0]: layers.flash_attn(layers.q, mask)}
    if layers.type_v in ("f32", "f16", "bf16"):
        needed, available = layers.bytes_without_flash_attn(), layers.available()
        if needed <= available.n_bytes:
            ops[STOCK[1]] = layers.without_flash_attn()
        else:
            warnings.warn(
                f"stock without flash attention is left out at {layers.depth} cells: the logits of {layers.n_prompt} "
                f"tokens, and V transposed, take {needed} bytes, {available}",
                stacklevel=3,
            )
    ops["exact"] = layers.fasa_attend(layers.q, [None] * layers.n, mask)
    return ops
