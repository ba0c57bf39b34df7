"""Tasks of RULER (arXiv 2404.06654) that need no data, and the pass key (Mohtashami & Jaggi, arXiv 2305.16300).

Written anew from their definitions, with these differences. The published templates announce at the top of the text
what will be asked, and the tasks ``vt`` and ``cwe`` show a solved example there. All of that is read with dense
attention, which would then mark the answer in the cache by itself; so a context here is nothing but the text, and
whatever tells what is wanted stands in the question. Keys are made of words of our own; filler and common words come
from a text that is given.

Every task takes

- ``length``: tokens of context, question, beginning of the answer and ``n_predict`` together; never more, and at most
  some 2 % or a piece of filler less,
- ``depth``: where the needle lies, 0 at the start and 1 at the end; None draws it from the seed. Tasks with their
  needles everywhere take None only,
- ``seed``: for a length and a seed the text around the needle is the same at all depths,
- ``text``: where filler and words come from, repeated if it is too short,
- ``count_tokens``: tokens of a string, as the model counts them,

and raises :class:`fasa_edge.errors.EvalError` where the length, the depth or the text does not do.
"""

from __future__ import annotations

import math
import random
import re
import string
from collections.abc import Sequence
from dataclasses import replace

from fasa_edge.errors import EvalError
from fasa_edge.eval.haystack import (
    NOISE,
    SLACK,
    CountTokens,
    cycle,
    depth_of,
    fit,
    insert,
    no_depth,
    random_depths,
    room_for_context,
    sentences,
)
from fasa_edge.eval.prompt import Prompt

_ADJECTIVES = """amber ancient brave bright calm careful cheerful clever curious dusty eager early fancy gentle golden
happy hidden honest humble jolly lively lucky mellow mighty modest noble polite proud quiet rapid silent
sunny""".split()
_NOUNS = """anchor basket bottle bridge candle castle cactus canyon desert dragon engine feather forest garden guitar
hammer island jacket kettle ladder lantern meadow mirror needle orchard pepper pocket rabbit saddle temple violin
window""".split()


def passkey(length: int, depth: float | None, seed: int, *, text: str = "", count_tokens: CountTokens) -> Prompt:
    """Hides a pass key of 5 digits in noise, which is the same for all seeds, so all prompts of a length share it."""
    rng = random.Random(seed)
    key = str(rng.randrange(10_000, 100_000))
    tags = {"length": length, "depth": depth_of(depth, rng), "seed": seed}
    prompt = Prompt("", "\nWhat is the pass key?", " The pass key is", (key,), n_predict=8, tags=tags)
    needle = "The pass key is {0}. Remember it. {0} is the pass key."
    # The same room whatever the key: a number has at most as many tokens as digits, and one for a space.
    reserved = count_tokens(needle.format("")) + 2 * (len(key) + 1) + SLACK
    n = fit(lambda n: " ".join(cycle(NOISE, n)), room_for_context(prompt, count_tokens) - reserved, count_tokens)
    return replace(prompt, context=insert(cycle(NOISE, n), [(tags["depth"], needle.format(key))]))


def niah_single(length: int, depth: float | None, seed: int, *, text: str, count_tokens: CountTokens) -> Prompt:
    """Hides a number of 7 digits, under a key, in running text."""
    return _niah(length, seed, text, count_tokens, depth=depth)


def niah_multikey(length: int, depth: float | None, seed: int, *, text: str, count_tokens: CountTokens) -> Prompt:
    """Hides 3 numbers of other keys beside that of ``niah_single``; they keep their places at all depths."""
    return _niah(length, seed, text, count_tokens, depth=depth, n_distractors=3)


def niah_multivalue(length: int, depth: None, seed: int, *, text: str, count_tokens: CountTokens) -> Prompt:
    """Hides 4 numbers of one key, all of them wanted."""
    no_depth(depth)
    return _niah(length, seed, text, count_tokens, n_values=4)


def niah_multiquery(length: int, depth: None, seed: int, *, text: str, count_tokens: CountTokens) -> Prompt:
    """Hides 4 keys with a number each, all of them wanted."""
    no_depth(depth)
    return _niah(length, seed, text, count_tokens, n_keys=4)


def vt(length: int, depth: None, seed: int, *, text: str = "", count_tokens: CountTokens) -> Prompt:
    """Tracks variables: one variable gets a number, 4 more get it from each other; all 5 names are wanted."""
    no_depth(depth)
    rng = random.Random(seed)
    names: list[str] = []
    while len(names) < 5:
        name = "".join(rng.choices(string.ascii_uppercase, k=5))
        names += [name] if name not in names else []
    value = str(rng.randrange(10_000, 100_000))
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {name} = VAR {source}" for source, name in zip(names, names[1:], strict=False)]
    question = f"\nQuestion: Find all variables that are assigned the value {value} in the text above."
    answer_prefix = (
        " Answer: According to the chain(s) of variable assignment in the text above, "
        f"{len(names)} variables are assigned the value {value}, they are: VAR"
    )
    tags = {"length": length, "seed": seed}
    prompt = Prompt("", question, answer_prefix, tuple(names), n_predict=60, tags=tags)
    needles = list(zip(random_depths(rng, len(chain)), chain, strict=True))
    return _with_needles(prompt, [" ".join(NOISE)], needles, "\n", count_tokens)


