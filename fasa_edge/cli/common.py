"""What the commands share: options, loading a model, progress, output."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fasa_edge
from fasa_edge.config import INT32_MAX, SETTINGS
from fasa_edge.errors import FasaError
from fasa_edge.io.figure import new_figure, to_png
from fasa_edge.io.output import check_outputs, write_bytes
from fasa_edge.runtime import capi
from fasa_edge.runtime.sequence import READING
from fasa_edge.runtime.trial import try_model

import click
from click.core import ParameterSource
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_stderr = Console(stderr=True)

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""All control characters but tab and newline, and those that turn the direction of a text."""


Report = Callable[[str, int, int], None]
"""A function that is called with the name of a stage, what is done and what there is to do."""


def printable(text: str) -> str:
    """Spell out what a terminal would obey, as escape sequences, in a text such as a file's metadata."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def echo(text: str = "", *, err: bool = False) -> None:
    """Print a line for people, on standard output or error."""
    click.echo(printable(text), err=err)


_OF_TOKENS = (READING, "calibrate")
"""Stages whose speed is shown."""

_LINE_AFTER = 10.0
"""Seconds between two lines about a prompt where there is no terminal."""


class _Speed:
    """How fast a stage is by its calls of the last half a minute, and by five at least: a batch may take as long."""

    def __init__(self) -> None:
        self._calls: deque[tuple[float, int]] = deque()
        self.told = time.monotonic()  # when a line was printed

    def __call__(self, done: int) -> float:
        """Steps a second; 0: not known yet."""
        self._calls.append((now := time.monotonic(), done))
        while len(self._calls) > 5 and self._calls[1][0] < now - 30:
            self._calls.popleft()
        start, first = self._calls[0]
        return (done - first) / (now - start) if now > start else 0.0


@contextlib.contextmanager
def progress_bars(quiet: bool = False) -> Iterator[Report]:
    """Show a progress bar for each stage while the context is open and something is left to do.

    Where standard error is no terminal, a line now and then tells of a prompt that takes long to be read.
    """
    columns = ("{task.description}", BarColumn(), TaskProgressColumn(), "{task.fields[rate]}", "{task.fields[left]}")
    bars = Progress(*columns, console=_stderr, transient=True)
    tasks: dict[str, TaskID] = {}
    speeds: dict[str, _Speed] = {}

    def update(stage: str, done: int, total: int) -> None:
        if not done or stage not in speeds:
            speeds[stage] = _Speed()
        speed = speeds[stage](done)
        rate = f"{speed:.1f} tokens/s" if speed and stage in _OF_TOKENS else ""
        left = str(timedelta(seconds=round((total - done) / speed))) if speed else "-:--:--"
        if not _stderr.is_terminal:
            since = time.monotonic() - speeds[stage].told
            if stage == READING and speed and done < total and since >= _LINE_AFTER:
                speeds[stage].told += since
                echo(f"{stage} {done} of {total} tokens, {rate}, {left} left", err=True)
            return
        if stage not in tasks:
            tasks[stage] = bars.add_task("", total=total, rate=rate, left=left)
        elif not done:
            bars.reset(tasks[stage], rate=rate, left=left)
        bars.update(
            tasks[stage],
            description=f"{stage} {total} tokens" if stage == READING else printable(stage),
            completed=done,
            total=total,
            visible=stage != READING or done < total,
            refresh=stage == READING,  # as rare as batches
            rate=rate,
            left=left,
        )
        if bars.finished:
            stop()  # nothing may be drawn over what is printed next
        else:
            bars.start()

    def stop() -> None:
        if bars.live.is_started:  # or it would end a line
            bars.stop()

    try:
        yield (lambda stage, done, total: None) if quiet else update
    finally:
        stop()


@contextlib.contextmanager
def reading_shown(llm: fasa_edge.Llama) -> Iterator[None]:
    """Show how far the model is with prompts that it reads while the context is open."""
    with progress_bars() as progress:
        llm.progress = partial(progress, READING)
        if llm.documents is not None:
            llm.documents.store.progress = progress
        try:
            yield
        finally:
            llm.progress = None
            if llm.documents is not None:
                llm.documents.store.progress = lambda stage, done, total: None


def print_json(value: Any) -> None:
    """Print a value as JSON on standard output."""
    click.echo(json.dumps(value, indent=2))


def size_text(n: float) -> str:
    """Write a size in bytes as llama.cpp does."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    raise AssertionError


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
"""The option of every command that has a result."""

force_option = click.option("--force", is_flag=True, help="Replace existing files.")
"""The option of every command that writes files; no -f, which names the prompt."""

output_option = click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), callback=lambda ctx, param, path: _output(path),
    help="File for the result, in place of standard output.",
)  # fmt: skip
"""The option of commands that print a table."""


def _output(path: Path | None) -> Path | None:
    if path is not None and str(path) in ("json", "md"):
        raise click.BadParameter(f"it names a file: for the format {path} give --json, or nothing for a table")
    return path


