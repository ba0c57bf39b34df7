"""The synthetic tasks of LongBench (arXiv 2308.14508), on paragraphs of a text that is given.

LongBench samples its paragraphs from Wikipedia. Here, too, the context is nothing but the paragraphs, and the whole
instruction stands in the question (see :mod:`fasa_edge.eval.ruler`, also for the arguments). A paragraph counts once: a
text with too few of them is an error, because repeated ones would make the answer wrong.
"""

from __future__ import annotations

import random
from dataclasses import replace

from fasa_edge.errors import EvalError
from fasa_edge.eval.haystack import (
    SLACK,
    CountTokens,
    depth_of,
    fit,
    no_depth,
    paragraphs,
    room_for_context,
    sentences,
)
from fasa_edge.eval.prompt import Prompt


def passage_count(length: int, depth: None, seed: int, *, text: str, count_tokens: CountTokens) -> Prompt:
    """Asks how many different paragraphs there are among numbered ones, some of which come several times."""
    no_depth(depth)
    rng = random.Random(seed)
    unused = _shuffled(text, rng)
    share = rng.uniform(0.3, 0.9)  # of paragraphs that come for the first time
    passages: list[str] = []
    seen: list[str] = []

    while unused:
        if not seen or rng.random() < share:
            seen.append(unused.pop())
            passages.append(seen[-1])
        else:
            passages.append(rng.choice(seen))

    question = (
        "\n\nSome of the paragraphs above may be duplicates. How many unique paragraphs are there after removing "
        "duplicates? The output format should only contain the number, such as 1, 2, 3, and so on."
    )
    tags = {"length": length, "seed": seed}
    prompt = Prompt("", question, "\n\nThe final answer is:", ("",), "number", n_predict=8, tags=tags)
    n = _fit(passages, room_for_context(prompt, count_tokens), length, count_tokens)
    references = (str(len(set(passages[:n]))),)
    return replace(prompt, context=_numbered(passages[:n]), references=references)


def passage_retrieval(length: int, depth: float | None, seed: int, *, text: str, count_tokens: CountTokens) -> Prompt:
    """Asks which of the numbered paragraphs an excerpt is from: at depth 0 the first, at 1 the last.

    LongBench asks with a summary by another model; here it is the longest sentence of the paragraph but the first, at
    most 250 characters of it.
    """
    rng = random.Random(seed)
    passages = _shuffled(text, rng)
    tags = {"length": length, "depth": depth_of(depth, rng), "seed": seed}

    def ask(passage: str) -> str:
        return (
            f'\n\nWhich of the paragraphs above is this excerpt from?\n\n"{_excerpt(passage)}"\n\nPlease enter the '
            'number of the paragraph. The answer format must be like "Paragraph 1", "Paragraph 2", etc.'
        )

    prompt = Prompt("", ask(""), "\n\nThe answer is: Paragraph", ("",), "number", n_predict=8, tags=tags)
    room = room_for_context(prompt, count_tokens)
    n = _fit(passages, room, length, count_tokens)
    longest = max(count_tokens(_excerpt(passage)) for passage in passages[:n])  # the same text at all depths
    n = min(n, _fit(passages, room - longest - SLACK, length, count_tokens))
    asked = passages[round(tags["depth"] * (n - 1))]
    # All that hold the excerpt are right.
    references = tuple(str(i) for i, passage in enumerate(passages[:n], 1) if _excerpt(asked) in passage)
    return replace(prompt, context=_numbered(passages[:n]), question=ask(asked), references=references)


def _fit(passages: list[str], room: int, length: int, count_tokens: CountTokens) -> int:
    n = fit(lambda n: _numbered(passages[:n]), room, count_tokens, limit=len(passages))
    if n == len(passages):
        raise EvalError(
            f"the text has too few paragraphs for {length} tokens ({len(set(passages))} different ones of at least 100 "
            "characters, between blank lines): give a longer text or a smaller length"
        )
    return n


def _shuffled(text: str, rng: random.Random) -> list[str]:
    found = paragraphs(text)
    rng.shuffle(found)
    return found


def _numbered(passages: list[str]) -> str:
    return "\n\n".join(f"Paragraph {i}: {passage}" for i, passage in enumerate(passages, 1))


def _excerpt(passage: str) -> str:
    if not passage:
        return ""
    parts = sentences(passage)
    return max(parts[1:] or parts, key=len)
