"""Convert a model, then let it go on from a long document: once with dense attention, once with FASA.

    python examples/demo.py MODEL.gguf

Prints both texts, tokens per second, the bytes of KV cache that attention read, and on how many of the dense text's
tokens FASA agrees, given the same tokens before.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
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
    """One generation."""

    tokens: list[int]
    text: str
    tokens_per_second: float
    stats: fasa_edge.FasaStats


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


def evaluate_prompt(llm: fasa_edge.Llama, prompt: list[int]) -> None:
    """Bring the cache to the prompt but for its last token; what it holds already is kept."""
    n_known = llm.longest_token_prefix(llm._input_ids.tolist(), prompt[:-1])
    llm.n_tokens = n_known
    llm.eval(prompt[n_known:-1])


def generate(llm: fasa_edge.Llama, prompt: list[int], n_predict: int, dense: bool) -> Result:
    """Greedy text after the prompt."""
    llm.fasa.configure(enabled=False)
    evaluate_prompt(llm, prompt)
    llm.fasa.configure(enabled=not dense)
    llm.fasa.reset_stats()
    tokens: list[int] = []
    start = time.perf_counter()
    for token in llm.generate(prompt, temp=0.0):
        if token == llm.token_eos() or len(tokens) == n_predict:
            break
        tokens.append(token)
    seconds = time.perf_counter() - start
    text = llm.detokenize(tokens).decode("utf-8", "replace")
    return Result(tokens, text, len(tokens) / seconds, llm.fasa.stats())


def agreement(llm: fasa_edge.Llama, prompt: list[int], tokens: list[int]) -> float:
    """Share of the tokens that FASA, fed with those before them, finds the likeliest."""
    llm.fasa.configure(enabled=False)
    evaluate_prompt(llm, prompt)
    llm.fasa.configure(enabled=True)
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
    llm = fasa_edge.Llama(str(model), fasa_budget=args.budget, verbose=False)
    n_prompt = min(args.n_prompt, llm.n_ctx() - args.n_predict - RESERVED)
    prompt = long_prompt(llm, n_prompt, args.document)

    with console.status(f"reading {len(prompt)} tokens with dense attention"):
        start = time.perf_counter()
        evaluate_prompt(llm, prompt)
        prompt_seconds = time.perf_counter() - start
    console.print(f"{model.name}: read {len(prompt)} tokens in {prompt_seconds:.1f} s on {llm.n_threads_batch} threads")

    with console.status("generating"):
        results = {
            "dense": generate(llm, prompt, args.n_predict, True),
            "FASA": generate(llm, prompt, args.n_predict, False),
        }
        agreed = agreement(llm, prompt, results["dense"].tokens)

    for name, result in results.items():
        console.rule(name)
        console.print(result.text, markup=False)
    console.rule()
    table = Table("", "tokens/s", "KV cache read", "of which tips", "sparse layers")
    for name, result in results.items():
        stats = result.stats
        read, n_layers = stats.bytes_kv + stats.bytes_tips, stats.n_layers_sparse + sum(stats.n_layers_dense.values())
        table.add_row(
            name,
            f"{result.tokens_per_second:.1f}",
            f"{read / 2**20:.0f} MiB",
            f"{stats.bytes_tips / 2**20:.0f} MiB",
            f"{100 * stats.n_layers_sparse / n_layers:.0f} %",
        )
    console.print(table)
    console.print(
        f"speed x{results['FASA'].tokens_per_second / results['dense'].tokens_per_second:.2f}, "
        f"budget {llm.fasa.settings['budget']} of {len(prompt)} cells, "
        f"next-token agreement on the dense text {100 * agreed:.1f} % of {len(results['dense'].tokens)}"
    )
    console.print(
        "dense is llama.cpp with flash attention; on some processors it decodes faster without: "
        "`fasa-edge bench` compares with both"
    )


if __name__ == "__main__":
    main()
