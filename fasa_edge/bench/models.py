"""Speed of reading and decoding at several depths of context, as llama-bench's rows: FASA against stock's attention.

Stock runs with flash attention and without: which is faster depends on the machine, and only the faster one is a fair
rival. FASA and its kernel over all cells ("exact") share a context. All are interleaved in one run; the ratio of a row
is the median over the rounds.
"""

from __future__ import annotations

import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

from fasa_edge.bench.cache_fill import StateLayout
from fasa_edge.bench.rounds import ratios, rounds
from fasa_edge.errors import FasaError
from fasa_edge.runtime import capi, memory, sequence
from fasa_edge.runtime.library import llama_cpp
from fasa_edge.runtime.llama import ROPE_ARGUMENTS, Llama, kv_bytes_per_cell

_N_WARM_UP = 4  # tokens until a GPU decodes as it will

FILLS = ("prefill", "random")
"""How the cache gets its tokens before those that are measured: evaluated, or random numbers in their place."""


@dataclass
class BenchRow:
    """One method at one depth; names as in llama-bench's JSON where it has the field.

    Attributes:
        model_filename: the model.
        model_size: bytes of its weights.
        model_n_params: number of its weights.
        n_threads: threads that computed.
        type_k: type of the K cache.
        type_v: type of the V cache.
        flash_attn: whether flash attention is on; always for FASA.
        n_prompt: tokens of a prompt read in each repetition, or 0.
        n_gen: tokens decoded in each repetition, or 0.
        n_depth: tokens in the KV cache before them.
        fill: how these came there, one of :data:`FILLS`.
        method: "dense": stock; "exact": FASA's kernel over all cells; "fasa".
        exact: whether layers that are dense run FASA's kernel.
        budget: cells that a decoded token attends to in sparse layers; 0 for the others.
        samples_ns: nanoseconds of each repetition.
        samples_ts: tokens per second of each repetition.
        read_ratio: bytes that attention read over those that dense attention reads.
        layers_sparse: share of the layers that ran sparse.
        layers_exact: share of the layers that attended to all cells with FASA's kernel.
        prompt_mass: thousandths of its attention that a token of a prompt was left with.
        ratio: median, over the interleaved rounds, of the faster dense method's time over this one's.
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
    fill: str
    method: str
    exact: bool
    budget: int
    samples_ns: list[int] = field(default_factory=list)
    samples_ts: list[float] = field(default_factory=list)
    read_ratio: float = 1.0
    layers_sparse: float = 0.0
    layers_exact: float = 0.0
    prompt_mass: int = 1000
    ratio: float = 1.0
    ratio_min: float = 1.0
    ratio_max: float = 1.0

    @property
    def work(self) -> str:
        """What is measured, as ``pp512`` or ``tg32``."""
        return f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"

    @property
    def test(self) -> str:
        """llama-bench's name of the measurement, as ``tg32 @ d2048``."""
        return f"{self.work} @ d{self.n_depth}" if self.n_depth else self.work

    @property
    def label(self) -> str:
        """The method, with what distinguishes it."""
        if self.method == "dense":
            return f"dense, {'' if self.flash_attn else 'no '}flash attention"
        mass = f", mass {self.prompt_mass}" if self.prompt_mass < 1000 else ""
        return self.method + (f", budget {self.budget}" if self.budget else mass)

    @property
    def median_ts(self) -> float:
        """Median of the tokens per second."""
        return statistics.median(self.samples_ts)

    @property
    def avg_ts(self) -> float:
        """Mean of the tokens per second."""
        return statistics.mean(self.samples_ts)

    @property
    def stddev_ts(self) -> float:
        """Standard deviation of the tokens per second."""
        return _stddev(self.samples_ts)

    def as_dict(self) -> dict:
        """The row for JSON, with llama-bench's averages."""
        return asdict(self) | {
            "test": self.test,
            "median_ts": self.median_ts,
            "avg_ns": statistics.mean(self.samples_ns),
            "stddev_ns": _stddev(self.samples_ns),
            "avg_ts": self.avg_ts,
            "stddev_ts": self.stddev_ts,
        }


def _stddev(samples: Sequence[float]) -> float:
    return statistics.stdev(samples) if len(samples) > 1 else 0.0


