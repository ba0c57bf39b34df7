"""The command ``fasa-edge bench``: of models, of geometries with random weights, and of ops alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fasa_edge.bench import BenchRow, OpRow, PromptOpRow, measure, measure_ops, measure_prompt_ops, measurement
from fasa_edge.bench.geometry import GEOMETRIES, find_geometry
from fasa_edge.bench.models import FILLS
from fasa_edge.bench.plot import draw_models, draw_ops
from fasa_edge.bench.prompt_ops import STOCK
from fasa_edge.cli.common import (
    List,
    Report,
    check_results,
    force_option,
    json_option,
    load_arguments,
    load_options,
    model_file,
    output_option,
    plot_option,
    print_result,
    progress_bars,
    refuse_ignored,
    setting_option,
    size_text,
    write_plot,
)
from fasa_edge.io.split import model_files
from fasa_edge.runtime import capi
from fasa_edge.runtime.llama import ROPE_ARGUMENTS
from fasa_edge.runtime.sequence import READING

import click
from tabulate import tabulate

_NOT_OF_OPS = (
    *("weight_type", "n_gen", "fill", "n_ctx", "exact", "overrides", "verbose", "profile"),
    *ROPE_ARGUMENTS,
)
_NOT_OF_PROMPT_OPS = ("budgets", "n_tip", "n_gpu_layers")


def _numbers(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))


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
    "--type",
    "weight_type",
    type=click.Choice(capi.CACHE_TYPES),
    help=f"Of the geometry's weights.  [default: {measurement.WEIGHT_TYPE}]",
)
@click.option("--op", is_flag=True, help="Measure the attention ops alone, in a geometry's layers.")
@click.option(
    "-d",
    "--n-depth",
    "depths",
    type=List(int),
    metavar="N,...",
    help=f"Tokens in the cache.  [default: {_numbers(measurement.DEPTHS)}; with --op "
    f"{_numbers(measurement.OP_DEPTHS)}, and with -p {_numbers(measurement.PROMPT_OP_DEPTHS)}]",
)
@click.option(
    "--fill",
    type=click.Choice(FILLS),
    help="How they come there.  [default: prefill; for a geometry, or with -p, random, which takes seconds]",
)
@click.option(
    "-p",
    "--n-prompt",
    "n_prompts",
    type=List(int),
    metavar="N,...",
    help="Also read prompts of N tokens after those in the cache; -t is of both then. With --op, measure N tokens that "
    "attend at once, the last of the cells, in place of a decoded one.",
)
@click.option(
    "-n",
    "--n-gen",
    type=click.IntRange(0),
    default=measurement.N_GEN,
    help="Tokens decoded in each repetition; 0 with -p: only prompts.",
)
@click.option(
    "-r",
    "--repetitions",
    "n_repetitions",
    type=click.IntRange(1),
    default=measurement.N_REPETITIONS,
    help="Rounds at each depth.",
)
@setting_option(
    "budget",
    "--budget",
    "budgets",
    type=List(int),
    metavar="N,...",
    default=f"the model's own; a given one does not grow; with --op {_numbers(measurement.OP_BUDGETS)}",
)
@setting_option("n_tip", default="the model's own")
@output_option
@plot_option("Draw tokens/s over depth; with --op, time over cells.")
@force_option
@load_options
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    model: str | None,
    names: list[str] | None,
    op: bool,
    output: Path | None,
    plot: Path | None,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure speed at several depths, of decoding and with -p of reading, all methods interleaved.

    Of MODEL, or of a model with the geometry of a known one and random weights: stock with and without flash attention,
    FASA's kernel over all cells (exact), FASA. Quantized V takes flash attention, so there is no stock without it then.

    With --op, the attention of one layer alone: stock FLASH_ATTN_EXT, the exact kernel, FASA, and its two ops; with
    the bytes that each must move, and its time over what reading them takes on this machine. On the GPU with -ngl 1.
    With -p, stock's FLASH_ATTN_EXT, its products with SOFT_MAX between, and the exact kernel, on the CPU: with the
    operations per second, and their share of what numpy's product of f32 matrices reaches with as many threads.
    """
    if op and (model is not None or not names):
        raise click.UsageError("--op takes no MODEL but a --geometry")
    if not op and (model is None) == (names is None):
        raise click.UsageError("give either a MODEL or a --geometry")
    if op:
        refuse_ignored(ctx, _NOT_OF_OPS, "--op, which runs no model")
        if options["n_prompts"]:
            refuse_ignored(ctx, _NOT_OF_PROMPT_OPS, "--op -p, which measures attention to all cells on the CPU")
    elif model:
        refuse_ignored(ctx, ("n_layers", "weight_type"), "MODEL, which has its own")
    else:
        refuse_ignored(ctx, ("profile",), "--geometry, which has its own")
    inputs = model_files(Path(model)) if model else []
    inputs += [Path(options["profile"])] if options["profile"] else []
    check_results([output], inputs, plot, force=force)
    with progress_bars() as progress:
        rows: list[Any] = _ops(names or [], progress, **options) if op else _models(model, names, progress, **options)
    columns: Callable[[Any], dict] = _model_columns
    if op:
        columns = _prompt_op_columns if options["n_prompts"] else _op_columns
    draw: Callable[[list], Any] = draw_ops if op else draw_models
    table = tabulate(map(columns, rows), headers="keys", tablefmt="github", disable_numparse=True)
    print_result([row.as_dict() for row in rows], table, as_json=as_json, output=output, force=force)
    write_plot(plot, lambda: draw(rows), force=force)


