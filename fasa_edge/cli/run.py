"""The command ``fasa-edge run``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fasa_edge.cli.common import (
    cache_options,
    document_store,
    echo,
    json_option,
    load_model,
    model_options,
    print_json,
    refuse_ignored,
)
from fasa_edge.cli.text import TextFile, attention_text, cached, generate, read_text, utf8
from fasa_edge.errors import FasaError
from fasa_edge.runtime.room import remedies

import click


@click.command(name="run")
@model_options
@click.option("-p", "--prompt", help="The prompt.")
@click.option("-f", "--file", "prompt_file", type=TextFile(), help="File with the prompt; - for standard input.")
@click.option("--parse-special/--no-parse-special", default=True, help="Special tokens in the prompt count as such.")
@click.option("-n", "--n-predict", type=click.IntRange(1), default=128, help="Tokens to generate.")
@click.option("--temp", "temperature", type=click.FloatRange(0), default=0.0, help="Temperature; 0: greedy.")
@click.option("--seed", type=int, default=0, help="Of the sampling.")
@click.option("--dense", is_flag=True, help="Switch FASA off.")
@cache_options
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    prompt: str | None,
    prompt_file: Any,
    parse_special: bool,
    n_predict: int,
    temperature: float,
    seed: int,
    dense: bool,
    cache: Path | None,
    cache_size: float,
    as_json: bool,
    **model: Any,
) -> None:
    """Generate text after a prompt with MODEL."""
    if (prompt is None) == (prompt_file is None):
        raise click.UsageError("give the prompt with either -p TEXT or -f FILE")
    if dense:
        refuse_ignored(ctx, ("budget",), "--dense")
    content = utf8(prompt, "-p") if prompt is not None else read_text(prompt_file).encode()
    store = document_store(ctx, cache, cache_size)
    llm = load_model(**model, fasa_enabled=False if dense else None, cache=store)
    tokens = llm.tokenize(content, special=parse_special)
    if not tokens:
        raise FasaError("the prompt is empty, and the model begins no text by itself: give some text with -p or -f")
    if len(tokens) + n_predict > llm.n_ctx():
        ways = remedies(llm, "the prompt", len(tokens), n_predict)
        if (n_free := llm.n_ctx() - len(tokens)) > 0:
            ways.insert(0, f"generate {n_free} (-n {n_free})")
        raise FasaError(
            f"{len(tokens)} tokens of prompt and {n_predict} to generate exceed the context of {llm.n_ctx()}: "
            f"{', or '.join(ways)}"
        )
    chunks = llm.create_completion(tokens, max_tokens=n_predict, temperature=temperature, seed=seed, stream=True)
    report = generate(llm, (chunk["choices"][0]["text"] for chunk in chunks), quiet=as_json)
    kept = cached(llm)
    if as_json:
        return print_json(report)
    echo(
        f"\nprompt {report['prompt_tokens']} tokens in {report['prompt_seconds']:.1f} s, "
        f"then {report['n_tokens']} tokens at {report['tokens_per_second']:.1f} tokens/s",
        err=True,
    )
    echo(attention_text(report, model["model"]), err=True)
    if report["context_full"]:
        echo(f"the text ends where the context of {llm.n_ctx()} tokens does, within a character", err=True)
    if kept:
        echo(kept, err=True)