def cwe(length: int, depth: None, seed: int, *, text: str, count_tokens: CountTokens) -> Prompt:
    """Asks for common words: a numbered list of words, 10 of which come more often than the others.

    They come 30 and 3 times, as in RULER; below 4,096 tokens 6 times and once. A text with too few words is an error.
    """
    no_depth(depth)
    rng = random.Random(seed)
    question = "\nQuestion: What are the 10 most common words in the above list?"
    answer_prefix = " Answer: The top 10 words that appear most often in the list are:"
    asked = question + answer_prefix  # an answer that repeats it has found nothing
    words = sorted(word for word in set(re.findall(r"\b[a-z]{4,12}\b", text)) if word not in asked)
    rng.shuffle(words)
    common, others = words[:10], words[10:]
    n_common, n_other = (6, 1) if length < 4096 else (30, 3)

    def numbered(n: int) -> str:
        listed = common * n_common + others[:n] * n_other
        random.Random(seed).shuffle(listed)
        return " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))

    tags = {"length": length, "seed": seed}
    prompt = Prompt("", question, answer_prefix, tuple(common), n_predict=120, tags=tags)
    n = fit(numbered, room_for_context(prompt, count_tokens), count_tokens, limit=len(others))
    if n == len(others):
        raise EvalError(
            f"the text has {len(words)} different words of 4 to 12 letters, too few for {length} tokens: "
            "give a longer text or a smaller length"
        )
    return replace(prompt, context=numbered(n))


def fwe(length: int, depth: None, seed: int, *, text: str = "", count_tokens: CountTokens) -> Prompt:
    """Asks for frequent words: coded words, the k-th at a rate of k^-2; dots are the first, the next 3 are wanted."""
    no_depth(depth)
    rng = random.Random(seed)
    coded = ["".join(rng.choices(string.ascii_lowercase, k=6)) for _ in range(max(length // 50, 8))]
    ranked = ["...", *dict.fromkeys(coded)]

    def counts(n: int) -> list[int]:
        return [int(n / k**2 * 6 / math.pi**2) for k in range(1, len(ranked) + 1)]

    def shuffled(n: int) -> str:
        listed = [word for word, times in zip(ranked, counts(n), strict=True) for _ in range(times)]
        random.Random(seed).shuffle(listed)
        return " ".join(listed)

    question = (
        "\nQuestion: Do not provide any explanation. Please ignore the dots '...'. "
        "What are the three most frequently appeared words in the above coded text?"
    )
    answer_prefix = " Answer: According to the coded text above, the three most frequently appeared words are:"
    tags = {"length": length, "seed": seed}
    prompt = Prompt("", question, answer_prefix, tuple(ranked[1:4]), n_predict=50, tags=tags)
    n = fit(shuffled, room_for_context(prompt, count_tokens), count_tokens)
    if counts(n)[3] == counts(n)[4]:
        raise EvalError(f"{length} tokens leave the third most frequent word undecided: choose a larger length")
    return replace(prompt, context=shuffled(n))


def _niah(
    length: int,
    seed: int,
    text: str,
    count_tokens: CountTokens,
    depth: float | None = None,
    n_keys: int = 1,
    n_values: int = 1,
    n_distractors: int = 0,
) -> Prompt:
    """``n_keys`` keys are asked for, of ``n_values`` numbers each; where that is one number, it lies at ``depth``."""
    rng = random.Random(seed)
    pieces = sentences(text)
    start = rng.randrange(len(pieces))
    keys = _distinct_keys(rng, n_keys + n_distractors)
    values = [str(value) for value in rng.sample(range(10**6, 10**7), n_keys * n_values + n_distractors)]
    owners = [key for key in keys[:n_keys] for _ in range(n_values)] + keys[n_keys:]
    needles = [
        f"One of the special magic numbers for {key} is: {value}." for key, value in zip(owners, values, strict=True)
    ]
    n_wanted = n_keys * n_values
    depths = random_depths(rng, len(needles))
    rng.shuffle(depths)
    tags: dict[str, int | float | str] = {"length": length, "seed": seed}
    if n_wanted == 1:
        depths[0] = tags["depth"] = depth_of(depth, rng)

    asked = _listed(keys[:n_keys])
    what, noun, verb, n_predict = (
        ("What is the", "number", "is", 16) if n_wanted == 1 else ("What are all the", "numbers", "are", 64)
    )
    question = f"\n{what} special magic {noun} for {asked} mentioned in the provided text?"
    answer_prefix = f" The special magic {noun} for {asked} mentioned in the provided text {verb}:"
    prompt = Prompt("", question, answer_prefix, tuple(values[:n_wanted]), n_predict=n_predict, tags=tags)
    filler = pieces[start:] + pieces[:start]
    return _with_needles(prompt, filler, list(zip(depths, needles, strict=True)), " ", count_tokens)


def _with_needles(
    prompt: Prompt,
    filler: Sequence[str],
    needles: Sequence[tuple[float, str]],
    separator: str,
    count_tokens: CountTokens,
) -> Prompt:
    """The prompt with its context: as much filler as fits beside the needles, wherever they lie."""
    reserved = sum(count_tokens(needle) + SLACK for _, needle in needles)
    n = fit(lambda n: separator.join(cycle(filler, n)), room_for_context(prompt, count_tokens) - reserved, count_tokens)
    return replace(prompt, context=insert(cycle(filler, n), needles, separator))


def _distinct_keys(rng: random.Random, n: int) -> list[str]:
    return ["-".join(pair) for pair in zip(rng.sample(_ADJECTIVES, n), rng.sample(_NOUNS, n), strict=True)]


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])}, and {words[-1]}"