def _ops(
    names: list[str],
    progress: Report,
    *,
    n_prompts: list[int] | None,
    depths: list[int] | None,
    budgets: list[int] | None,
    n_repetitions: int,
    n_threads: int | None,
    n_tip: int | None,
    n_layers: int | None,
    type_k: str,
    type_v: str,
    n_gpu_layers: int,
    **_: Any,  # refused
) -> list[OpRow] | list[PromptOpRow]:
    given: dict[str, Any] = {
        "n_repetitions": n_repetitions,
        "n_threads": n_threads,
        "type_k": type_k,
        "type_v": type_v,
        "n_layers": n_layers,
        "progress": partial(progress, "ops"),
    }
    if n_prompts:
        return measure_prompt_ops(names, n_prompts, depths=depths or measurement.PROMPT_OP_DEPTHS, **given)
    return measure_ops(
        names,
        depths=depths or measurement.OP_DEPTHS,
        budgets=budgets or measurement.OP_BUDGETS,
        n_tip=n_tip,
        on_gpu=n_gpu_layers != 0,
        **given,
    )


def _models(
    model: str | None,
    names: list[str] | None,
    progress: Report,
    *,
    n_layers: int | None,
    weight_type: str | None,
    depths: list[int] | None,
    fill: str | None,
    n_gen: int,
    n_prompts: list[int] | None,
    n_repetitions: int,
    budgets: list[int] | None,
    n_tip: int | None,
    n_ctx: int,
    **loading: Any,
) -> list[BenchRow]:
    rows: list[BenchRow] = []
    sources: list[str | None] = [name for name in names or () if find_geometry(name)]
    for name in sources or [None]:
        rows += measure(
            model,
            geometry=name,
            n_layers=n_layers,
            weight_type=weight_type,
            depths=depths or measurement.DEPTHS,
            n_gen=n_gen,
            n_prompts=n_prompts or (),
            n_repetitions=n_repetitions,
            budgets=budgets or (),
            n_tip=n_tip,
            fill=fill,
            n_ctx=n_ctx,
            progress=partial(progress, name or Path(model or "").stem),
            read_progress=partial(progress, READING),
            **load_arguments(**loading),
        )
    return rows


def _model_columns(row: BenchRow) -> dict[str, object]:
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


def _op_columns(row: OpRow) -> dict[str, object]:
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


def _prompt_op_columns(row: PromptOpRow) -> dict[str, object]:
    columns = {
        "op": row.op,
        "heads": row.heads,
        "K": row.type_k,
        "V": row.type_v,
        "threads": row.n_threads,
        "cells": row.n_depth,
        "tokens": row.n_prompt,
        "ms": f"{1e-6 * row.median_ns:.2f}",
        "range": f"{1e-6 * min(row.samples_ns):.2f}-{1e-6 * max(row.samples_ns):.2f}",
        "GFLOP/s": f"{1e-9 * row.flops:.1f}",
        "f32 matrix product by numpy": f"{1e-9 * row.matmul_flops:.1f}",
        "of it": f"{row.matmul_share:.0%}",
    }
    for stock in STOCK:
        ratio = row.ratios.get(stock)
        columns[f"x {stock}"] = f"{ratio.median:.2f} ({ratio.min:.2f}-{ratio.max:.2f})" if ratio else ""
    return columns