@dataclass(frozen=True)
class _Runner:
    """One way to attend; ``settings`` of FASA, None for stock."""

    method: str
    llm: llama_cpp.Llama
    flash_attn: bool
    settings: dict[str, Any] | None = None


@dataclass(frozen=True)
class _Work:
    """What is measured, as in llama-bench: a prompt that is read, or tokens decoded one by one; the other is 0."""

    n_prompt: int
    n_gen: int
    runners: list[_Runner]


def _stock(llm: Llama, flash_attn: bool) -> _Runner:
    """The same model without its profile, so that the library is stock llama.cpp."""
    stock = llama_cpp.Llama(
        llm.model_path,
        n_ctx=llm.n_ctx(),
        n_batch=llm.n_batch,
        n_ubatch=llm.context_params.n_ubatch,
        n_threads=llm.n_threads,
        n_threads_batch=llm.n_threads_batch,
        n_gpu_layers=llm.model_params.n_gpu_layers,
        type_k=llm.context_params.type_k,
        type_v=llm.context_params.type_v,
        **{name: getattr(llm.context_params, name) for name in ROPE_ARGUMENTS},
        kv_overrides={"fasa.version": 0},
        flash_attn=flash_attn,
        verbose=llm.verbose,
    )
    return _Runner("dense", stock, flash_attn)


def check_memory(model: int, n_ctx: int, type_k: int, type_v: int, n_contexts: int, n_state: int = 0) -> None:
    """Refuse what would make the system run out of memory, which ends processes without a word.

    Args:
        model: ``llama_model *``, its weights loaded or not. Every context is counted with weights of its own, because
            the CPU backend makes a copy of them in another layout.
        n_ctx: cells of a context.
        type_k: ``enum ggml_type`` of K.
        type_v: the same for V.
        n_contexts: still to be made.
        n_state: tokens of a saved state besides.

    Raises:
        FasaError: there is too little.
    """
    per_cell = kv_bytes_per_cell(model, type_k, type_v)
    needed = int(n_contexts * (llama_cpp.llama_model_size(model) + n_ctx * per_cell) + n_state * per_cell)
    if needed > (available := memory.available()).n_bytes:
        raise FasaError(
            f"{needed} more bytes of memory are needed for {n_contexts} contexts of {n_ctx} cells, FASA's and stock's, "
            f"and {available}: lower the depth, or take fewer layers or a quantized cache"
        )


def _stocks(llm: Llama, n_state: int) -> list[_Runner]:
    """Stock with flash attention and, if V is not quantized and memory allows, without.

    Args:
        llm: the model that they shall run.
        n_state: tokens of a saved state that memory must hold besides.

    Raises:
        FasaError: there is too little memory for the first.
    """
    types = llm.context_params.type_k, llm.context_params.type_v
    check = partial(check_memory, llm.model, llm.n_ctx(), *types, 1)
    if on_cpu := llm.model_params.n_gpu_layers == 0:
        check(n_state)
    stocks = [_stock(llm, flash_attn=True)]
    if capi.type_name(types[1]) not in ("f32", "f16", "bf16"):
        return stocks  # llama.cpp transposes no quantized V
    n_head = max(layer.n_head for layer in capi.layer_geometry(llm.model))
    logits = 2 * 4 * llm.n_ctx() * llm.context_params.n_ubatch * n_head  # attention's, and their softmax
    try:
        if on_cpu:
            check(n_state + ceil(logits / kv_bytes_per_cell(llm.model, *types)))
    except FasaError as error:
        warnings.warn(f"stock without flash attention is left out: {error}", stacklevel=3)
        return stocks
    return [*stocks, _stock(llm, flash_attn=False)]


