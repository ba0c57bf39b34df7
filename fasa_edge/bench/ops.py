"""Speed of attention ops alone, against stock flash attention and against the memory they must read.

One decoded token attends, in each of several layers that share no memory. All ops are interleaved in one run. Before
each sample a large buffer is read: it drives everything out of the caches, as the weights of a model do between two
layers, and tells how fast memory is at that moment. On a GPU, such a buffer is copied in its memory.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field

from fasa_edge.bench.bandwidth import DeviceCopier, MemoryReader
from fasa_edge.bench.geometry import Heads
from fasa_edge.config import FasaConfig, default_n_tip
from fasa_edge.errors import FasaError
from fasa_edge.runtime import capi, memory
from fasa_edge.runtime.ggml import F32, I32, Graph
from fasa_edge.runtime.memory import Available

import numpy as np

_N_KV_PAD = 256  # llama.cpp attends to whole blocks of so many cells, and masks those not in use
_N_FILL = 8192  # cells written at a time
_KV_BYTES = 1 << 30  # of K and V in all layers, by default
_MAX_LAYERS = 64
_N_WARM_UP_GPU = 4  # rounds, until ggml-cuda has recorded the graphs


@dataclass
class OpRow:
    """One op at one depth; times are those of one layer.

    Attributes:
        op: ``flash_attn_ext``: stock; ``exact``: FASA_ATTEND over all cells; ``fasa``: FASA_SELECT and FASA_ATTEND;
            ``fasa_select``, ``fasa_attend``: each alone.
        n_head: query heads.
        n_head_kv: KV heads.
        n_embd_head: dims of a head.
        type_k: type of K.
        type_v: type of V.
        n_depth: cells in use.
        budget: cells attended to; 0: all.
        n_tip: chunks scored per KV head; 0: none.
        device: what computed.
        n_threads: threads that computed; 0 on a GPU.
        n_layers: layers of a sample.
        n_bytes: what the op must move: tips, ids, mask, and the rows of K and V that it attends to.
        bandwidth: bytes per second that the same number of threads reads, or the GPU copies, median over the run.
        samples_ns: nanoseconds of each repetition.
        ratio: median, over the interleaved rounds, of ``flash_attn_ext``'s time over this one's.
        ratio_min: least of them.
        ratio_max: greatest of them.
    """

    op: str
    n_head: int
    n_head_kv: int
    n_embd_head: int
    type_k: str
    type_v: str
    n_depth: int
    budget: int
    n_tip: int
    device: str
    n_threads: int
    n_layers: int
    n_bytes: int
    bandwidth: float = 0.0
    samples_ns: list[float] = field(default_factory=list)
    ratio: float = 1.0
    ratio_min: float = 1.0
    ratio_max: float = 1.0

    @property
    def heads(self) -> str:
        """The heads as ``--geometry`` takes them."""
        return str(Heads(self.n_head, self.n_head_kv, self.n_embd_head))

    @property
    def label(self) -> str:
        """The op, and its budget if it has one."""
        return f"{self.op}, budget {self.budget}" if self.budget else self.op

    @property
    def median_ns(self) -> float:
        """Median of the times, in nanoseconds."""
        return statistics.median(self.samples_ns)

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
        return asdict(self) | {
            "median_ns": self.median_ns,
            "min_ns": min(self.samples_ns),
            "max_ns": max(self.samples_ns),
            "floor_ns": self.floor_ns,
            "floor_ratio": self.floor_ratio,
        }


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
    if n_layers is not None and not 1 <= n_layers <= _MAX_LAYERS:
        raise FasaError(f"{n_layers} layers of ops: choose 1 to {_MAX_LAYERS}")
    for heads in geometries:
        n_chunk = heads.n_embd_head // 2
        if n_tip is not None and not 1 <= n_tip <= n_chunk:
            raise FasaError(f"n_tip = {n_tip} is out of range: choose 1 to {n_chunk}, the chunks of {heads}")
        if heads.n_embd_head % 32 and not {type_k, type_v} <= {"f32", "f16", "bf16"}:
            raise FasaError(f"{type_k} and {type_v} of {heads}: quantized heads take a multiple of 32 dims; use f16")
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
                for repetition in range(-n_warm_up, n_repetitions):
                    first = repetition % len(ops)
                    for op in ops[first:] + ops[:first]:
                        bandwidth = reader.read()
                        start = time.perf_counter_ns()
                        graph.compute(op.plan)
                        elapsed = time.perf_counter_ns() - start
                        if repetition >= 0:
                            bandwidths.append(bandwidth)
                            op.row.samples_ns.append(elapsed / layers.n)
                    n_done += 1
                    progress(n_done, n_steps)
            rows = [op.row for op in ops]
            for row in rows:
                row.bandwidth = statistics.median(bandwidths)
                ratios = [stock / own for stock, own in zip(rows[0].samples_ns, row.samples_ns, strict=True)]
                row.ratio, row.ratio_min, row.ratio_max = statistics.median(ratios), min(ratios), max(ratios)
            yield from rows


class _Layers:
    """The caches of several layers of one geometry, filled by the ops that fill them in llama.cpp."""

    def __init__(
        self, graph: Graph, heads: Heads, depth: int, type_k: str, type_v: str, n_tip: int | None, n_layers: int | None
    ) -> None:
        self.graph, self.heads, self.depth, self.type_k, self.type_v = graph, heads, depth, type_k, type_v
        self.n_kv = -(-depth // _N_KV_PAD) * _N_KV_PAD
        self.n_tip = n_tip or default_n_tip(heads.n_embd_head)
        n_embd = heads.n_head_kv * heads.n_embd_head
        types = [capi.cache_type(name) for name in (type_k, type_v)]
        self.kv_row_bytes = int(n_embd * sum(map(capi.bytes_per_element, types)))
        self.n = n_layers or min(max(_KV_BYTES // (self.n_kv * self.kv_row_bytes), 2), 32)
        self._check_memory()

        rng = np.random.default_rng(0)
        self.q = graph.tensor(rng.standard_normal((1, heads.n_head, heads.n_embd_head), np.float32))
        dims = [rng.permutation(heads.n_embd_head)[: 2 * self.n_tip] for _ in range(heads.n_head_kv)]
        self.dims = graph.tensor(np.array(dims, np.int32))
        ranges = np.zeros((heads.n_head_kv, 2, 2 * self.n_tip), np.float32)
        ranges[:, 1] = 0.35  # 16 levels over 5.6 standard deviations
        self.ranges = graph.tensor(ranges)
        self.mask = graph.tensor(np.where(np.arange(self.n_kv) < depth, 0, -np.inf).astype(np.float16)[None])
        self.k, self.v = ([graph.new(type_, self.n_kv, n_embd) for _ in range(self.n)] for type_ in types)
        self.tips = [graph.ggml_fasa_new_tips(self.n_kv, 2 * self.n_tip, heads.n_head_kv, 1) for _ in range(self.n)]
        for tips in self.tips:
            graph.clear(tips)
        self._fill(rng, types[0])

    @property
    def tips_bytes(self) -> int:
        """Bytes of the tips of one layer."""
        return self.graph.n_bytes(self.tips[0])

    def _check_memory(self) -> None:
        tip_bytes = self.heads.n_head_kv * (self.n_tip + 4)  # dims are filled up to eight
        n_bytes = self.n * self.n_kv * (self.kv_row_bytes + tip_bytes)
        graph = self.graph
        available = Available(graph.free_memory(), "the GPU's memory") if graph.on_gpu else memory.available()
        if n_bytes > available.n_bytes:
            raise FasaError(
                f"K, V and tips of {self.n} layers of {self.heads} with {self.n_kv} cells take {n_bytes} bytes of "
                f"memory, {available}: measure fewer cells or layers"
            )

    def _fill(self, rng: np.random.Generator, type_k: int) -> None:
        """Write random rows into K, V and the tips, the same in each layer."""
        graph, n_embd = self.graph, self.heads.n_head_kv * self.heads.n_embd_head
        n = min(self.n_kv, _N_FILL)
        rows, cells = graph.new(F32, n, n_embd), graph.tensor(np.arange(n))
        heads = graph.ggml_reshape_3d(rows, self.heads.n_embd_head, self.heads.n_head_kv, n)
        results = [graph.ggml_set_rows(cache, rows, cells) for cache in (*self.k, *self.v)]
        results += [graph.ggml_fasa_store(tips, heads, self.dims, self.ranges, cells, type_k) for tips in self.tips]
        plan = graph.plan(*results)
        for start in range(0, self.n_kv, n):
            graph.write(cells, min(start, self.n_kv - n) + np.arange(n))
            graph.write(rows, rng.standard_normal((n, n_embd), np.float32))
            graph.compute(plan)


@dataclass(frozen=True)
class _Op:
    row: OpRow
    results: list[int]  # a tensor for each layer
    plan: int


def _ops(layers: _Layers, budgets: Sequence[int], n_threads: int) -> Iterator[_Op]:
    """Make the ops that are measured on the layers, stock first."""
    graph, heads, mask, q = layers.graph, layers.heads, layers.mask, layers.q
    scale = heads.n_embd_head**-0.5
    shape = (heads.n_embd_head, heads.n_head_kv, layers.n_kv)

    def caches() -> Iterator[tuple[int, int]]:
        # new tensors each time: ggml-cuda knows a graph that it has recorded by the first of its nodes
        for k, v in zip(layers.k, layers.v, strict=True):
            yield graph.ggml_reshape_3d(k, *shape), graph.ggml_reshape_3d(v, *shape)

    mask_bytes = graph.n_bytes(mask)

    def op(name: str, results: list[int], n_bytes: int, budget: int = 0) -> _Op:
        row = OpRow(
            op=name,
            n_head=heads.n_head,
            n_head_kv=heads.n_head_kv,
            n_embd_head=heads.n_embd_head,
            type_k=layers.type_k,
            type_v=layers.type_v,
            n_depth=layers.depth,
            budget=budget,
            n_tip=layers.n_tip if budget else 0,
            device=graph.device,
            n_threads=0 if graph.on_gpu else n_threads,
            n_layers=layers.n,
            n_bytes=n_bytes,
        )
        return _Op(row, results, graph.plan(*results))

    def attend(ids: Sequence[int | None], mask: int | None) -> list[int]:
        return [
            graph.ggml_fasa_attend(q, k, v, idx, mask, None, scale, 0.0)
            for (k, v), idx in zip(caches(), ids, strict=True)
        ]

    def cells_inside(tensor: int) -> int:
        return graph.ggml_permute(tensor, 0, 2, 1, 3)

    dense_bytes = layers.depth * layers.kv_row_bytes + mask_bytes
    flash = [
        graph.ggml_flash_attn_ext(cells_inside(q), cells_inside(k), cells_inside(v), mask, scale, 0.0, 0.0)
        for k, v in caches()
    ]
    yield op("flash_attn_ext", flash, dense_bytes)
    yield op("exact", attend([None] * layers.n, mask), dense_bytes)

    first, last = np.arange(FasaConfig.n_sink), layers.depth - 1 - np.arange(FasaConfig.n_recent)
    for budget in budgets:
        n_fac = min(budget, layers.depth)
        forced = graph.tensor(np.concatenate((first, last))[None, :n_fac].astype(np.int32))
        ids = [
            graph.ggml_fasa_select(q, tips, layers.dims, layers.ranges, mask, forced, heads.n_head_kv, n_fac, scale)
            for tips in layers.tips
        ]
        given = graph.new(I32, 1, heads.n_head_kv, n_fac)
        ids_bytes, kv_bytes = graph.n_bytes(given), n_fac * layers.kv_row_bytes
        select_bytes = layers.tips_bytes + mask_bytes + ids_bytes
        yield op("fasa", attend(ids, None), select_bytes + kv_bytes, budget)
        yield (select := op("fasa_select", ids, select_bytes, budget))
        graph.compute(select.plan)
        graph.write(given, graph.read(ids[0], np.int32))
        yield op("fasa_attend", attend([given] * layers.n, None), ids_bytes + kv_bytes, budget)
