"""What a budget costs and what it gains: distance to dense attention and decoding speed over budgets, as a plot.

    python examples/budget_sweep.py MODEL-fasa.gguf --n-prompt 6000 --output budgets.png

Takes matplotlib: `pip install '.[plot]'` in the clone. All runs are given the same tokens of a text and differ in
attention alone; the dense one is llama.cpp's own flash attention.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import fasa_edge

import llama_cpp
import numpy as np
from matplotlib.figure import Figure


@dataclass
class Run:
    """One pass over the tokens after the prompt.

    Attributes:
        log_probs: of the next token, float64 [n_tokens, n_vocab].
        tokens_per_second: of decoding.
        read_ratio: bytes of KV cache read, of those that dense attention reads.
    """

    log_probs: np.ndarray
    tokens_per_second: float
    read_ratio: float

    def kl_from(self, dense: Run) -> float:
        """Mean KL divergence KL(dense || self) in nats."""
        return float((np.exp(dense.log_probs) * (dense.log_probs - self.log_probs)).sum(axis=-1).mean())

    def agreement(self, dense: Run) -> float:
        """Share of the tokens where both find the same next token likeliest."""
        return float((self.log_probs.argmax(axis=-1) == dense.log_probs.argmax(axis=-1)).mean())


def decode(llm: fasa_edge.Llama, tokens: list[int], n_prompt: int, **settings: int | bool) -> Run:
    """Decode the tokens after the prompt, which the cache holds, one by one."""
    llm.n_tokens = n_prompt  # forget what came after the prompt
    llm.fasa.configure(**settings)
    llm.fasa.reset_stats()
    rows, seconds = [], 0.0
    for token in tokens[n_prompt:]:
        start = time.perf_counter()
        llm.eval([token])
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(llm.ctx), (llm.n_vocab(),)).astype(np.float64)
        seconds += time.perf_counter() - start
        logits -= logits.max()
        rows.append(logits - np.log(np.exp(logits).sum()))
    return Run(np.stack(rows), len(rows) / seconds, llm.fasa.stats().read_ratio)


def plot(budgets: list[int], runs: list[Run], dense: Run, path: Path) -> None:
    """Draw KL divergence and speed over the budgets."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(budgets, [run.kl_from(dense) for run in runs], "o-")
    left.set(xlabel="budget, cells", ylabel="KL divergence to dense, nats", xscale="log", ylim=(0, None))
    right.plot(budgets, [run.tokens_per_second for run in runs], "o-", label="FASA")
    right.axhline(dense.tokens_per_second, color="gray", linestyle="--", label="dense")
    right.set(xlabel="budget, cells", ylabel="tokens/s", xscale="log", ylim=(0, None))
    right.legend()
    for axes in (left, right):
        axes.set_xticks(budgets, [str(budget) for budget in budgets], minor=False)
        axes.minorticks_off()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Parse the arguments, run, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="an annotated GGUF, made by `fasa-edge convert`")
    parser.add_argument("--document", type=Path, help="text file; default: a part of the Python documentation")
    parser.add_argument("--n-prompt", type=int, default=4000, help="tokens in the cache (default: %(default)s)")
    parser.add_argument("--n-tokens", type=int, default=64, help="tokens decoded after them (default: %(default)s)")
    parser.add_argument(
        "--budgets", type=int, nargs="+", default=[64, 128, 256, 512, 1024], help="(default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=Path("budgets.png"), help="(default: %(default)s)")
    args = parser.parse_args()

    text = args.document.read_text(encoding="utf-8") if args.document else topics["specialnames"]
    n_tokens = args.n_prompt + args.n_tokens
    llm = fasa_edge.Llama(args.model, n_ctx=n_tokens, verbose=False)
    tokens = llm.tokenize(text.encode())[:n_tokens]
    if len(tokens) < n_tokens:
        parser.error(f"the document has {len(tokens)} tokens: give a longer one, or lower --n-prompt and --n-tokens")

    llm.fasa.configure(enabled=False)
    llm.eval(tokens[: args.n_prompt])
    dense = decode(llm, tokens, args.n_prompt)
    print(f"dense        {dense.tokens_per_second:6.1f} tokens/s")
    budgets, runs = sorted(args.budgets), []
    for budget in budgets:
        run = decode(llm, tokens, args.n_prompt, enabled=True, budget=budget, min_ctx=1)
        runs.append(run)
        print(
            f"budget {budget:5} {run.tokens_per_second:6.1f} tokens/s, KL {run.kl_from(dense):.4f}, "
            f"agreement {run.agreement(dense):.1%}, KV cache read {run.read_ratio:.0%}"
        )
    plot(budgets, runs, dense, args.output)
    print(args.output)


if __name__ == "__main__":
    main()
