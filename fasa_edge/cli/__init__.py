"""The ``fasa-edge`` command. Results go to standard output, all else to standard error."""

from __future__ import annotations

import io
import sys
import warnings
from typing import Any

from fasa_edge.cli import bench, chat, convert, doctor, eval, inspect, llama, run, serve
from fasa_edge.cli.common import echo, printable
from fasa_edge.cli.signals import unwound_by_signals
from fasa_edge.errors import FasaError
from fasa_edge.version import __version__

import click


class _Group(click.Group):
    """Lists its commands in the order in which one uses them; turns the library's errors into one line and status 1."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with unwound_by_signals():
                return super().invoke(ctx)
        except (click.exceptions.Exit, click.Abort):  # RuntimeErrors by which click ends a command
            raise
        except (FasaError, RuntimeError) as error:  # the bindings raise RuntimeError when llama_decode fails
            raise click.ClickException(printable(str(error))) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, prog_name="fasa-edge")
def main() -> None:
    """Sparse attention for llama.cpp: decode faster from long contexts."""
    for stream in (sys.stdout, sys.stderr):
        # a character that the terminal's encoding lacks is spelled out
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
    warnings.showwarning = lambda message, *_: echo(f"warning: {message}", err=True)


for _module in (convert, inspect, run, chat, serve, bench, eval, doctor, llama):
    main.add_command(_module.command)
