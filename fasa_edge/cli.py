"""The ``fasa-edge`` command. Results go to standard output, all else to standard error."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import fasa_edge
from fasa_edge import _ggml, _lib, convert
from fasa_edge._cli import (
    echo,
    json_option,
    load_model,
    model_options,
    print_json,
    printable,
    progress_bars,
    size_text,
)
from fasa_edge._signals import unwound_by_signals
from fasa_edge.chat import Chat
from fasa_edge.cli_bench import bench
from fasa_edge.cli_eval import evaluate
from fasa_edge.config import SELECTS, FasaConfig, default_n_tip, tip_bytes
from fasa_edge.errors import ChatError, FasaError

import click
from tabulate import tabulate


class _Group(click.Group):
    """Turns the library's errors into one line and exit status 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with unwound_by_signals():
                return super().invoke(ctx)
        except (click.exceptions.Exit, click.Abort):  # RuntimeErrors by which click ends a command
            raise
        except (FasaError, RuntimeError) as error:  # the bindings raise RuntimeError when llama_decode fails
            raise click.ClickException(printable(str(error))) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(fasa_edge.__version__, prog_name="fasa-edge")
def main() -> None:
    """Sparse attention for llama.cpp: decode faster from long contexts."""
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) == "strict":  # a character that the terminal's encoding lacks is spelled out
            stream.reconfigure(errors="backslashreplace")
    warnings.showwarning = lambda message, *_: echo(f"warning: {message}", err=True)


main.add_command(bench)
main.add_command(evaluate)


class _NTip(click.ParamType):
    name = "integer|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        return value if value == "auto" else click.INT.convert(value, param, ctx)


@main.command(name="convert")
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
@click.option(
    "--n-tip",
    type=_NTip(),
    metavar="INTEGER|auto",
    help="Chunks scored per KV head; auto: as few as pass.  [default: 24 of 32, half of more]",
)
@click.option("--budget", type=int, default=FasaConfig.budget, help="Cells that a decoded token attends to.")
@click.option("--n-sink", type=int, default=FasaConfig.n_sink, help="First tokens always attended to.")
@click.option("--n-recent", type=int, default=FasaConfig.n_recent, help="Last tokens always attended to.")
@click.option("--n-dense-layers", type=int, default=FasaConfig.n_dense_layers, help="First layers that stay dense.")
@click.option(
    "--min-ctx", type=int, default=FasaConfig.min_ctx,
    help="Sparse from here on; 0: twice the budget, on a GPU from where it pays.",
)  # fmt: skip
@click.option("--max-batch", type=int, default=FasaConfig.max_batch, help="More tokens at once are a prompt.")
@click.option("--select", type=click.Choice(SELECTS), default=FasaConfig.select, help="Who chooses the cells.")
@click.option("--check/--no-check", default=True, help="Try the chunks on held-out text in the end.")
@click.option("-f", "--force", is_flag=True, help="Replace an existing output, or an older annotation.")
@json_option
def convert_command(src: str, output: str | None, as_json: bool, **options: Any) -> None:
    """Find the dominant frequency chunks of the model SRC and write a GGUF copy that carries them.

    SRC is a GGUF file (of a split model the first), the folder of a Hugging Face checkpoint (which takes
    `pip install '.[hf]'` in the clone of fasa-edge), or a model on a hub as user/model or user/model:quant. The copy of
    what comes from a hub goes into the current folder; a split model stays split.

    With --profile they go into a small file of their own, which serves every quantization of the model: give it to
    `run`, `chat`, `bench` and `eval` with --profile.

    The settings from --budget on are defaults stored with them; each can be changed when the model is loaded.

    In the end the chunks are tried on text that they were not chosen by: how far predictions are from those of dense
    attention, and how much attention the chosen cells hold in the worst layer. A warning says what falls short.
    """
    settings = {field.name: options.pop(field.name) for field in fields(FasaConfig) if field.name in options}
    start = time.perf_counter()
    with progress_bars(as_json) as progress:
        result = convert.convert(src, output, config=FasaConfig(**settings), progress=progress, **options)
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
        echo(
            f"check: worst layer {check.worst_layer} recalls {check.mass[check.worst_layer]:.2f} of the attention, "
            f"KL to dense {check.kl:.4f} +/- {check.kl_error:.4f} nats (dense token by token: {check.noise:.4f}); "
            f"budget {check.budget}{instead}, "
            f"{check.n_tokens} tokens after {check.n_prefix} of {check.text}; "
            f"{100 * check.clipped_share:.1f} % of the tips' values clipped"
        )


