"""The command ``fasa-edge bench``: of models, of geometries with random weights, and of ops alone."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fasa_edge.bench import models, ops
from fasa_edge.bench.geometry import GEOMETRIES, find_geometry, find_heads
from fasa_edge.bench.models import BenchRow
from fasa_edge.bench.ops import OpRow
from fasa_edge.bench.plot import draw_models, draw_ops
from fasa_edge.cli.common import (
    List,
    echo,
    json_option,
    load_model,
    load_options,
    model_file,
    print_json,
    progress_bars,
    setting_option,
    size_text,
)
from fasa_edge.errors import FasaError
from fasa_edge.io.figure import new_figure, to_png
from fasa_edge.io.output import check_outputs, write_bytes
from fasa_edge.io.split import model_files
from fasa_edge.io.temporary import work_folder
from fasa_edge.runtime import capi
from fasa_edge.runtime.fit import without_weights

import click
from tabulate import tabulate

_N_BATCH_FILLED = 32
"""Where no prompt is read: without flash attention, a batch takes memory for its tokens times all cells."""


@click.command(name="bench")
@click.argument("model", type=model_file, required=False)
@click.option(
    "--geometry",
    "names",
    type=List(str),
    metavar="NAME,...",
    help=f"Random weights in place of MODEL: {', '.join(GEOMETRIES)}. With --op also heads, as 32/8x64.",
)
@click.option(
    "--layers",
    "n_layers",
    type=click.IntRange(1),
    help="Of the geometry; with --op, of a sample.  [default: all; with --op 1 GiB of K and V]",
)
@click.option(
    "--type", "weight_type", type=click.Choice(capi.CACHE_TYPES), default="q4_0", help="Of the geometry's weights."
)
@click.option("--op", is_flag=True, help="Measure the attention ops alone, in a geometry's layers.")
@click.option(
    "-d",
    "--n-depth",
    "depths",
    type=List(int),
    metavar="N,...",
    help="Tokens in the cache.  [default: 0,2048,7168; with --op 32768]",
)
@click.option(
    "--fill",
    type=click.Choice(models.FILLS),
    help="How they come there.  [default: prefill; for a geometry random, which takes seconds]",
)
@click.option("-n", "--n-gen", type=click.IntRange(1), default=32, help="Tokens decoded in each repetition.")
@click.option("-r", "--repetitions", type=click.IntRange(1), default=5, help="Rounds at each depth.")
@setting_option(
    "budget", "--budget", "budgets", type=List(int), metavar="N,...", default="the model's own; with --op 1024"
)
@setting_option("n_tip", default="the model's own")
@click.option("-o", "--output", "fmt", type=click.Choice(["md", "json"]), default="md", help="Format of the table.")
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="PNG",
    help="Draw tokens/s over depth; with --op, time over cells.",
)
@click.option("-f", "--force", is_flag=True, help="Replace an existing PNG.")
@load_options
@json_option
def command(
    model: str | None,
    names: list[str] | None,
    op: bool,
    fmt: str,
    plot: Path | None,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure decoding speed at several depths, all methods interleaved.

    Of MODEL, or of a model with the geometry of a known one and random weights: stock with and without flash attention,
    FASA's kernel over all cells (exact), FASA. Quantized V takes flash attention, so there is no stock without it then.

    With --op, the attention of one layer alone: stock FLASH_ATTN_EXT, the exact kernel, FASA, and its two ops; with
    the bytes that each must move, and its time over what reading them takes on this machine. On the GPU with -ngl 1.
    """
    if op and (model is not None or not names):
        raise click.UsageError("--op takes no MODEL but a --geometry")
    if not op and (model is None) == (names is None):
        raise click.UsageError("give either a MODEL or a --geometry")
    if names and options["profile"]:
        raise click.UsageError("--profile goes with MODEL: a --geometry has one of its own")
    inputs = model_files(Path(model)) if model else []
    inputs += [Path(options["profile"])] if options["profile"] else []
    if plot is not None:
        check_outputs([plot], inputs, force=force)
        new_figure(1, 1)  # that needs matplotlib, which had better be missed before hours of measurement
    measure, tabulated, draw = (_ops, _op_table, draw_ops) if op else (_models, _model_table, draw_models)
    with progress_bars() as progress:
        rows = list(measure(model or names, progress, **options))
    if as_json or fmt == "json":
        print_json([row.as_dict() for row in rows])
    else:
        echo(tabulate(map(tabulated, rows), headers="keys", tablefmt="github", disable_numparse=True))
    if plot is not None:  # last, so that nothing measured is lost if it cannot be written
        write_bytes(plot, [], to_png(draw(rows)), force=force)
        echo(f"drawn: {plot}", err=True)