def plot_option(help: str) -> Callable:
    """Make the option ``--plot PNG``; ``help`` says what it draws."""
    return click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), metavar="PNG", help=help)


def check_results(outputs: Iterable[Path | None], inputs: Iterable[Path], plot: Path | None, *, force: bool) -> None:
    """Refuse what could not be written or drawn in the end, before hours of measurement.

    Args:
        outputs: files to be written besides the plot, if any.
        inputs: files that are read.
        plot: PNG to be drawn, if any.
        force: replace existing files.
    """
    check_outputs([path for path in (*outputs, plot) if path is not None], inputs, force=force)
    if plot is not None:
        new_figure(1, 1)  # that needs matplotlib


def print_result(rows: Any, table: str, *, as_json: bool, output: Path | None = None, force: bool = False) -> None:
    """Print what a command found, as JSON or as a table, on standard output or into a file."""
    if output is None:
        return print_json(rows) if as_json else echo(table)
    text = json.dumps(rows, indent=2) if as_json else printable(table)
    try:
        write_bytes(output, [], f"{text}\n".encode(), force=force)
    except FasaError:
        click.echo(text)  # it may have taken hours
        raise
    echo(f"written: {output}", err=True)


def write_plot(plot: Path | None, draw: Callable[[], Figure], *, force: bool) -> None:
    """Draw what a command found; last, so that nothing measured is lost if it cannot be written."""
    if plot is not None:
        write_bytes(plot, [], to_png(draw()), force=force)
        echo(f"drawn: {plot}", err=True)


