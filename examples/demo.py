"""Convert a model, let it read a long document and go on: as stock llama.cpp does, with FASA, and started again.

    python examples/demo.py MODEL.gguf

Prints the texts, how long reading took, when the first word came, tokens per second from then on, the bytes of KV cache
that attention read, and on how many of stock's tokens FASA agrees, given the same tokens before.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

import fasa_edge
from fasa_edge.convert import convert

from llama_cpp.llama_chat_format import Jinja2ChatFormatter
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

QUESTION = "\n\nIn a few sentences, what is the text above about?"
RESERVED = 64  # tokens of the question and the chat template


@dataclass
class Result:
    """One answer; times in seconds from the question on."""

    tokens: list[int]
    text: str
    read: float
    first_word: float
    end: float
    stats: fasa_edge.FasaStats

    @property
    def tokens_per_second(self) -> float:
        """Of those after the first."""
        return (len(self.tokens) - 1) / (self.end - self.first_word)


def annotated(model: Path, console: Console) -> Path:
    """The model with a FASA profile: itself, or a converted copy beside it."""
    if fasa_edge.convert.inspect(model).annotated:
        return model
    copy = model.with_name(f"{model.stem}-fasa.gguf")
    if copy.exists() and copy.stat().st_mtime > model.stat().st_mtime:
        return copy
    with Progress(console=console, transient=True) as bars:
        tasks = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done)

        return convert(model, copy, check=False, force=True, progress=progress).path  # what follows is a check


def long_prompt(llm: fasa_edge.Llama, n_tokens: int, document: Path | None) -> list[int]:
    """The first tokens of a document and a question about it."""
    # by default a part of the Python documentation that calibration has not seen
    text = document.read_text(encoding="utf-8") if document else topics["specialnames"]
    text = llm.detokenize(llm.tokenize(text.encode(), add_bos=False)[: n_tokens - RESERVED]).decode("utf-8", "ignore")
    template = llm.metadata.get("tokenizer.chat_template")
    if template is None:
        return llm.tokenize((text + QUESTION).encode())
    chat = Jinja2ChatFormatter(template, eos_token="", bos_token="", add_generation_prompt=True)
    prompt = chat(messages=[{"role": "user", "content": text + QUESTION}]).prompt
    return llm.tokenize(prompt.encode(), special=True)


def generate(llm: fasa_edge.Llama, prompt: list[int], n_predict: int) -> Result:
    """Greedy text after the prompt."""
    llm.fasa.reset_stats()
    tokens: list[int] = []
    times = [start := time.perf_counter()]

    def reading(done: int, total: int) -> None:
        times[:] = [time.perf_counter()]

    llm.progress = reading
    for token in llm.generate(prompt, temp=0.0):
        times.append(time.perf_counter())
        tokens.append(token)
        if token == llm.token_eos() or len(tokens) == n_predict:
            break
    read, *words = (then - start for then in times)
    text = llm.detokenize(tokens).decode("utf-8", "replace")
    return Result(tokens, text, read, words[0], words[-1], llm.fasa.stats())


def agreement(llm: fasa_edge.Llama, prompt: list[int], tokens: list[int]) -> float:
    """Share of the tokens that FASA, fed with those before them, finds the likeliest."""
    llm.n_tokens = len(prompt) - 1
    agreed = 0
    previous = prompt[-1]
    for token in tokens:
        llm.eval([previous])
        agreed += llm.sample(temp=0.0) == token
        previous = token
    return agreed / len(tokens) if tokens else 1.0


def main() -> None:
    """Parse the arguments, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--document", type=Path, help="text file to read; default: a part of the Python documentation")
    parser.add_argument("--n-prompt", type=int, default=6000, help="tokens of prompt (default: %(default)s)")
    parser.add_argument("--n-predict", type=int, default=128, help="tokens to generate (default: %(default)s)")
    parser.add_argument("--budget", type=int, help="cells that FASA attends to (default: the model's own)")
    args = parser.parse_args()
    console = Console(highlight=False)

    model = annotated(args.model, console)
    results: dict[str, Result] = {}
    with tempfile.TemporaryDirectory() as folder:
        load = partial(fasa_edge.Llama, str(model), fasa_budget=args.budget, verbose=False)
        with closing(load(fasa_enabled=False)) as llm:
            n_prompt = min(args.n_prompt, llm.n_ctx() - args.n_predict - RESERVED)
            prompt = long_prompt(llm, n_prompt, args.document)
            with console.status(f"stock llama.cpp reads {len(prompt)} tokens"):
                results["stock"] = generate(llm, prompt, args.n_predict)
        for name in ("FASA", "started again"):
            with closing(load(fasa_exact=True, cache=folder)) as llm:
                with console.status(f"{name}: reads {len(prompt)} tokens"):
                    results[name] = generate(llm, prompt, args.n_predict)
                agreed = agreement(llm, prompt, results["stock"].tokens)
                settings, n_threads = llm.fasa.settings, llm.n_threads_batch

    for name, result in results.items():
        console.rule(name)
        console.print(result.text, markup=False)
    console.rule()
    console.print(f"{model.name}: {len(prompt)} tokens to read, on {n_threads} threads")
    table = Table("", "read in", "first word after", "then tokens/s", "KV cache read", "of which tips")
    for name, result in results.items():
        table.add_row(
            name,
            f"{result.read:.1f} s",
            f"{result.first_word:.1f} s",
            f"{result.tokens_per_second:.1f}",
            f"{(result.stats.bytes_kv + result.stats.bytes_tips) / 2**20:.0f} MiB",
            f"{result.stats.bytes_tips / 2**20:.0f} MiB",
        )
    console.print(table)
    stock, fasa = results["stock"], results["FASA"]
    console.print(
        f"first word x{stock.first_word / fasa.first_word:.2f}, "
        f"and x{stock.first_word / results['started again'].first_word:.0f} where the document is on disk; "
        f"then x{fasa.tokens_per_second / stock.tokens_per_second:.2f}, "
        f"budget {settings['budget']} of {len(prompt)} cells, "
        f"next-token agreement on stock's text {100 * agreed:.1f} % of {len(stock.tokens)}"
    )
    console.print(
        "stock is llama.cpp with flash attention; on some processors it decodes faster without: "
        "`fasa-edge bench` compares with both"
    )


if __name__ == "__main__":
    main()