def _ops(
    names: list[str],
    progress: Callable[[str, int, int], None],
    *,
    depths: list[int] | None,
    budgets: list[int] | None,
    repetitions: int,
    n_threads: int | None,
    n_tip: int | None,
    n_layers: int | None,
    type_k: str,
    type_v: str,
    n_gpu_layers: int,
    **_: Any,
) -> Iterator[OpRow]:
    return ops.run(
        [find_heads(name) for name in names],
        depths or [32768],
        budgets or [1024],
        n_threads or max(multiprocessing.cpu_count() // 2, 1),
        repetitions,
        type_k=type_k,
        type_v=type_v,
        n_tip=n_tip,
        n_layers=n_layers,
        on_gpu=n_gpu_layers != 0,
        progress=lambda done, total: progress("ops", done, total),
    )


def _models(
    source: str | list[str],
    progress: Callable[[str, int, int], None],
    *,
    weight_type: str,
    n_layers: int | None,
    depths: list[int] | None,
    fill: str | None,
    n_gen: int,
    n_ctx: int,
    **options: Any,
) -> Iterator[BenchRow]:
    depths = depths or [0, 2048, 7168]
    if min(depths) < 0:
        raise FasaError(f"depth {min(depths)}: choose 0 or more")
    options |= {"depths": depths, "n_gen": n_gen, "n_ctx": n_ctx or max(depths) + n_gen, "progress": progress}
    if isinstance(source, str):
        yield from _model(source, fill=fill or "prefill", **options)
        return
    from fasa_edge.bench.random_model import write_random_model  # gguf-py takes a third of a second to import

    for name, geometry in [(name, find_geometry(name)) for name in source]:
        geometry = replace(geometry, n_layer=n_layers or geometry.n_layer)
        with work_folder("fasa-edge") as folder:
            title = f"{name}-{n_layers}L" if n_layers else name
            model, options["profile"] = map(str, write_random_model(folder, title, geometry, weight_type))
            yield from _model(model, fill=fill or "random", **options)


def _model(
    path: str,
    *,
    depths: Sequence[int],
    n_gen: int,
    repetitions: int,
    budgets: list[int] | None,
    fill: str,
    n_tip: int | None,
    progress: Callable[[str, int, int], None],
    **options: Any,
) -> Iterator[BenchRow]:
    more = {"n_batch": _N_BATCH_FILLED} if fill == "random" else {}
    if options["n_gpu_layers"] == 0:
        types = [capi.cache_type(options[name]) for name in ("type_k", "type_v")]
        with without_weights(path) as weightless:
            if weightless:
                n_state = max(depths) if fill == "random" else 0
                models.check_memory(weightless, options["n_ctx"], *types, n_contexts=2, n_state=n_state)
    llm = load_model(path, fasa_n_tip=n_tip, **more, **options)
    report = lambda done, total: progress(Path(path).stem, done, total)  # noqa: E731
    try:
        for row in models.run(llm, depths, n_gen, repetitions, report, budgets=budgets or (), fill=fill):
            if row.method == "fasa" and row.n_depth > 0 and not row.layers_sparse:
                if row.n_depth < llm.fasa.stats().min_ctx or row.n_depth < 2 * row.budget:
                    why = "below its min_ctx: lower --budget, or set --override-kv fasa.min_ctx=int:1"
                else:
                    why = "in all layers: see fasa.n_dense_layers, and --verbose for other reasons"
                echo(f"note: FASA ran dense at depth {row.n_depth}, {why}", err=True)
            yield row
    finally:
        llm.close()


def _model_table(row: BenchRow) -> dict[str, object]:
    return {
        "model": row.model_filename,
        "size": size_text(row.model_size),
        "threads": row.n_threads,
        "method": row.method,
        "fa": int(row.flash_attn),
        "exact": int(row.exact),
        "budget": row.budget or "",
        "test": row.test,
        "t/s": f"{row.avg_ts:.2f} ± {row.stddev_ts:.2f}",
        "median t/s": f"{row.median_ts:.2f}",
        "x best dense": f"{row.ratio:.2f} ({row.ratio_min:.2f}-{row.ratio_max:.2f})",
        "KV read": f"{row.read_ratio:.2f}",
    }


def _op_table(row: OpRow) -> dict[str, object]:
    return {
        "op": row.op,
        "heads": row.heads,
        "K": row.type_k,
        "V": row.type_v,
        "threads": row.n_threads or row.device,
        "cells": row.n_depth,
        "budget": row.budget or "",
        "ms": f"{1e-6 * row.median_ns:.4f}",
        "range": f"{1e-6 * min(row.samples_ns):.4f}-{1e-6 * max(row.samples_ns):.4f}",
        "moves": size_text(row.n_bytes),
        "memory GB/s": f"{1e-9 * row.bandwidth:.1f}",
        "x floor": f"{row.floor_ratio:.2f}",
        "x flash_attn_ext": f"{row.ratio:.2f} ({row.ratio_min:.2f}-{row.ratio_max:.2f})",
    }
