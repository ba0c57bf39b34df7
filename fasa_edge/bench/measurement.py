"""``measure``, ``measure_ops`` and ``measure_prompt_ops``: what ``fasa-edge bench`` prints."""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from fasa_edge.bench import models, ops, prompt_ops
from fasa_edge.bench.geometry import Geometry, Heads, find_geometry, find_heads
from fasa_edge.bench.models import BenchRow
from fasa_edge.bench.ops import OpRow
from fasa_edge.bench.prompt_ops import PromptOpRow
from fasa_edge.errors import FasaError
from fasa_edge.io.temporary import work_folder
from fasa_edge.runtime import capi
from fasa_edge.runtime.fit import without_weights
from fasa_edge.runtime.llama import Llama

DEPTHS = (0, 2048, 7168)
N_GEN = 32
N_REPETITIONS = 5
WEIGHT_TYPE = "q4_0"
OP_DEPTHS = (32768,)
OP_BUDGETS = (1024,)
PROMPT_OP_DEPTHS = (8192,)

_N_BATCH_FILLED = 32
"""Where no prompt is read: without flash attention, a batch takes memory for its tokens times all cells."""

Progress = Callable[[int, int], None]


def measure(
    model: str | os.PathLike[str] | None = None,
    *,
    geometry: str | Geometry | None = None,
    n_layers: int | None = None,
    weight_type: str | None = None,
    depths: Sequence[int] = DEPTHS,
    n_gen: int = N_GEN,
    n_prompts: Sequence[int] = (),
    n_repetitions: int = N_REPETITIONS,
    budgets: Sequence[int] = (),
    n_tip: int | None = None,
    fill: str | None = None,
    n_ctx: int = 0,
    progress: Progress = lambda done, total: None,
    read_progress: Progress | None = None,
    **options: Any,
) -> list[BenchRow]:
    """Measure speed at several depths: stock with and without flash attention, FASA's kernel over all cells, FASA.

    Args:
        model: a GGUF with a FASA profile; or None.
        geometry: in its place random weights, with the geometry of a model in
            :data:`fasa_edge.bench.geometry.GEOMETRIES` or another.
        n_layers: of the geometry, in place of its own.
        weight_type: of the geometry's weights, a name in :data:`fasa_edge.runtime.capi.CACHE_TYPES`; None: q4_0.
        depths: tokens in the cache, in any order.
        n_gen: tokens decoded in each repetition; 0: only prompts.
        n_prompts: tokens of a prompt read in each repetition, after those in the cache; none: only decoding.
        n_repetitions: rounds at each depth.
        budgets: of FASA, in cells; none for the model's own.
        n_tip: chunks scored per KV head; None for the model's own.
        fill: how the cache gets its tokens, one of :data:`fasa_edge.bench.models.FILLS`; None: evaluated for a model
            without prompts, random numbers for a geometry or with them, which take seconds.
        n_ctx: cells of the context; 0: as many as are needed.
        progress: called with the steps done and those to do.
        read_progress: called with the tokens of a cache's prefill that are read and those to read.
        options: other arguments of :class:`fasa_edge.Llama`. With prompts, ``n_threads_batch`` is ``n_threads`` unless
            given, as in llama-bench: reading and decoding are of the same threads.

    Returns:
        For each depth, ascending, a row of each method, those of prompts first, and in decoding FASA's for each budget.
        Warns where FASA ran dense in decoding.

    Raises:
        FasaError: both or none of ``model`` and ``geometry`` are given, or an argument of one with the other; the model
            has no profile; there is nothing to measure; a depth does not fit the context, or the contexts memory.
        SchemaError: a budget is out of range.
    """
    if (model is None) == (geometry is None):
        raise FasaError("give either a model or a geometry to measure")
    if model is not None and (n_layers, weight_type) != (None, None):
        raise FasaError("n_layers and weight_type are of a geometry: a model has its own")
    if geometry is not None and options.get("fasa_profile") is not None:
        raise FasaError("fasa_profile goes with a model: a geometry has one of its own")
    if not depths or min(depths) < 0:
        raise FasaError(f"depth {min(depths, default=None)}: choose 0 or more")
    n_most = max(depths) + max((n_gen, *n_prompts))
    options = {"verbose": False} | options | {"n_ctx": n_ctx or n_most, "fasa_n_tip": n_tip}
    options["progress"] = read_progress
    if n_prompts:
        options["n_threads"] = options.get("n_threads") or _half_of_cpus()
        options["n_threads_batch"] = options.get("n_threads_batch") or options["n_threads"]
    given = (depths, n_gen, n_prompts, n_repetitions, budgets)
    if model is not None:
        return _measure(os.fspath(model), *given, fill or ("random" if n_prompts else "prefill"), progress, options)
    assert geometry is not None
    from fasa_edge.bench.random_model import write_random_model  # gguf-py takes a third of a second to import

    name, found = (geometry, find_geometry(geometry)) if isinstance(geometry, str) else (geometry.arch, geometry)
    with work_folder("fasa-edge") as folder:
        title = f"{name}-{n_layers}L" if n_layers else name
        found = replace(found, n_layer=n_layers or found.n_layer)
        path, profile = write_random_model(folder, title, found, weight_type or WEIGHT_TYPE)
        return _measure(str(path), *given, fill or "random", progress, options | {"fasa_profile": str(profile)})


