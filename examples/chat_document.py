"""Chat over a long document: it is read once, and every answer is written with FASA.

    python examples/chat_document.py MODEL-fasa.gguf --document book.txt "Who is it about?" "How does it end?"

Without questions they are asked for. `fasa-edge chat MODEL -f book.txt` does the same with more options.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterable
from pathlib import Path
from pydoc_data.topics import topics

import fasa_edge


def typed() -> Iterable[str]:
    """Questions from the keyboard, until an empty line or the end of input."""
    with contextlib.suppress(EOFError):
        while question := input("\n> "):
            yield question


def shortened(llm: fasa_edge.Llama, document: str, reserved: int) -> str:
    """As much of the document as the context holds beside so many tokens."""
    tokens = llm.tokenize(document.encode(), add_bos=False)
    if len(tokens) + reserved <= llm.n_ctx():
        return document
    n_kept = max(llm.n_ctx() - reserved, 0)
    print(f"document cut to {n_kept} of {len(tokens)} tokens; give a larger --n-ctx for all of it", file=sys.stderr)
    return llm.detokenize(tokens[:n_kept]).decode("utf-8", "ignore")


def main() -> None:
    """Parse the arguments, then answer one question after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="an annotated GGUF, made by `fasa-edge convert`")
    parser.add_argument("questions", nargs="*")
    parser.add_argument("--document", type=Path, help="text file; default: a part of the Python documentation")
    parser.add_argument("--n-ctx", type=int, default=0, help="cells of the KV cache; default: the model's own")
    parser.add_argument("--max-tokens", type=int, default=256, help="of an answer (default: %(default)s)")
    parser.add_argument("--budget", type=int, help="cells that FASA attends to (default: the model's own)")
    args = parser.parse_intermixed_args()  # questions may follow the options

    llm = fasa_edge.Llama(args.model, n_ctx=args.n_ctx, fasa_budget=args.budget, verbose=False)
    text = args.document.read_text(encoding="utf-8") if args.document else topics["specialnames"]
    reserved = 4 * (args.max_tokens + 64)  # for the chat template, a few questions and their answers
    document = shortened(llm, text, reserved)

    messages = []
    for question in args.questions or typed():
        content = question if messages else f"{document}\n\n{question}"
        messages.append({"role": "user", "content": content})
        answer = ""
        llm.fasa.reset_stats()
        for chunk in llm.create_chat_completion(messages, max_tokens=args.max_tokens, temperature=0.0, stream=True):
            piece = chunk["choices"][0]["delta"].get("content", "")
            answer += piece
            print(piece, end="", flush=True)
        print(f"\n[{llm.n_tokens} tokens, KV cache read: {llm.fasa.stats().read_ratio:.0%} of dense]", file=sys.stderr)
        messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    main()
