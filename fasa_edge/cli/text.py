"""The texts of ``run`` and ``chat``: what is read, what is generated, and what that took."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import fasa_edge
from fasa_edge.cli.common import echo, printable, reading_shown, size_text
from fasa_edge.errors import FasaError

import click


def _reasons(layers_dense: dict[str, int]) -> str:
    return ", ".join(f"{n} ({reason})" for reason, n in layers_dense.items()) or "0"


def generate(llm: fasa_edge.Llama, pieces: Iterable[str], quiet: bool = False) -> dict[str, Any]:
    """Print a text as it is generated, and return it with what it took; show how far a prompt is read."""
    text: list[str] = []
    first = start = time.perf_counter()
    n_prompt = n_tokens = n_held = 0
    to_terminal = sys.stdout is not None and sys.stdout.isatty()
    with reading_shown(llm):
        for piece in pieces:
            if not text:  # the prompt and the first token
                first, n_prompt = time.perf_counter(), llm.n_tokens
                llm.fasa.reset_stats()
            elif llm.n_tokens > n_held:  # fewer where a chat has made room
                n_tokens += llm.n_tokens - n_held
            n_held = llm.n_tokens
            text.append(piece)
            if not quiet:
                click.echo(printable(piece) if to_terminal else piece, nl=False)
    if not quiet:
        echo()
    n_prompt = n_prompt or llm.n_tokens
    n_tokens += max(llm.n_tokens - n_held, 0) if text else 0
    seconds = time.perf_counter() - first
    stats = llm.fasa.stats()
    return {
        "text": "".join(text),
        "prompt_tokens": n_prompt,
        "prompt_seconds": first - start,
        "n_tokens": n_tokens,
        "tokens_per_second": n_tokens / seconds if seconds > 0 else 0.0,
        "context_full": llm.is_full,
        "layers_sparse": stats.n_layers_sparse,
        "layers_dense": stats.n_layers_dense,
        "layers_exact": stats.n_layers_exact,
        "bytes_kv": stats.bytes_kv,
        "bytes_tips": stats.bytes_tips,
        "bytes_kv_dense": stats.bytes_kv_dense,
        "settings": stats.settings,
        "cache": llm.documents and asdict(llm.documents.report),
    }


def attention_text(report: dict[str, Any], model: str) -> str:
    """Say what the attention of a generated text read."""
    if not report["settings"]:
        return f"dense: {model} has no FASA profile, make one with `fasa-edge convert`"
    exact = f", {report['layers_exact']} of these exact" if report["layers_exact"] else ""
    return (
        f"KV read {size_text(report['bytes_kv'] + report['bytes_tips'])} (tips {size_text(report['bytes_tips'])}), "
        f"dense reads {size_text(report['bytes_kv_dense'])}; "
        f"layers sparse {report['layers_sparse']}, dense {_reasons(report['layers_dense'])}{exact}"
    )


_N_PROBLEMS = 3


def cached(llm: fasa_edge.Llama) -> str:
    """Say what of the latest prompt came from the document store and went there; warn of what was wrong with it."""
    if llm.documents is None:
        return ""
    report = llm.documents.report
    done = []
    if report.n_restored:
        done.append(f"{report.n_restored} of {report.n_prompt} tokens from the cache, {report.seconds_restoring:.1f} s")
    if report.bytes_written:
        done.append(f"{size_text(report.bytes_written)} kept, {report.seconds_storing:.1f} s")
    more = len(report.problems) - _N_PROBLEMS
    for problem in [*report.problems[:_N_PROBLEMS], *([f"{more} more like these"] if more > 0 else [])]:
        echo(f"Warning: {problem}", err=True)
    return "; ".join(done)


class TextFile(click.File):
    """A text in UTF-8, with or without a byte order mark; ``-`` is standard input."""

    def __init__(self) -> None:
        super().__init__(encoding="utf-8-sig")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Open the file."""
        if value == "-" and sys.stdin is None:
            self.fail("standard input is closed: give a file, or open it", param, ctx)
        return super().convert(value, param, ctx)


def utf8(text: str, option: str) -> bytes:
    """Encode an argument; Python keeps bytes that are not in the locale's encoding as lone surrogates."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise FasaError(f"{option} is not UTF-8 at character {error.start}: recode it") from error


def read_text(file: Any) -> str:
    """Read what an open :class:`TextFile` holds."""
    try:
        return file.read()
    except UnicodeDecodeError as error:
        raise FasaError(f"{file.name} is not UTF-8 at byte {error.start}: save it as UTF-8") from error