def _measure(
    path: str,
    depths: Sequence[int],
    n_gen: int,
    n_prompts: Sequence[int],
    n_repetitions: int,
    budgets: Sequence[int],
    fill: str,
    progress: Progress,
    options: dict[str, Any],
) -> list[BenchRow]:
    if fill == "random" and not n_prompts:
        options.setdefault("n_batch", _N_BATCH_FILLED)
    if not options.get("n_gpu_layers"):
        f16 = capi.cache_type("f16")
        type_k, type_v = (f16 if options.get(name) is None else options[name] for name in ("type_k", "type_v"))
        with without_weights(path) as weightless:
            if weightless:
                n_state = max(depths) if fill == "random" else 0
                models.check_memory(weightless, options["n_ctx"], type_k, type_v, n_contexts=2, n_state=n_state)
    llm = Llama(path, **options)
    try:
        found = models.run(llm, depths, n_gen, n_repetitions, progress, n_prompts=n_prompts, budgets=budgets, fill=fill)
        rows = list(found)
        for row in rows:
            if row.method == "fasa" and row.n_gen and row.n_depth > 0 and not row.layers_sparse:
                if row.n_depth < llm.fasa.stats().min_ctx or row.n_depth < 2 * row.budget:
                    why = "below its min_ctx: take a smaller budget, or set the key fasa.min_ctx to 1"
                else:
                    why = "in all layers: see fasa.n_dense_layers, and llama.cpp's log for other reasons"
                warnings.warn(f"{row.model_filename}: FASA ran dense at depth {row.n_depth}, {why}", stacklevel=3)
        return rows
    finally:
        llm.close()


def measure_ops(
    geometries: Sequence[str | Heads],
    *,
    depths: Sequence[int] = OP_DEPTHS,
    budgets: Sequence[int] = OP_BUDGETS,
    n_repetitions: int = N_REPETITIONS,
    n_threads: int | None = None,
    type_k: str = "f16",
    type_v: str = "f16",
    n_tip: int | None = None,
    n_layers: int | None = None,
    on_gpu: bool = False,
    progress: Progress = lambda done, total: None,
) -> list[OpRow]:
    """Measure the attention of one layer and one token alone, on heads of some geometries.

    Args:
        geometries: names as of :func:`fasa_edge.bench.geometry.find_heads`, or heads.
        n_threads: of the CPU backend; None: half of the CPUs.
        depths: cells in use; all else as of :func:`fasa_edge.bench.ops.run`.
        budgets: cells that FASA attends to.
        n_repetitions: rounds of measurements.
        type_k: type of K, a name in :data:`fasa_edge.runtime.capi.CACHE_TYPES`.
        type_v: the same for V.
        n_tip: chunks scored per KV head; None for :func:`fasa_edge.config.default_n_tip`.
        n_layers: layers of a sample; None for as many as 1 GiB of K and V has.
        on_gpu: on the first GPU, not on the CPU.
        progress: called with the rounds done and those to do.

    Returns:
        For each geometry and depth a row of each op: stock, the exact kernel, and FASA's for each budget.

    Raises:
        FasaError: a geometry is unknown, a number out of range, or there is too little memory or no GPU.
    """
    return list(
        ops.run(
            _heads(geometries),
            depths,
            budgets,
            n_threads or _half_of_cpus(),
            n_repetitions,
            type_k=type_k,
            type_v=type_v,
            n_tip=n_tip,
            n_layers=n_layers,
            on_gpu=on_gpu,
            progress=progress,
        )
    )


def measure_prompt_ops(
    geometries: Sequence[str | Heads],
    n_prompts: Sequence[int],
    *,
    depths: Sequence[int] = PROMPT_OP_DEPTHS,
    n_repetitions: int = N_REPETITIONS,
    n_threads: int | None = None,
    type_k: str = "f16",
    type_v: str = "f16",
    n_layers: int | None = None,
    progress: Progress = lambda done, total: None,
) -> list[PromptOpRow]:
    """Measure the attention of one layer and a micro-batch of a prompt alone, on the CPU.

    Args:
        geometries: names as of :func:`fasa_edge.bench.geometry.find_heads`, or heads.
        n_prompts: tokens of a micro-batch, the last of the cells.
        n_threads: of the CPU backend; None: half of the CPUs.
        depths: cells in use; all else as of :func:`fasa_edge.bench.prompt_ops.run`.
        n_repetitions: rounds of measurements.
        type_k: type of K, a name in :data:`fasa_edge.runtime.capi.CACHE_TYPES`.
        type_v: the same for V.
        n_layers: layers of a sample; None for fewer than of one token, and one from 32 tokens on.
        progress: called with the rounds done and those to do.

    Returns:
        For each geometry, depth and micro-batch a row of each op: stock with flash attention and, if V is not
        quantized and memory allows, without; the exact kernel.

    Raises:
        FasaError: a geometry is unknown, a number out of range, a micro-batch longer than a depth, or there is too
            little memory.
    """
    return list(
        prompt_ops.run(
            _heads(geometries),
            n_prompts,
            depths,
            n_threads or _half_of_cpus(),
            n_repetitions,
            type_k=type_k,
            type_v=type_v,
            n_layers=n_layers,
            progress=progress,
        )
    )


def _heads(geometries: Sequence[str | Heads]) -> list[Heads]:
    return [find_heads(heads) if isinstance(heads, str) else heads for heads in geometries]


def _half_of_cpus() -> int:
    return max(multiprocessing.cpu_count() // 2, 1)  # as llama_cpp.Llama
