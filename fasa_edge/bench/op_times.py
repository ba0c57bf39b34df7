"""What the rows of all ops have in common."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from fasa_edge.bench.caches import Caches
from fasa_edge.bench.geometry import Heads
from fasa_edge.runtime.ggml import Graph


@dataclass(kw_only=True)
class OpTimes:
    """One op at one depth; times are those of one layer.

    Attributes:
        op: its name.
        n_head: query heads.
        n_head_kv: KV heads.
        n_embd_head: dims of a head.
        type_k: type of K.
        type_v: type of V.
        n_depth: cells in use.
        device: what computed.
        n_threads: threads that computed; 0 on a GPU.
        n_layers: layers of a sample.
        samples_ns: nanoseconds of each repetition.
    """

    op: str
    n_head: int
    n_head_kv: int
    n_embd_head: int
    type_k: str
    type_v: str
    n_depth: int
    device: str
    n_threads: int
    n_layers: int
    samples_ns: list[float] = field(default_factory=list)

    @property
    def heads(self) -> str:
        """The heads as ``--geometry`` takes them."""
        return str(Heads(self.n_head, self.n_head_kv, self.n_embd_head))

    @property
    def label(self) -> str:
        """The op, with what distinguishes it."""
        return self.op

    @property
    def median_ns(self) -> float:
        """Median of the times, in nanoseconds."""
        return statistics.median(self.samples_ns)

    def measure(self, graph: Graph, plan: int, counts: bool) -> None:
        """Compute the op in all layers; keep the time of one if it counts."""
        start = time.perf_counter_ns()
        graph.compute(plan)
        elapsed = time.perf_counter_ns() - start
        if counts:
            self.samples_ns.append(elapsed / self.n_layers)

    def as_dict(self) -> dict:
        """Return the row for JSON."""
        return asdict(self) | {
            "median_ns": self.median_ns,
            "min_ns": min(self.samples_ns),
            "max_ns": max(self.samples_ns),
        }


def where(caches: Caches, n_threads: int) -> dict[str, Any]:
    """Return the fields of :class:`OpTimes` that say on what an op is measured."""
    heads, graph = caches.heads, caches.graph
    return {
        "n_head": heads.n_head,
        "n_head_kv": heads.n_head_kv,
        "n_embd_head": heads.n_embd_head,
        "type_k": caches.type_k,
        "type_v": caches.type_v,
        "n_depth": caches.depth,
        "device": graph.device,
        "n_threads": 0 if graph.on_gpu else n_threads,
        "n_layers": caches.n,
    }