def refuse_ignored(ctx: click.Context, names: Iterable[str], why: str) -> None:
    """Refuse options that have no effect on what is asked for.

    Args:
        ctx: of the command.
        names: of parameters.
        why: what ignores them.

    Raises:
        click.UsageError: one was given.
    """
    for param in ctx.command.params:
        if param.name in names and ctx.get_parameter_source(param.name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{'/'.join(param.opts)} has no effect with {why}: leave it out", ctx)


_cache_type = click.Choice(capi.CACHE_TYPES)


class _File(click.Path):
    """A file that exists and can be read from anywhere: no pipe, on which llama.cpp would wait for ever."""

    def __init__(self) -> None:
        super().__init__(exists=True, dir_okay=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return its path."""
        path: Any = super().convert(value, param, ctx)
        if not os.path.isfile(path):
            self.fail(f"{path} is a pipe, a device or the like: give a file", param, ctx)
        return path


class _Model(_File):
    """A model that does not crash llama.cpp."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return its path."""
        path = super().convert(value, param, ctx)
        try_model(path)
        return path


model_file = _Model()
"""MODEL of every command that runs one."""


def _with(command: Callable, *options: Callable) -> Callable:
    for option in reversed(options):  # click lists those first that come last
        command = option(command)
    return command


def setting_option(name: str, *declarations: str, default: str | None = None, **attributes: Any) -> Callable:
    """Make the option of a setting, as it is declared in :data:`fasa_edge.config.SETTINGS`.

    Args:
        name: of the setting.
        declarations: as of ``click.option``; ``--n-sink`` of ``n_sink`` if none.
        default: in words, where another than the setting's own holds.
        attributes: of ``click.option``, in place of the setting's own.
    """
    setting = SETTINGS[name]
    low, high = setting.limits
    own: dict[str, Any] = {"help": setting.help}
    if setting.type is bool:
        own |= {"is_flag": True}
    elif setting.type is int:
        own |= {"type": click.IntRange(low, high if high < INT32_MAX else None), "default": setting.default}
    else:
        own |= {"type": click.Choice(setting.choices), "default": setting.default}
    if default is not None:
        own |= {"default": None, "help": f"{setting.help}  [default: {default}]"}
    return click.option(*(declarations or [f"--{name.replace('_', '-')}"]), **(own | attributes))


def profile_option(**attributes: Any) -> Callable:
    """Make the option ``--profile``; ``attributes`` are of ``click.option``."""
    return click.option("--profile", type=_File(), help="In place of the model's own.", **attributes)


threads_option = click.option(
    "-t",
    "--threads",
    "n_threads",
    type=click.IntRange(1),
    help="Of decoding; prompts take all CPUs.  [default: half of the CPUs]",
)
gpu_layers_option = click.option(
    "-ngl", "--n-gpu-layers", type=click.IntRange(-1), default=0, help="Layers on the GPU; -1: all."
)


_ROPE_SCALING = {"none": 0, "linear": 1, "yarn": 2}  # enum llama_rope_scaling_type (include/llama.h)


def rope_options(command: Callable) -> Callable:
    """Add the options that change RoPE at run time, as arguments of :class:`llama_cpp.Llama`."""
    return _with(
        command,
        click.option("--rope-scaling", "rope_scaling_type", type=click.Choice(list(_ROPE_SCALING)),
                     callback=lambda ctx, param, value: _ROPE_SCALING.get(value), help="[default: the model's own]"),
        click.option("--rope-freq-base", type=float, default=0, show_default=False, help="[default: the model's own]"),
        click.option("--rope-freq-scale", type=float, default=0, show_default=False,
                     help="1/N expands the context by N.  [default: the model's own]"),
        click.option("--yarn-orig-ctx", type=click.IntRange(0), default=0, show_default=False,
                     help="Context that the model was trained for.  [default: the model's own]"),
    )  # fmt: skip


def load_options(command: Callable) -> Callable:
    """Add the options that say how a model is loaded."""
    return _with(
        command,
        click.option("-c", "--ctx-size", "n_ctx", type=click.IntRange(0), default=0, show_default=False,
                     help="Cells of the KV cache, rounded up to a multiple of 256.  "
                          "[default: the model's own context, as far as memory allows]"),
        threads_option,
        gpu_layers_option,
        click.option("-ctk", "--cache-type-k", "type_k", type=_cache_type, default="f16", help="Type of cached K."),
        click.option("-ctv", "--cache-type-v", "type_v", type=_cache_type, default="f16", help="Type of cached V."),
        profile_option(),
        setting_option("exact"),
        rope_options,
        click.option("--override-kv", "overrides", multiple=True, metavar="KEY=TYPE:VALUE", help="As in llama.cpp."),
        click.option("-v", "--verbose", is_flag=True, help="Show llama.cpp's log."),
    )  # fmt: skip


def model_options(command: Callable) -> Callable:
    """Add the options that every command that runs a model understands."""
    return _with(
        command,
        click.argument("model", type=model_file),
        setting_option("budget", default="the model's own"),
        load_options,
    )


def cache_options(command: Callable) -> Callable:
    """Add the options of the document store, which :func:`document_store` takes."""
    return _with(
        command,
        click.option("--cache", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
                     help="Keep there what is read: what begins alike, also after a restart, is not read again.  "
                          "[default: nothing is kept]"),
        click.option("--cache-size", type=click.FloatRange(0, min_open=True), default=8.0,
                     help="GiB that DIR may take; what was not used for longest goes first."),
    )  # fmt: skip


def document_store(ctx: click.Context, cache: Path | None, cache_size: float) -> fasa_edge.DocumentStore | None:
    """Open the store that :func:`cache_options` describe."""
    if cache is None:
        refuse_ignored(ctx, ("cache_size",), "no --cache")
        return None
    return fasa_edge.DocumentStore(cache, capacity_bytes=max(int(cache_size * (1 << 30)), 1))


def _parse_override(text: str) -> tuple[str, bool | int | float | str]:
    """``KEY=TYPE:VALUE`` with TYPE one of int, float, bool, str (common/common.cpp, string_parse_kv_override)."""
    key, _, typed = text.partition("=")
    kind, _, value = typed.partition(":")
    try:
        if kind == "bool":
            return key, {"true": True, "false": False}[value]
        return key, {"int": int, "float": float, "str": str}[kind](value)
    except (KeyError, ValueError):
        raise FasaError(
            f"--override-kv {text}: expected KEY=TYPE:VALUE with TYPE int, float, bool or str, e.g. fasa.budget=int:256"
        ) from None


def load_arguments(
    n_threads: int | None,
    n_gpu_layers: int,
    type_k: str,
    type_v: str,
    profile: str | None,
    exact: bool,
    overrides: tuple[str, ...],
    verbose: bool,
    **more: Any,
) -> dict[str, Any]:
    """Return the arguments of :class:`fasa_edge.Llama` that :func:`load_options` describe, but for ``n_ctx``.

    ``more``, of which those of RoPE are, have their names already.
    """
    return {
        "n_threads": n_threads,
        "n_gpu_layers": n_gpu_layers,
        "type_k": capi.cache_type(type_k),
        "type_v": capi.cache_type(type_v),
        "kv_overrides": dict(map(_parse_override, overrides)),
        "fasa_profile": profile,
        "fasa_exact": exact or None,
        "verbose": verbose,
        **more,
    }


def load_model(model: str, n_ctx: int, budget: int | None = None, **options: Any) -> fasa_edge.Llama:
    """Load the model that :func:`model_options` describe; ``options`` as of :func:`load_arguments`."""
    return fasa_edge.Llama(model, n_ctx=n_ctx, fasa_budget=budget, **load_arguments(**options))


class List(click.ParamType):
    """Values separated by commas, as llama-bench takes them."""

    name = "list"

    def __init__(self, kind: type) -> None:
        self.kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list:
        """Return the items."""
        if isinstance(value, list):
            return value
        try:
            return [self.kind(item) for item in value.split(",")]
        except ValueError:
            self.fail(f"{value!r}: expected numbers separated by commas", param, ctx)