@main.command()
@click.argument("file", type=click.Path(dir_okay=False))
@click.option("--plot", type=click.Path(dir_okay=False), metavar="PNG", help="Draw the chunks of every head.")
@click.option("-f", "--force", is_flag=True, help="Replace an existing PNG.")
@json_option
def inspect(file: str, plot: str | None, force: bool, as_json: bool) -> None:
    """Show what FASA metadata FILE holds, an annotated model or a profile."""
    report = convert.inspect(file)
    if plot is not None:
        convert.write_plot(report, plot, force=force)
        echo(f"drawn: {plot}", err=True)
    if as_json:
        return print_json(report.to_dict())
    profile = report.profile
    files = f" in {report.n_files} files" if report.n_files > 1 else ""
    content = "a profile alone" if profile and not report.n_tensors else f"{report.n_tensors} tensors{files}"
    echo(
        f"{report.path}: {report.architecture}, {report.name or 'no name'}, {content}, {size_text(report.n_bytes)}"
    )
    if profile is None:
        return echo(f"no FASA profile: make one with `fasa-edge convert {file}`")
    tips = f"{profile.n_tip}, {tip_bytes(profile.n_tip)} bytes per cell and KV head"
    settings = asdict(profile.config) | {"n_tip": tips}
    echo(
        tabulate([*settings.items(), *asdict(profile.calibration).items(), ("fingerprint", profile.fingerprint)])
    )
    rows = [
        (il, ih, " ".join(map(str, chunks[: profile.n_tip])), f"{agreement[: profile.n_tip].sum():.3f}")
        for il, layer in enumerate(profile.chunks)
        for ih, (chunks, agreement) in enumerate(zip(layer, profile.agreement[il], strict=True))
    ]
    echo(
        tabulate(rows, headers=("layer", "KV head", "chunks, best first", f"sum of {profile.calibration.objective}"))
    )
    rows = []
    for il, layer in enumerate(profile.chunks):
        for ih, chunks in enumerate(layer):
            centre, step = profile.centre[il][ih], profile.step[il][ih]
            chunk, ranges = convert.farthest(chunks, centre, step)
            far = f"{ranges:.1f} (chunk {chunk})" if ranges > 0 else ""
            rows.append((il, ih, convert.picture(chunks, step), f"{step.max():.3g}", far))
    echo("\nsteps of the tips by chunk, in tenths of the largest; -: the keys never move; centres in halves of a range")
    echo(tabulate(rows, headers=("layer", "KV head", "steps, by falling frequency", "largest", "farthest centre")))


def _reasons(layers_dense: dict[str, int]) -> str:
    return ", ".join(f"{n} ({reason})" for reason, n in layers_dense.items()) or "0"


def _generate(llm: fasa_edge.Llama, pieces: Iterable[str], quiet: bool = False) -> dict[str, Any]:
    """Print a text as it is generated; the text, and what it took."""
    text: list[str] = []
    first = start = time.perf_counter()
    n_prompt = 0
    to_terminal = sys.stdout is not None and sys.stdout.isatty()
    for piece in pieces:
        if not text:  # the prompt and the first token
            first, n_prompt = time.perf_counter(), llm.n_tokens
            llm.fasa.reset_stats()
        text.append(piece)
        if not quiet:
            click.echo(printable(piece) if to_terminal else piece, nl=False)
    if not quiet:
        echo()
    n_prompt = n_prompt or llm.n_tokens
    n_tokens, seconds = llm.n_tokens - n_prompt, time.perf_counter() - first
    stats = llm.fasa.stats()
    return {
        "text": "".join(text),
        "prompt_tokens": n_prompt,
        "prompt_seconds": first - start,
        "n_tokens": n_tokens,
        "tokens_per_second": n_tokens / seconds if seconds > 0 else 0.0,
        "layers_sparse": stats.n_layers_sparse,
        "layers_dense": stats.n_layers_dense,
        "layers_exact": stats.n_layers_exact,
        "bytes_kv": stats.bytes_kv,
        "bytes_tips": stats.bytes_tips,
        "bytes_kv_dense": stats.bytes_kv_dense,
        "settings": stats.settings,
    }


