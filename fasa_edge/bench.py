"""Decoding speed at several depths of context, dense and FASA interleaved in one run, in rows like llama-bench's."""

from __future__ import annotations

import ctypes
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fasa_edge._lib import llama_cpp
from fasa_edge.errors import FasaError
from fasa_edge.model import Llama

METHODS = ("dense", "fasa")


@dataclass
class BenchRow:
    """One method at one depth; names as in llama-bench's JSON where it has the field.

    Attributes:
        model_filename: the model.
        model_size: bytes of its weights.
        model_n_params: number of its weights.
        n_threads: threads that decoded.
        type_k: type of the K cache.
        type_v: type of the V cache.
        flash_attn: always on.
        n_prompt: always 0: only decoding is measured.
        n_gen: tokens decoded in each repetition.
        n_depth: tokens in the KV cache before them.
        method: "dense" or "fasa".
        budget: cells attended to in sparse layers; 0 for dense.
        samples_ns: nanoseconds of each repetition.
        samples_ts: tokens per second of each repetition.
        read_ratio: bytes that attention read over those that dense attention reads.
        layers_sparse: share of the attention layers that ran sparse.
        ratio: median, over the interleaved pairs, of dense time over this method's.
        ratio_min: least of them.
        ratio_max: greatest of them.
    """

    model_filename: str
    model_size: int
    model_n_params: int
    n_threads: int
    type_k: str
    type_v: str
    flash_attn: bool
    n_prompt: int
    n_gen: int
    n_depth: int
    method: str
    budget: int
    samples_ns: list[int] = field(default_factory=list)
    samples_ts: list[float] = field(default_factory=list)
    read_ratio: float = 1.0
    layers_sparse: float = 0.0
    ratio: float = 1.0
    ratio_min: float = 1.0
    ratio_max: float = 1.0

    @property
    def test(self) -> str:
        """llama-bench's name of the measurement, as ``tg32 @ d2048``."""
        return f"tg{self.n_gen} @ d{self.n_depth}" if self.n_depth else f"tg{self.n_gen}"

    @property
    def median_ts(self) -> float:
        """Median of the tokens per second."""
        return statistics.median(self.samples_ts)

    def as_dict(self) -> dict:
        """The row for JSON, with llama-bench's averages."""

        def spread(samples: Sequence[float]) -> float:
            return statistics.stdev(samples) if len(samples) > 1 else 0.0

        return asdict(self) | {
            "test": self.test,
            "median_ts": self.median_ts,
            "avg_ns": statistics.mean(self.samples_ns),
            "stddev_ns": spread(self.samples_ns),
            "avg_ts": statistics.mean(self.samples_ts),
            "stddev_ts": spread(self.samples_ts),
        }


