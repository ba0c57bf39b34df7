"""The command ``fasa-edge convert``."""

from __future__ import annotations

import time
from dataclasses import asdict, fields
from typing import Any

from fasa_edge import convert
from fasa_edge.cli.common import (
    echo,
    gpu_layers_option,
    json_option,
    print_json,
    progress_bars,
    refuse_ignored,
    rope_options,
    setting_option,
    size_text,
)
from fasa_edge.config import FasaConfig
from fasa_edge.runtime.llama import ROPE_ARGUMENTS

import click


class _NTip(click.ParamType):
    name = "integer|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        return value if value == "auto" else click.INT.convert(value, param, ctx)


@click.command(name="convert")
@click.argument("src")
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="The copy.  [default: SRC, -fasa before .gguf]")
@click.option("--profile", type=click.Path(dir_okay=False), help="File of the chunks alone; no copy without -o.")
@click.option("--outtype", type=click.Choice(convert.OUTTYPES), default="auto", help="Of a checkpoint's weights.")
@click.option(
    "--text", type=click.Path(dir_okay=False), help="UTF-8 text to calibrate on.  [default: pydoc_data.topics]"
)
@click.option("--tokens", type=int, default=convert.DEFAULT_TOKENS, help="Tokens of the text to use.")
@click.option("--context", type=int, help="Tokens to stretch the text over.  [default: the model's context]")
@click.option("--objective", type=click.Choice(sorted(convert.OBJECTIVES)), default="lsq", help="Chooses the chunks.")
@click.option("--top-k", type=int, default=convert.DEFAULT_TOP_K, help="K of the objectives `agreement` and `mass`.")
@setting_option("n_tip", type=_NTip(), metavar="INTEGER|auto", default="24 of 32, half of more; auto: as few as pass")
@setting_option("budget")
@setting_option("budget_ctx")
@setting_option("n_sink")
@setting_option("n_recent")
@setting_option("n_dense_layers")
@setting_option("min_ctx")
@setting_option("max_batch")
@setting_option("select")
@setting_option("prompt_mass")
@click.option("--check/--no-check", default=True, help="Try the chunks on held-out text in the end.")
@click.option(
    "-t", "--threads", "n_threads", type=click.IntRange(1), help="[default: all CPUs to read, half of them to decode]"
)
@gpu_layers_option
@rope_options
@click.option("--force", is_flag=True, help="Replace an existing output, or an older annotation.")
@json_option
@click.pass_context
def command(ctx: click.Context, src: str, output: str | None, as_json: bool, **options: Any) -> None:
    """Find the dominant frequency chunks of the model SRC and write a GGUF copy that carries them.

    SRC is a GGUF file (of a split model the first), the folder of a Hugging Face checkpoint (which takes
    `pip install '.[hf]'` in the clone of fasa-edge), or a model on a hub as user/model or user/model:quant. The copy of
    what comes from a hub goes into the current folder; a split model stays split.

    With --profile they go into a small file of their own, which serves every quantization of the model: give it to
    `run`, `chat`, `bench` and `eval` with --profile.

    The settings from --budget to --select are defaults stored with them; each can be changed when the model is loaded.

    In the end the chunks are tried on text that they were not chosen by: how far predictions are from those of dense
    attention, and how much attention the chosen cells hold in the worst layer. A warning says what falls short.
    """
    if not convert.OBJECTIVES[options["objective"]].uses_top_k:
        refuse_ignored(ctx, ("top_k",), f"--objective {options['objective']}")
    rope = {name: options.pop(name) for name in ROPE_ARGUMENTS if name in options}
    settings = {field.name: options.pop(field.name) for field in fields(FasaConfig) if field.name in options}
    start = time.perf_counter()
    with progress_bars(as_json) as progress:
        result = convert.convert(src, output, config=FasaConfig(**settings), rope=rope, progress=progress, **options)
    profile, check = result.profile, result.check
    report = {
        "path": result.path and str(result.path),
        "profile_path": result.profile_path and str(result.profile_path),
        "n_bytes": result.n_bytes,
        "seconds": round(time.perf_counter() - start, 1),
        "n_tip": profile.n_tip,
        "calibration": asdict(profile.calibration),
        "fingerprint": profile.fingerprint,
        "check": check and asdict(check) | {"worst_layer": check.worst_layer, "passed": check.passed},
        "unchecked": result.unchecked,
    }
    if result.unchecked:
        unchecked = f"not checked: {result.unchecked}"
        if options["n_tip"] == "auto":
            unchecked = (
                f"n_tip auto could not be decided: {result.unchecked}; {profile.n_tip}, the default, was written"
            )
        echo(f"warning: {unchecked}", err=True)
    if check and check.warning:
        echo(f"warning: {check.warning}", err=True)
    if as_json:
        return print_json(report)
    calibration = profile.calibration
    written = " and ".join(str(path) for path in (result.path, result.profile_path) if path)
    echo(
        f"{written}: {size_text(result.n_bytes)}, {profile.n_tip} chunks per KV head, "
        f"chosen by {calibration.objective} on {calibration.tokens} tokens of {calibration.text}, stretched over "
        f"{calibration.context}, {report['seconds']} s"
    )
    if check:
        instead = f" in place of {profile.config.budget}" if check.budget != profile.config.budget else ""
        clipped = calibration.clipped
        echo(
            f"check: worst layer {check.worst_layer} recalls {check.mass[check.worst_layer]:.2f} of the attention, "
            f"KL to dense {check.kl:.4f} +/- {check.kl_error:.4f} nats (dense token by token: {check.noise:.4f}); "
            f"budget {check.budget}{instead}, "
            f"{check.n_tokens} tokens after {check.n_prefix} of {check.text}"
            + (f"; {100 * clipped:.1f} % of the tips' values clipped" if clipped is not None else "")
        )
