"""The command ``fasa-edge serve``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from fasa_edge import convert
from fasa_edge.cli.common import (
    echo,
    model_file,
    profile_option,
    progress_bars,
    refuse_ignored,
    setting_option,
    threads_option,
)
from fasa_edge.cli.signals import unwound_by_signals
from fasa_edge.errors import FasaError
from fasa_edge.runtime import cpus
from fasa_edge.runtime.child import call
from fasa_edge.runtime.library import llama_cpp
from fasa_edge.runtime.planning import N_CTX_ON_GPU, Plan, plan
from fasa_edge.runtime.programs import find_program
from fasa_edge.runtime.server_options import ServerOptions
from fasa_edge.runtime.serving import free_port, running

import click

_OURS = {
    "--host": ("--host",),
    "--port": ("--port",),
    "MODEL": (
        *("-m", "--model", "-mu", "--model-url", "-dr", "--docker-repo"),
        *("-hf", "-hfr", "--hf-repo", "-hff", "--hf-file"),
        *("--embd-gemma-default", "--gpt-oss-20b-default", "--gpt-oss-120b-default"),
        *(f"--fim-qwen-{size}" for size in ("1.5b-default", "3b-default", "7b-default", "30b-default")),
        *("--fim-qwen-7b-spec", "--fim-qwen-14b-spec"),
        *("--vision-gemma-4b-default", "--vision-gemma-12b-default"),
    ),
    "-c": ("-c", "--ctx-size"),
    "--slots": ("-np", "--parallel"),
    "-t": ("-t", "--threads"),
    "-ngl": ("-ngl", "--gpu-layers", "--n-gpu-layers"),
    "--budget": ("--fasa-budget", "fasa.budget"),
    "--profile": ("--fasa-profile", "fasa.version"),
    "--dense or --exact": ("--fasa", "fasa.enabled", "fasa.exact"),
}
"""What is said of the server, and so belongs before --: our option, and llama-server's names of it, also as a key of
--override-kv."""

_OTHER_MODELS = ("LLAMA_ARG_HF_REPO", "LLAMA_ARG_MODEL_URL", "LLAMA_ARG_DOCKER_REPO")
"""Environment variables that llama-server heeds even if it is given a file."""


@click.command(name="serve")
@click.argument("model", type=model_file)
@click.argument("server_options", nargs=-1, type=click.UNPROCESSED, metavar="[-- OPTION OF LLAMA-SERVER ...]")
@click.option("--host", default="127.0.0.1", help="Address to listen on; 0.0.0.0: all, so that others reach it.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, help="Port to listen on; 0: any that is free.")
@click.option(
    "--convert/--no-convert",
    "may_convert",
    default=None,
    show_default=False,
    help="Whether a model without a FASA profile is annotated first, or served dense.  [default: ask]",
)
@click.option(
    "-c",
    "--ctx-size",
    "n_ctx",
    type=click.IntRange(0),
    default=0,
    show_default=False,
    help="Cells of each slot.  [default: the model's own context, as far as memory allows beside its layers]",
)
@click.option(
    "--slots",
    "n_slots",
    type=click.IntRange(1),
    help="Requests that are answered at once.  [default: up to 4, as many as memory holds the whole context for]",
)
@threads_option
@click.option(
    "-ngl",
    "--n-gpu-layers",
    type=click.IntRange(-1),
    show_default=False,
    help=f"Layers on the GPU; -1: all.  [default: as many as leave room for the context of -c, or of {N_CTX_ON_GPU}]",
)
@setting_option("budget", default="the model's own", envvar="LLAMA_ARG_FASA_BUDGET", show_envvar=True)
@profile_option(envvar="LLAMA_ARG_FASA_PROFILE", show_envvar=True)
@setting_option("exact")
@click.option("--dense", is_flag=True, help="Switch FASA off.")
@click.option("-v", "--verbose", is_flag=True, help="Show llama-server's log.")
@click.pass_context
def command(
    ctx: click.Context,
    model: str,
    server_options: tuple[str, ...],
    host: str,
    port: int,
    may_convert: bool | None,
    n_ctx: int,
    n_slots: int | None,
    n_threads: int | None,
    n_gpu_layers: int | None,
    budget: int | None,
    profile: str | None,
    exact: bool,
    dense: bool,
    verbose: bool,
) -> None:
    """Serve MODEL as OpenAI's API with llama-server, decoding sparsely.

    What is after -- goes to llama-server, as in `fasa-edge serve model-fasa.gguf -- --api-key KEY`; `fasa-edge llama
    server --help` lists it. A request may set fasa_budget and fasa_enabled; its timings say what was read.
    """
    options = ServerOptions(server_options)
    for ours, theirs in _OURS.items():
        if given := options.given(*theirs):
            raise click.UsageError(f"{given[0]} belongs before --, as {ours}: what is planned and said depends on it")
    for name, value in options.environment(*_OTHER_MODELS).items():
        raise FasaError(f"{name}={value} names another model than {model}, which is to be served: unset it")
    if dense:
        refuse_ignored(ctx, ("budget", "exact", "profile"), "--dense")
    runs_dense = dense or not options.flash_attention or (options.fasa == "off" and not exact)
    find_program("server")  # before a model is annotated for it
    free_port(host, port)  # before a model is annotated, and looked for again after that
    path = Path(model) if runs_dense or profile else _annotated(Path(model), may_convert)
    n_cpus = cpus.n_cpus()
    n_threads = n_threads or max(n_cpus // 2, 1)
    wanted = call(
        plan,
        path,
        profile,
        n_ctx=n_ctx,
        n_slots=n_slots or 0,
        n_threads=max(n_threads, n_cpus) - 1,
        n_gpu_layers=n_gpu_layers,
        options=options,
    )
    options.make_folders()
    arguments = ["--model", str(path), *wanted.arguments(), "--metrics"]
    arguments += ["--threads", str(n_threads), "--threads-batch", str(n_cpus)]
    for name, setting in {"--fasa-budget": budget, "--fasa-profile": profile}.items():
        arguments += [name, str(setting)] if setting is not None else []
    if dense or exact:
        arguments += ["--fasa", "off" if dense else "exact"]
    if not options.given("--cors-origins"):
        arguments += ["--cors-origins", "localhost"]  # or any page in a browser on this machine may ask it
    if not verbose:
        arguments += ["--log-verbosity", "2"]  # errors and warnings
    source = convert.inspect(profile or path).profile
    how = "dense" if runs_dense or not source else f"budget {budget or source.config.budget}"
    port = free_port(host, port)
    echo(f"{path}: {_of(wanted)}, {_counted(n_threads, 'thread')} ({n_cpus} for prompts), {how}")
    try:
        with running(host, port, [*arguments, *server_options]) as server:
            address = f"[{host}]" if ":" in host else host  # RFC 3986
            echo(f"{options.scheme}://{address}:{port}{options.api_prefix}/v1 (OpenAI's API; Ctrl-C ends it)")
            status = server.wait()
            raise FasaError(f"llama-server ended by itself, with status {status}: see what it says above")
    except KeyboardInterrupt:
        echo(err=True)  # behind the terminal's ^C


def _of(wanted: Plan) -> str:
    res = f"{_counted(wanted.n_slots, 'slot')} of {wanted.n_ctx} cells"
    if llama_cpp.llama_supports_gpu_offload():
        n, n_all = wanted.n_gpu_layers, wanted.n_layers
        res += ", all layers on the GPU" if n >= n_all else f", {n} of {n_all} layers on the GPU"
    return res


def _counted(n: int, what: str) -> str:
    return f"1 {what}" if n == 1 else f"{n} {what}s"


def _is_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _wrong(copy: Path, path: Path) -> str:
    """Say why a file cannot be served as the annotated copy of a model; empty: it can."""
    if not copy.is_file():
        return "is no file"
    if copy.stat().st_mtime < path.stat().st_mtime:
        return "is older"
    return "" if convert.inspect(copy).annotated else "has no FASA profile"


def _annotated(path: Path, may_convert: bool | None) -> Path:
    """The model if it carries a profile, else its annotated copy, which is made if it may be."""
    if convert.inspect(path).annotated:
        return path
    copy = convert.default_output(path)
    if may_convert is not False and os.path.lexists(copy):
        if wrong := _wrong(copy, path):
            raise FasaError(
                f"{copy}, which would be served for {path}, {wrong}: remove it, or write it again with `fasa-edge "
                f"convert --force {path}`; --no-convert serves {path} dense"
            )
        echo(f"{path} has no FASA profile: its annotated copy is served", err=True)
        return copy
    if may_convert is None:
        if not _is_terminal():
            raise FasaError(
                f"{path} has no FASA profile: give --convert to annotate it first, or --no-convert to serve it dense"
            )
        may_convert = click.confirm(
            f"{path} has no FASA profile. Write an annotated copy, {copy}?", default=True, err=True
        )
    if not may_convert:
        echo(f"warning: {path} has no FASA profile: it is served dense", err=True)
        return path
    for warning in call(annotate, path):
        echo(f"warning: {warning}", err=True)
    return copy


def annotate(path: Path) -> list[str]:
    """Write the annotated copy of a model, in another process, and return warnings."""
    with unwound_by_signals(), progress_bars() as progress:
        result = convert.convert(path, progress=progress)
    warnings = (result.unchecked and f"not checked: {result.unchecked}", result.check and result.check.warning)
    return [warning for warning in warnings if warning]
