"""Speed of attention ops alone, against stock flash attention and against the memory they must read.

One decoded token attends, in each of several layers that share no memory. All ops are interleaved in one run. Before
each sample a large buffer is read: it drives everything out of the caches, as the weights of a model do between two
layers, and tells how fast memory is at that moment. On a GPU, such a buffer is copied in its memory.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import ClassVar

from fasa_edge.bench.bandwidth import DeviceCopier, MemoryReader
from fasa_edge.bench.caches import Caches, check_caches
from fasa_edge.bench.geometry import Heads
from fasa_edge.bench.op_times import OpTimes, where
from fasa_edge.bench.rounds import ratios, rounds
from fasa_edge.config import FasaConfig, default_n_tip
from fasa_edge.errors import FasaError
from fasa_edge.runtime.ggml import I32, Graph

import numpy as np

_N_WARM_UP_GPU = 4  # rounds, until ggml-cuda has recorded the graphs


@dataclass(kw_only=True)
class OpRow(OpTimes):
    """One op at one depth, of one decoded token; with the attributes of :class:`OpTimes`.

    Attributes:
        op: ``flash_attn_ext``: stock; ``exact``: FASA_ATTEND over all cells; ``fasa``: FASA_SELECT and FASA_ATTEND;
            ``fasa_select``, ``fasa_attend``: each alone.
        budget: cells attended to; 0: all.
        n_tip: chunks scored per KV head; 0: none.
        n_bytes: what the op must move: tips, ids, mask, and the rows of K and V that it attends to.
        bandwidth: bytes per second that the same number of threads reads, or the GPU copies, median over the run.
        ratio: median, over the interleaved rounds, of ``flash_attn_ext``'s time over this one's.
        ratio_min: least of them.
        ratio_max: greatest of them.
    """

    budget: int
    n_tip: int
    n_bytes: int
    bandwidth: float = 0.0
    ratio: float = 1.0
    ratio_min: float = 1.0
    ratio_max: float = 1.0

    floor: ClassVar[str] = "reading the bytes it must move"

    @property
    def label(self) -> str:
        """The op, and its budget if it has one."""
        return f"{self.op}, budget {self.budget}" if self.budget else self.op

    @property
    def floor_ns(self) -> float:
        """Nanoseconds that reading ``n_bytes`` takes."""
        return 1e9 * self.n_bytes / self.bandwidth

    @property
    def floor_ratio(self) -> float:
        """Median time over :attr:`floor_ns`; below 1 where caches help after all."""
        return self.median_ns / self.floor_ns

    def as_dict(self) -> dict:
        """Return the row for JSON."""
        return super().as_dict() | {"floor_ns": self.floor_ns, "floor_ratio": self.floor_ratio}


def run(
    geometries: Sequence[Heads],
    depths: Sequence[int],
    budgets: Sequence[int],
    n_threads: int,
    n_repetitions: int,
    *,
    type_k: str = "f16",
    type_v: str = "f16",
    n_tip: int | None = None,
    n_layers: int | None = None,
    on_gpu: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[OpRow]:
    """Measure all ops for each geometry and depth.

    Args:
        geometries: heads of a layer.
        depths: cells in use.
        budgets: cells that FASA attends to.
        n_threads: threads of the CPU backend.
        n_repetitions: rounds of measurements, after those that warm up.
        type_k: type of K, a name in :data:`fasa_edge.runtime.capi.CACHE_TYPES`.
        type_v: the same for V.
        n_tip: chunks scored per KV head; None for :func:`fasa_edge.config.default_n_tip`.
        n_layers: layers of a sample; None for as many as 1 GiB of K and V has, 2 to 32.
        on_gpu: on the first GPU, not on the CPU.
        progress: called with the rounds done and those to do.

    Yields:
        For each geometry and depth a row of each op, those of FASA for each budget.

    Raises:
        FasaError: a number is out of range, or there is too little memory.
    """
    if min(depths, default=0) < 1 or min(budgets, default=0) < 1 or n_threads < 1 or n_repetitions < 1:
        raise FasaError(
            f"{list(depths)} cells, budgets {list(budgets)}, {n_threads} threads, {n_repetitions} repetitions: "
            "an op needs at least 1 of each"
        )
    for heads in geometries:
        n_chunk = heads.n_embd_head // 2
        if n_tip is not None and not 1 <= n_tip <= n_chunk:
            raise FasaError(f"n_tip = {n_tip} is out of range: choose 1 to {n_chunk}, the chunks of {heads}")
    check_caches(geometries, type_k, type_v, n_layers)
    cases = [(heads, depth) for heads in geometries for depth in sorted(set(depths))]
    n_warm_up = _N_WARM_UP_GPU if on_gpu else 1
    n_steps, n_done = len(cases) * (n_warm_up + n_repetitions), 0
    with ExitStack() as stack:
        on_cpu = None if on_gpu else stack.enter_context(MemoryReader(n_threads))
        for heads, depth in cases:
            with Graph(n_threads, on_gpu=on_gpu) as graph:
                layers = _Layers(graph, heads, depth, type_k, type_v, n_tip, n_layers)
                ops = list(_ops(layers, sorted(set(budgets)), n_threads))
                reader = on_cpu or DeviceCopier(graph)
                bandwidths: list[float] = []
                for counts, turn in rounds(ops, n_warm_up, n_repetitions):
                    for op in turn:
                        bandwidth = reader.read()
                        if counts:
                            bandwidths.append(bandwidth)
                        op.row.measure(graph, op.plan, counts)
                    n_done += 1
                    progress(n_done, n_steps)
            rows = [op.row for op in ops]
            for row in rows:
                row.bandwidth = statistics.median(bandwidths)
                row.ratio, row.ratio_min, row.ratio_max = ratios(rows[0].samples_ns, row.samples_ns)
            yield from rows


class _Layers(Caches):
    """The caches with their tips, and what one decoded token brings."""

    def __init__(
        self, graph: Graph, heads: Heads, depth: int, type_k: str, type_v: str, n_tip: int | None, n_layers: int | None
    ) -> None:
        self.n_tip = n_tip or default_n_tip(heads.n_embd_head)
        tip_bytes = heads.n_head_kv * (self.n_tip + 4)  # dims are filled up to eight
        super().__init__(graph, heads, depth, type_k, type_v, n_layers, more_bytes=tip_bytes)

        rng = np.random.default_rng(0)
        self.q = graph.tensor(rng.standard_normal((1, heads.n_head, heads.n_embd_head), np.float32))
        dims = [rng.permutation(heads.n_embd_head)[: 2 * self.n_tip] for _ in range(heads.n_head_kv)]
        self.dims = graph.tensor(np.array(dims, np.int32))
        ranges = np.zeros((heads.n_head_kv, 2, 2 * self.n_tip), np.float32)
        ranges[:, 1] = 0.35  # 16 levels over 5.6 standard deviations
        self.ranges = graph.tensor(ranges)
        self.mask = graph.tensor(np.where(np.arange(self.n_kv) < depth, 0, -np.inf).astype(np.float16)[None])
        self.tips = [graph.ggml_fasa_new_tips(self.n_kv, 2 * self.n_tip, heads.n_head_kv, 1) for _ in range(self.n)]
        for tips in self.tips:
            graph.clear(tips)
        self.fill(rng, self._store)

    @property
    def tips_bytes(self) -> int:
        """Bytes of the tips of one layer."""
        return self.graph.n_bytes(self.tips[0])

    def _store(self, k: int, cells: int) -> list[int]:
        store, type_k = self.graph.ggml_fasa_store, self.types[0]
        return [store(tips, k, self.dims, self.ranges, cells, type_k) for tips in self.tips]


@dataclass(frozen=True)
class _Op:
    row: OpRow
    results: list[int]  # a tensor for each layer
    plan: int


def _ops(layers: _Layers, budgets: Sequence[int], n_threads: int) -> Iterator[_Op]:
    """Make the ops that are measured on the layers, stock first."""
    graph, heads, mask, q = layers.graph, layers.heads, layers.mask, layers.q
    mask_bytes = graph.n_bytes(mask)

    def op(name: str, results: list[int], n_bytes: int, budget: int = 0) -> _Op:
        n_tip = layers.n_tip if budget else 0
        row = OpRow(op=name, budget=budget, n_tip=n_tip, n_bytes=n_bytes, **where(layers, n_threads))
        return _Op(row, results, graph.plan(*results))

    dense_bytes = layers.depth * layers.kv_row_bytes + mask_bytes
    yield op("flash_attn_ext", layers.flash_attn(q, mask), dense_bytes)
    yield op("exact", layers.fasa_attend(q, [None] * layers.n, mask), dense_bytes)

    first, last = np.arange(FasaConfig.n_sink), layers.depth - 1 - np.arange(FasaConfig.n_recent)
    for budget in budgets:
        n_fac = min(budget, layers.depth)
        forced = graph.tensor(np.concatenate((first, last))[None, :n_fac].astype(np.int32))
        ids = [
            graph.ggml_fasa_select(
                q, tips, layers.dims, layers.ranges, mask, forced, heads.n_head_kv, n_fac, layers.scale
            )
            for tips in layers.tips
        ]
        given = graph.new(I32, 1, heads.n_head_kv, n_fac)
        ids_bytes, kv_bytes = graph.n_bytes(given), n_fac * layers.kv_row_bytes
        select_bytes = layers.tips_bytes + mask_bytes + ids_bytes
        yield op("fasa", layers.fasa_attend(q, ids, None), select_bytes + kv_bytes, budget)
        yield (select := op("fasa_select", ids, select_bytes, budget))
        graph.compute(select.plan)
        graph.write(given, graph.read(ids[0], np.int32))
        yield op("fasa_attend", layers.fasa_attend(q, [given] * layers.n, None), ids_bytes + kv_bytes, budget)