def run(
    llm: Llama,
    depths: Sequence[int],
    n_gen: int,
    n_repetitions: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    n_prompts: Sequence[int] = (),
    budgets: Sequence[int] = (),
    fill: str = "prefill",
) -> Iterator[BenchRow]:
    """Measure reading and decoding at each depth: the caches are filled once, then all methods go on from them in turn.

    Args:
        llm: a model with a FASA profile. It is loaded again as stock with flash attention and, unless V is quantized or
            memory is short, without; the weights are shared where the file is mapped into memory. Its ``progress`` is
            told of the prefills of all.
        depths: tokens in the KV cache, in any order.
        n_gen: tokens decoded in a repetition; 0: decoding is not measured.
        n_repetitions: rounds of measurements at each depth.
        progress: called with the steps done and those to do.
        n_prompts: tokens of a prompt read in a repetition, in batches of the model's size, with the logits of the last
            of each batch; in any order. None: reading is not measured.
        budgets: of FASA; none for that in force.
        fill: one of :data:`FILLS`. Random numbers take no prefill, but a memory that is one plain KV cache; for any
            other it warns and evaluates tokens.

    Yields:
        For each depth a row of each method, first of each prompt, then of decoding, FASA's for each budget there.

    Raises:
        FasaError: the model has no profile, the context is too small for a depth, or memory for the rivals.
        SchemaError: a budget is out of range.
    """
    if not llm.fasa.available:
        raise FasaError(f"{llm.model_path} has no FASA profile to measure: make one with `fasa-edge convert`")
    if min(depths) < 0 or n_gen < 0 or min(n_prompts, default=1) < 1 or n_repetitions < 1:
        raise FasaError(
            f"depths {list(depths)}, prompts of {list(n_prompts)}, {n_gen} tokens, {n_repetitions} repetitions: "
            "use positive numbers"
        )
    if not (n_gen or n_prompts):
        raise FasaError("no tokens to decode and no prompts: give one of both to measure")
    if fill not in FILLS:
        raise FasaError(f"fill = {fill!r}: choose from {', '.join(FILLS)}")
    n_longest = max((n_gen, *n_prompts))
    if max(depths) + n_longest > llm.n_ctx():
        raise FasaError(
            f"depth {max(depths)} and {n_longest} tokens exceed the context of {llm.n_ctx()}: lower one or raise n_ctx"
        )

    # content does not matter for speed; llama-bench uses random tokens, too
    rng = random.Random(0)
    tokens = [rng.randrange(llm.n_vocab()) for _ in range(max(depths) + n_longest)]

    settings: dict[str, Any] = llm.fasa.settings
    if fill == "random" and _layout(llm, tokens) is None:
        warnings.warn(f"{llm.model_path}: its memory is not one plain KV cache, so tokens are evaluated", stacklevel=2)
        fill = "prefill"
    stocks = _stocks(llm, n_state=max(depths) if fill == "random" else 0)
    exact = settings["exact"]
    dense = [*stocks, _Runner("exact", llm, True, {"enabled": False, "exact": True})]
    reading = {"enabled": True, "exact": exact, "prompt_mass": settings["prompt_mass"]}
    readers = [*dense, _Runner("fasa", llm, True, reading)]
    works = [_Work(n_prompt, 0, readers) for n_prompt in sorted(set(n_prompts))]
    if n_gen:
        own = settings["budget"], settings["budget_ctx"]
        sparse = [
            _Runner("fasa", llm, True, {"enabled": True, "exact": exact, "budget": budget, "budget_ctx": grows})
            for budget, grows in [(budget, 0) for budget in sorted(set(budgets))] or [own]
        ]
        works.append(_Work(0, n_gen, dense + sparse))
    models = [*(stock.llm for stock in stocks), llm]
    n_steps = len(set(depths)) * len(works) * (1 + n_repetitions)
    n_past = n_done = 0
    try:
        llm.reset()
        for depth in sorted(set(depths)):
            if fill == "random":
                _fill(models, depth, tokens)
            else:
                for model in models:
                    _cut(model, n_past)
                    read = llm.progress or (lambda done, total: None)
                    sequence.decode(model.ctx, tokens[n_past:depth], model.n_batch, progress=read)
            n_past = depth

            for work in works:
                pairs = [(runner, _new_row(runner, work, depth, fill)) for runner in work.runners]
                for counts, turn in rounds(pairs, 1, n_repetitions):
                    for runner, row in turn:
                        _measure(runner, work, tokens, depth, row if counts else None)
                    n_done += 1
                    progress(n_done, n_steps)
                rows = [row for _, row in pairs]
                _compare(rows)
                yield from rows
    finally:
        llm.reset()
        llm.fasa.configure(**{name: settings[name] for name in ("enabled", "exact", "budget", "budget_ctx")})
        for stock in stocks:
            stock.llm.close()


