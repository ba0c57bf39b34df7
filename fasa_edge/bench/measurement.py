"""``measure`` and ``measure_ops``: what ``fasa-edge bench`` prints."""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from fasa_edge.bench import models, ops
from fasa_edge.bench.geometry import Geometry, Heads, find_geometry, find_heads
from fasa_edge.bench.models import BenchRow
from fasa_edge.bench.ops import OpRow
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
    n_repetitions: int = N_REPETITIONS,
    budgets: Sequence[int] = (),
    n_tip: int | None = None,
    fill: str | None = None,
    n_ctx: int = 0,
    progress: Progress = lambda done, total: None,
    **options: Any,
) -> list[BenchRow]:
    """Measure decoding speed at several depths: stock with and without flash attention, FASA's kernel, FASA.

    Args:
        model: a GGUF with a FASA profile; or None.
        geometry: in its place random weights, with the geometry of a model in
            :data:`fasa_edge.bench.geometry.GEOMETRIES` or another.
        n_layers: of the geometry, in place of its own.
        weight_type: of the geometry's weights, a name in :data:`fasa_edge.runtime.capi.CACHE_TYPES`; None: q4_0.
        depths: tokens in the cache, in any order.
        n_gen: tokens decoded in each repetition.
        n_repetitions: rounds at each depth.
        budgets: of FASA, in cells; none for the model's own.
        n_tip: chunks scored per KV head; None for the model's own.
        fill: how the cache gets its tokens, one of :data:`fasa_edge.bench.models.FILLS`; None: evaluated for a model,
            random numbers for a geometry, which take seconds.
        n_ctx: cells of the context; 0: as many as are needed.
        progress: called with the steps done and those to do.
        options: other arguments of :class:`fasa_edge.Llama`.

    Returns:
        For each depth, ascending, a row of each method, FASA's for each budget. Warns where FASA ran dense.

    Raises:
        FasaError: both or none of ``model`` and ``geometry`` are given, or an argument of one with the other; the model
            has no profile; a depth does not fit the context, or the contexts memory.
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
    options = {"verbose": False} | options | {"n_ctx": n_ctx or max(depths) + n_gen, "fasa_n_tip": n_tip}
    given = (depths, n_gen, n_repetitions, budgets)
    if model is not None:
        return _measure(os.fspath(model), *given, fill or "prefill", progress, options)
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
    n_repetitions: int,
    budgets: Sequence[int],
    fill: str,
    progress: Progress,
    options: dict[str, Any],
) -> list[BenchRow]:
    if fill == "random":
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
        rows = list(models.run(llm, depths, n_gen, n_repetitions, progress, budgets=budgets, fill=fill))
        for row in rows:
            if row.method == "fasa" and row.n_depth > 0 and not row.layers_sparse:
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
            [find_heads(heads) if isinstance(heads, str) else heads for heads in geometries],
            depths,
            budgets,
            n_threads or max(multiprocessing.cpu_count() // 2, 1),
            n_repetitions,
            type_k=type_k,
            type_v=type_v,
            n_tip=n_tip,
            n_layers=n_layers,
            on_gpu=on_gpu,
            progress=progress,
        )
    )