def _attention(report: dict[str, Any], model: str) -> str:
    """What the attention of a generated text read."""
    if not report["settings"]:
        return f"dense: {model} has no FASA profile, make one with `fasa-edge convert`"
    exact = f", {report['layers_exact']} of these exact" if report["layers_exact"] else ""
    return (
        f"KV read {size_text(report['bytes_kv'] + report['bytes_tips'])} (tips {size_text(report['bytes_tips'])}), "
        f"dense reads {size_text(report['bytes_kv_dense'])}; "
        f"layers sparse {report['layers_sparse']}, dense {_reasons(report['layers_dense'])}{exact}"
    )


class _TextFile(click.File):
    """A text in UTF-8, with or without a byte order mark; ``-`` is standard input."""

    def __init__(self) -> None:
        super().__init__(encoding="utf-8-sig")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The open file."""
        if value == "-" and sys.stdin is None:
            self.fail("standard input is closed: give a file, or open it", param, ctx)
        return super().convert(value, param, ctx)


def _utf8(text: str, option: str) -> bytes:
    """An argument; Python keeps bytes that are not in the locale's encoding as lone surrogates."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise FasaError(f"{option} is not UTF-8 at character {error.start}: recode it") from error


def _read_text(file: Any) -> str:
    try:
        return file.read()
    except UnicodeDecodeError as error:
        raise FasaError(f"{file.name} is not UTF-8 at byte {error.start}: save it as UTF-8") from error


@main.command()
@model_options
@click.option("-p", "--prompt", help="The prompt.")
@click.option(
    "-f", "--file", "prompt_file", type=_TextFile(), help="File with the prompt; - for standard input."
)
@click.option(
    "--parse-special/--no-parse-special", default=True, help="Special tokens in the prompt count as such."
)
@click.option("-n", "--n-predict", type=click.IntRange(1), default=128, help="Tokens to generate.")
@click.option("--temp", "temperature", type=click.FloatRange(0), default=0.0, help="Temperature; 0: greedy.")
@click.option("--seed", type=int, default=0, help="Of the sampling.")
@click.option("--dense", is_flag=True, help="Switch FASA off.")
@json_option
def run(
    prompt: str | None,
    prompt_file: Any,
    parse_special: bool,
    n_predict: int,
    temperature: float,
    seed: int,
    dense: bool,
    as_json: bool,
    **model: Any,
) -> None:
    """Generate text after a prompt with MODEL."""
    if (prompt is None) == (prompt_file is None):
        raise click.UsageError("give the prompt with either -p TEXT or -f FILE")
    content = _utf8(prompt, "-p") if prompt is not None else _read_text(prompt_file).encode()
    llm = load_model(**model, fasa_enabled=False if dense else None)
    tokens = llm.tokenize(content, special=parse_special)
    if not tokens:
        raise FasaError("the prompt is empty, and the model begins no text by itself: give some text with -p or -f")
    if len(tokens) + n_predict > llm.n_ctx():
        raise FasaError(
            f"{len(tokens)} tokens of prompt and {n_predict} to generate exceed the context of {llm.n_ctx()}: "
            "shorten the prompt or raise -c"
        )
    chunks = llm.create_completion(tokens, max_tokens=n_predict, temperature=temperature, seed=seed, stream=True)
    report = _generate(llm, (chunk["choices"][0]["text"] for chunk in chunks), quiet=as_json)
    if as_json:
        return print_json(report)
    echo(
        f"\nprompt {report['prompt_tokens']} tokens in {report['prompt_seconds']:.1f} s, "
        f"then {report['n_tokens']} tokens at {report['tokens_per_second']:.1f} tokens/s",
        err=True,
    )
    echo(_attention(report, model["model"]), err=True)


@main.command()
@model_options
@click.option("--system", help="System message.")
@click.option(
    "-f", "--file", "document_file", type=_TextFile(), help="Text put before the first question."
)
@click.option("-n", "--n-predict", type=click.IntRange(1), default=512, help="Tokens of an answer at most.")
@click.option("--temp", "temperature", type=click.FloatRange(0), default=0.2, help="Temperature; 0: greedy.")
@click.option("--seed", type=int, default=0, help="Of the sampling.")
@click.option("--dense", is_flag=True, help="Switch FASA off.")
def chat(
    system: str | None,
    document_file: Any,
    n_predict: int,
    temperature: float,
    seed: int,
    dense: bool,
    **model: Any,
) -> None:
    """Chat with MODEL: a question a line, from the terminal or a pipe.

    /clear forgets what was said, but not the document; /exit or the end of input ends. Ctrl-C breaks an answer off. The
    exit status is 1 if a question found no room in the context.
    """
    if sys.stdin is None:
        raise FasaError("standard input is closed, from where the questions come: open it")
    _utf8(system or "", "--system")
    document = _read_text(document_file) if document_file else None
    llm = load_model(**model, fasa_enabled=False if dense else None)
    conversation = Chat(llm, system=system, document=document)
    status = 0
    for question in _questions():
        if question == "/clear":
            conversation.clear()
            continue
        pieces = conversation.ask(question, max_tokens=n_predict, temperature=temperature, seed=seed)
        try:
            report = _generate(llm, pieces)
        except KeyboardInterrupt:
            pieces.close()
            echo()
            continue
        except ChatError as error:
            echo(f"Error: {error}", err=True)
            status = 1
            continue
        echo(
            f"[{report['prompt_tokens']} tokens, {report['prompt_seconds']:.1f} s to the first word, "
            f"then {report['n_tokens']} at {report['tokens_per_second']:.1f} tokens/s; "
            f"{_attention(report, model['model'])}]",
            err=True,
        )
        if conversation.is_full:
            echo(f"the context of {llm.n_ctx()} tokens is full: /clear, or start with a larger -c", err=True)
    sys.exit(status)