def _layout(llm: llama_cpp.Llama, tokens: Sequence[int]) -> StateLayout | None:
    """Of the states of a model, whose cache is emptied."""
    _cut(llm, 0)
    sequence.decode(llm.ctx, tokens[:1])
    layout = StateLayout.of(llm.ctx)
    _cut(llm, 0)
    return layout


def _fill(models: Sequence[llama_cpp.Llama], depth: int, tokens: Sequence[int]) -> None:
    """Give all models the same random keys and values; in turn from one state, which may be large."""
    state = None
    for model in models:
        layout = _layout(model, tokens)
        if depth == 0:
            continue
        assert layout is not None  # or tokens are evaluated
        if state is None:
            state = layout.random_state(depth)
        else:
            layout.adopt(state, depth)
        sequence.restore(model.ctx, state)


def _measure(runner: _Runner, work: _Work, tokens: Sequence[int], depth: int, row: BenchRow | None) -> None:
    """Read or decode tokens after the first ``depth`` and add the sample to the row.

    The first ones are decoded twice: with other settings llama.cpp makes another graph, which a GPU runs launch by
    launch before it records it (``ggml_backend_cuda_graph_compute``). Those of prompts are never recorded.
    """
    llm = runner.llm
    tokens = tokens[depth : depth + (work.n_prompt or work.n_gen)]
    if runner.settings:
        llm.fasa.configure(**runner.settings)
    _cut(llm, depth)
    if work.n_gen:
        sequence.decode(llm.ctx, tokens[:_N_WARM_UP], 1, n_logits=1)
        _cut(llm, depth)
    if runner.settings:
        llm.fasa.reset_stats()
        capi.set_prompt(llm.ctx, bool(work.n_prompt))  # or a short one runs sparse
    try:
        start = time.perf_counter_ns()
        sequence.decode(llm.ctx, tokens, llm.n_batch if work.n_prompt else 1, n_logits=1)
        elapsed = time.perf_counter_ns() - start
    finally:
        if runner.settings:
            capi.set_prompt(llm.ctx, False)
    if row is None:
        return
    row.samples_ns.append(elapsed)
    row.samples_ts.append(1e9 * len(tokens) / elapsed)
    if runner.settings:
        stats = llm.fasa.stats()
        row.read_ratio = stats.read_ratio
        n_layers = stats.n_layers_sparse + sum(stats.n_layers_dense.values())
        row.layers_sparse, row.layers_exact = stats.n_layers_sparse / n_layers, stats.n_layers_exact / n_layers


def _compare(rows: Sequence[BenchRow]) -> None:
    rival = max((row for row in rows if row.method == "dense"), key=lambda row: row.median_ts)
    for row in rows:
        row.ratio, row.ratio_min, row.ratio_max = ratios(rival.samples_ns, row.samples_ns)


def _new_row(runner: _Runner, work: _Work, depth: int, fill: str) -> BenchRow:
    llm, settings = runner.llm, runner.settings or {}
    return BenchRow(
        model_filename=Path(llm.model_path).name,
        model_size=llama_cpp.llama_model_size(llm.model),
        model_n_params=llama_cpp.llama_model_n_params(llm.model),
        n_threads=llm.n_threads_batch if work.n_prompt else llm.n_threads,
        type_k=capi.type_name(llm.context_params.type_k),
        type_v=capi.type_name(llm.context_params.type_v),
        flash_attn=runner.flash_attn,
        n_prompt=work.n_prompt,
        n_gen=work.n_gen,
        n_depth=depth,
        fill=fill,
        method=runner.method,
        exact=settings.get("exact", False),
        budget=settings.get("budget", 0),
        prompt_mass=settings.get("prompt_mass", 1000),
    )


def _cut(llm: llama_cpp.Llama, n_tokens: int) -> None:
    """Forget all but the first tokens."""
    if not sequence.cut(llm.ctx, n_tokens):
        raise FasaError(f"{llm.model_path}: its memory cannot forget its last tokens, so no depth can be held")
