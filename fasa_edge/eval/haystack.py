"""What long contexts are made of: pieces of a text, needles between them, and as many pieces as fit."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Sequence

from fasa_edge.errors import EvalError
from fasa_edge.eval.prompt import Prompt

CountTokens = Callable[[str], int]
"""Counts the tokens of a string; costs, so it is called few times."""

NOISE = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
"""The filler of Mohtashami & Jaggi (arXiv 2305.16300), which RULER calls noise."""

SLACK = 2
"""Tokens that a piece may take beyond its own count, because it is joined to its neighbours."""

_MAX_CHARS = 250  # of a sentence: code and tables have none
_MAX_PARAGRAPH = 400
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])")
_BLANK_LINES = re.compile(r"\n\s*\n")


def sentences(text: str) -> list[str]:
    """Cuts running text at the ends of sentences, or after 250 characters where none ends.

    Raises:
        EvalError: the text is empty.
    """
    found = [piece for sentence in _SENTENCE_END.split(" ".join(text.split())) for piece in _wrap(sentence)]
    if not found:
        raise EvalError("the text for the filler is empty: give one with some sentences")
    return found


def paragraphs(text: str) -> list[str]:
    """Finds different paragraphs of at least 100 characters that begin with a letter; of long ones the beginning."""
    found = dict.fromkeys(_head(" ".join(part.split())) for part in _BLANK_LINES.split(text))
    return [paragraph for paragraph in found if len(paragraph) >= 100 and paragraph[0].isalpha()]


def cycle(items: Sequence[str], n: int) -> list[str]:
    """Lists ``n`` items, again from the first one after the last."""
    return list(itertools.islice(itertools.cycle(items), n))


def insert(filler: Sequence[str], needles: Sequence[tuple[float, str]], separator: str = " ") -> str:
    """Joins the filler with needles between its pieces.

    Args:
        filler: pieces; their order stays.
        needles: depth (0: before the first piece, 1: after the last) and text of each; at equal places in this order.
        separator: between two pieces.
    """
    pieces = list(filler)
    for depth, needle in reversed(sorted(needles, key=lambda item: item[0])):
        pieces.insert(round(depth * len(filler)), needle)
    return separator.join(pieces)


def random_depths(rng: random.Random, n: int) -> list[float]:
    """Draws ``n`` different depths, ascending, out of the 40 that RULER has."""
    return [i / 39 for i in sorted(rng.sample(range(40), n))]


def depth_of(depth: float | None, rng: random.Random) -> float:
    """Returns the depth that was asked for, or a random one.

    Raises:
        EvalError: it is not from 0 to 1.
    """
    if depth is None:
        return random_depths(rng, 1)[0]
    if not 0 <= depth <= 1:
        raise EvalError(f"depth = {depth} is out of range: choose 0 (start of the text) to 1 (its end)")
    return depth


def no_depth(depth: float | None) -> None:
    """Refuses a depth where a task takes none."""
    if depth is not None:
        raise EvalError(f"depth = {depth}: what this task asks for lies everywhere in the text, so it takes no depth")


def room_for_context(prompt: Prompt, count_tokens: CountTokens) -> int:
    """Counts the tokens that a prompt's length leaves beside question, answer prefix and answer; negative: too few."""
    taken = count_tokens(prompt.question) + count_tokens(prompt.answer_prefix) + prompt.n_predict
    return int(prompt.tags["length"]) - taken


def fit(build: Callable[[int], str], room: int, count_tokens: CountTokens, limit: int | None = None) -> int:
    """Finds how many pieces fit, to within one piece or 1 % of the room, by few counts.

    Args:
        build: text of so many pieces.
        room: tokens that it may have.
        count_tokens: counts them.
        limit: pieces that there are.

    Returns:
        A number of pieces whose text was counted and has at most ``room`` tokens.

    Raises:
        EvalError: not even one piece fits.
    """
    low, at_low = 0, 0
    high, at_high = None, 0
    n = 8
    while True:
        n = n if limit is None else min(n, limit)
        tokens = count_tokens(build(n))
        if tokens <= room:
            low, at_low = n, tokens
            if n == limit:
                return n
        else:
            high, at_high = n, tokens
        if high is not None and high - low == 1 or low and room - at_low <= room // 100:
            break
        if high is None:
            n = max(low + 1, min(low * room // max(at_low, 1), 16 * low))
        else:
            margin = max(1, (high - low) // 8)  # halves it when the tokens are uneven
            n = low + round((high - low) * (room - at_low) / (at_high - at_low))
            n = min(max(n, low + margin), high - margin)
    if low == 0:
        raise EvalError(
            f"{max(room, 0)} tokens are left for the text, and its first piece has {at_high}: choose a larger length"
        )
    return low


def _wrap(sentence: str) -> list[str]:
    pieces = []
    while len(sentence) > _MAX_CHARS:
        end = sentence.rfind(" ", 1, _MAX_CHARS)
        end = end if end > 0 else _MAX_CHARS
        pieces.append(sentence[:end])
        sentence = sentence[end:].lstrip()
    return [*pieces, sentence] if sentence else pieces


def _head(paragraph: str) -> str:
    head = ""
    for sentence in _SENTENCE_END.split(paragraph):
        if head and len(head) + 1 + len(sentence) > _MAX_PARAGRAPH:
            break
        head = f"{head} {sentence}".strip()
    return head[:_MAX_PARAGRAPH]