def _questions() -> Iterator[str]:
    """Lines of standard input that are not empty, until /exit."""
    lines = _typed() if sys.stdin.isatty() else _piped()
    for question in map(str.strip, lines):
        if question == "/exit":
            return
        if question:
            yield question


def _typed() -> Iterator[str]:
    """Lines of a terminal, in its encoding."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  input() edits lines with it
    while True:
        try:
            line = input("> ")
            line.encode()  # the C locale lets through what is not UTF-8
        except EOFError:
            return
        except UnicodeError as error:
            raise FasaError(f"what was typed is not {sys.stdin.encoding}: set the terminal's locale") from error
        yield line


def _piped() -> Iterator[str]:
    """Lines of a file or pipe, in UTF-8 whatever the locale."""
    for no, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode("utf-8-sig" if no == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise FasaError(f"line {no} of standard input is not UTF-8 at byte {error.start}: recode it") from error


def _devices() -> list[str]:
    """The devices of all backends that are loaded, each with what it is, and from which depth on FASA pays there."""
    registry, base = (_lib.ggml(_lib.llama_cpp, name) for name in ("ggml", "ggml-base"))
    registry.ggml_backend_dev_get.restype = ctypes.c_void_p
    base.ggml_backend_dev_name.restype = base.ggml_backend_dev_description.restype = ctypes.c_char_p
    base.ggml_fasa_bandwidth.restype = ctypes.c_float
    res = []
    for handle in (ctypes.c_void_p(registry.ggml_backend_dev_get(i)) for i in range(registry.ggml_backend_dev_count())):
        names = (base.ggml_backend_dev_name, base.ggml_backend_dev_description)
        about = ": ".join(name(handle).decode().strip() for name in names)
        if bandwidth := base.ggml_fasa_bandwidth(handle):
            about += f", {bandwidth:,.0f} GB/s; with 32/8 heads of 128 sparse from {_pays_from(bandwidth):,} cells on"
        res.append(about)
    return res


def _pays_from(bandwidth: float) -> int:
    """Cells from which on the default budget is faster than dense attention, for the heads of an 8B model in f16."""
    n_head_kv, n_embd_head, budget = 8, 128, FasaConfig.budget
    row_bytes, n_bytes = n_head_kv * n_embd_head * 2 * 2, n_head_kv * tip_bytes(default_n_tip(n_embd_head))
    return max(2 * budget, _ggml.base.ggml_fasa_min_cells(bandwidth, row_bytes, n_bytes, budget))


@main.command()
@json_option
def doctor(as_json: bool) -> None:
    """Check the installation: library, commit, CPU features, backends, FASA."""
    llama_cpp = _lib.llama_cpp
    build = _lib.check(llama_cpp, _lib.lib_dir())
    llama_cpp.llama_backend_init()
    report = {
        "fasa_edge": fasa_edge.__version__,
        "llama_cpp_python": llama_cpp.__version__,
        "libllama": build.llama_path.decode(),
        "libggml_base": build.ggml_base_path.decode(),
        "llama_commit": build.llama_commit.decode(),
        "struct_sizes": "as the bindings expect",
        "system_info": llama_cpp.llama_print_system_info().decode().strip(),
        "devices": _devices(),
        "cpu_backend": _lib.cpu_backends(),
        "fasa": "compiled in",
        "python": sys.version.split()[0],
        "package": str(Path(fasa_edge.__file__).parent),
    }
    if as_json:
        return print_json(report)
    echo(tabulate(report.items()))
