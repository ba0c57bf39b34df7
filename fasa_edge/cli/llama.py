"""The command ``fasa-edge llama``."""

from __future__ import annotations

import os
import subprocess
import sys

from fasa_edge.runtime.programs import PROGRAMS, find_program

import click


@click.command(name="llama", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("name", type=click.Choice(PROGRAMS))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def command(name: str, arguments: tuple[str, ...]) -> None:
    """Run one of llama.cpp's programs, with FASA: `fasa-edge llama server -m model-fasa.gguf`.

    What follows NAME is the program's own, also --help. `make programs` builds them, as fasa-llama-server and so on.
    """
    program = find_program(name)
    words = [str(program), *arguments]
    if os.name == "nt":  # where exec starts another process and ends this one
        sys.exit(subprocess.call(words))
    sys.stdout.flush()
    os.execv(program, words)