def run(
    llm: Llama,
    depths: Sequence[int],
    n_gen: int,
    n_repetitions: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[BenchRow]:
    """Measure decoding at each depth: the cache is filled once, then both methods decode from it in turn.

    Args:
        llm: a model with a FASA profile.
        depths: tokens in the KV cache, in any order.
        n_gen: tokens decoded in a repetition.
        n_repetitions: pairs of measurements at each depth.
        progress: called with the steps done and those to do.

    Yields:
        For each depth a row of each method.

    Raises:
        FasaError: the model has no profile, or the context is too small for a depth.
    """
    if not llm.fasa.available:
        raise FasaError(f"{llm.model_path} has no FASA profile to measure: make one with `fasa-edge convert`")
    if min(depths) < 0 or n_gen < 1 or n_repetitions < 1:
        raise FasaError(f"depths {list(depths)}, {n_gen} tokens, {n_repetitions} repetitions: use positive numbers")
    if max(depths) + n_gen > llm.n_ctx():
        raise FasaError(
            f"depth {max(depths)} and {n_gen} tokens exceed the context of {llm.n_ctx()}: lower one or raise n_ctx"
        )

    # content does not matter for speed; llama-bench uses random tokens, too
    rng = random.Random(0)
    tokens = [rng.randrange(llm.n_vocab()) for _ in range(max(depths) + n_gen)]

    enabled = llm.fasa.settings["enabled"]
    llm.reset()
    n_past = 0
    n_done = 0
    try:
        for depth in sorted(set(depths)):
            _truncate(llm, n_past)
            llm.fasa.configure(enabled=False)
            _decode(llm, tokens[n_past:depth], llm.n_batch)
            n_past = depth

            rows = {method: _new_row(llm, depth, n_gen, method) for method in METHODS}
            for repetition in range(-1, n_repetitions):  # the first pair warms up
                for method, row in rows.items():
                    _truncate(llm, depth)
                    llm.fasa.configure(enabled=method == "fasa")
                    llm.fasa.reset_stats()
                    start = time.perf_counter_ns()
                    _decode(llm, tokens[depth : depth + n_gen], 1)
                    elapsed = time.perf_counter_ns() - start
                    if repetition < 0:
                        continue
                    row.samples_ns.append(elapsed)
                    row.samples_ts.append(1e9 * n_gen / elapsed)
                    stats = llm.fasa.stats()
                    n_layers = stats.n_layers_sparse + sum(stats.n_layers_dense.values())
                    row.read_ratio = stats.read_ratio
                    row.layers_sparse = stats.n_layers_sparse / n_layers if n_layers else 0.0
                n_done += 1
                progress(n_done, len(set(depths)) * (n_repetitions + 1))
            _compare(rows)
            yield from rows.values()
    finally:
        llm.fasa.configure(enabled=enabled)
        llm.reset()


def _compare(rows: dict[str, BenchRow]) -> None:
    for row in rows.values():
        ratios = [dense / own for dense, own in zip(rows["dense"].samples_ns, row.samples_ns, strict=True)]
        row.ratio, row.ratio_min, row.ratio_max = statistics.median(ratios), min(ratios), max(ratios)


def _new_row(llm: Llama, depth: int, n_gen: int, method: str) -> BenchRow:
    def type_name(ggml_type: int) -> str:
        return next(
            name[10:].lower()
            for name in dir(llama_cpp)
            if name.startswith("GGML_TYPE_") and getattr(llama_cpp, name) == ggml_type
        )

    return BenchRow(
        model_filename=Path(llm.model_path).name,
        model_size=llama_cpp.llama_model_size(llm.model),
        model_n_params=llama_cpp.llama_model_n_params(llm.model),
        n_threads=llm.n_threads,
        type_k=type_name(llm.context_params.type_k),
        type_v=type_name(llm.context_params.type_v),
        flash_attn=True,
        n_prompt=0,
        n_gen=n_gen,
        n_depth=depth,
        method=method,
        budget=llm.fasa.settings["budget"] if method == "fasa" else 0,
    )


def _truncate(llm: Llama, n_tokens: int) -> None:
    """Forget all but the first tokens."""
    if not llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(llm.ctx), 0, n_tokens, -1):
        raise FasaError(f"{llm.model_path}: its memory cannot forget its last tokens, so no depth can be held")


def _decode(llm: Llama, tokens: Sequence[int], n_batch: int) -> None:
    """Decode tokens after those in the cache, ``n_batch`` at a time, waiting for each batch."""
    for start in range(0, len(tokens), n_batch):
        batch = tokens[start : start + n_batch]
        array = (llama_cpp.llama_token * len(batch))(*batch)
        status = llama_cpp.llama_decode(
            llm.ctx,
            llama_cpp.llama_batch_get_one(ctypes.cast(array, ctypes.POINTER(llama_cpp.llama_token)), len(batch)),
        )
        if status != 0:
            raise FasaError(f"llama_decode returned {status} for {len(batch)} tokens: see llama.cpp's log")
        llama_cpp.llama_synchronize(llm.ctx)
