"""The command ``fasa-edge chat``."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fasa_edge.cli.common import (
    cache_options,
    document_store,
    echo,
    load_model,
    model_options,
    reading_shown,
    refuse_ignored,
)
from fasa_edge.cli.text import TextFile, attention_text, cached, generate, read_text, utf8
from fasa_edge.errors import ChatError, FasaError
from fasa_edge.runtime.chat import Chat, MadeRoom

import click


@click.command(name="chat")
@model_options
@click.option("--system", help="System message.")
@click.option("-f", "--file", "document_file", type=TextFile(), help="Text put before the first question.")
@click.option("-n", "--n-predict", type=click.IntRange(1), default=512, help="Tokens of an answer at most.")
@click.option("--temp", "temperature", type=click.FloatRange(0), default=0.2, help="Temperature; 0: greedy.")
@click.option("--seed", type=int, default=0, help="Of the sampling.")
@click.option("--dense", is_flag=True, help="Switch FASA off.")
@cache_options
@click.pass_context
def command(
    ctx: click.Context,
    system: str | None,
    document_file: Any,
    n_predict: int,
    temperature: float,
    seed: int,
    dense: bool,
    cache: Path | None,
    cache_size: float,
    **model: Any,
) -> None:
    """Chat with MODEL: a question a line, from the terminal or a pipe.

    The document is read at once, then only questions are. When the context is full, the oldest questions leave with
    their answers; the document and the system message stay. The exit status is 1 if a question found no room even so.

    /clear forgets what was said, but not the document; /exit or the end of input ends. Ctrl-C breaks an answer off.
    """
    if dense:
        refuse_ignored(ctx, ("budget",), "--dense")
    if sys.stdin is None:
        raise FasaError("standard input is closed, from where the questions come: open it")
    utf8(system or "", "--system")
    document = read_text(document_file) if document_file else None
    store = document_store(ctx, cache, cache_size)
    llm = load_model(**model, fasa_enabled=False if dense else None, cache=store)
    conversation = Chat(llm, system=system, document=document, on_room=_say_room)
    if document:
        echo(f"{document_file.name}: {conversation.n_document()} tokens, the context holds {llm.n_ctx()}", err=True)
        with reading_shown(llm):
            conversation.read()
        if kept := cached(llm):
            echo(f"[{kept}]", err=True)
    status = 0
    for question in _questions():
        if question == "/clear":
            conversation.clear()
            continue
        pieces = conversation.ask(question, max_tokens=n_predict, temperature=temperature, seed=seed)
        try:
            report = generate(llm, pieces)
        except KeyboardInterrupt:
            pieces.close()
            echo()
            continue
        except ChatError as error:
            echo(f"Error: {error}", err=True)
            status = 1
            continue
        kept = cached(llm)
        echo(
            f"[{report['prompt_tokens']} tokens, {report['prompt_seconds']:.1f} s to the first word, "
            f"then {report['n_tokens']} at {report['tokens_per_second']:.1f} tokens/s; "
            f"{attention_text(report, model['model'])}{f'; {kept}' if kept else ''}]",
            err=True,
        )
        if conversation.is_cut:
            echo(
                f"the answer ends where the context of {llm.n_ctx()} tokens does: nothing is left that could leave it",
                err=True,
            )
    sys.exit(status)


def _say_room(room: MadeRoom) -> None:
    """One line about what a chat did when its context was full."""
    one = "the oldest question leaves with its answer"
    leave = one if room.n_turns == 1 else f"the {room.n_turns} oldest questions leave with their answers"
    how = "the rest moves up" if room.is_moved else "the rest is read again"
    lead = "\n" if room.is_answering else ""
    echo(f"{lead}[context full: {leave}, {room.n_tokens} tokens; {how}]", err=True)


def _questions() -> Iterator[str]:
    """Read lines of standard input that are not empty, until /exit."""
    lines = _typed() if sys.stdin.isatty() else _piped()
    for question in map(str.strip, lines):
        if question == "/exit":
            return
        if question:
            yield question


def _typed() -> Iterator[str]:
    """Read lines of a terminal, in its encoding."""
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
    """Read lines of a file or pipe, in UTF-8 whatever the locale."""
    for no, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode("utf-8-sig" if no == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise FasaError(f"line {no} of standard input is not UTF-8 at byte {error.start}: recode it") from error
