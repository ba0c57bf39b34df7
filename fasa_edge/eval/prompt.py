"""A question about a long text, with what a right answer says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

MATCHES = ("all", "any", "number")


@dataclass(frozen=True)
class Prompt:
    """One question of a task.

    The context is read with dense attention, which would answer by itself if it held the question; so the question and
    the beginning of the answer are decoded token by token, with the method that is measured.

    Attributes:
        context: the long text, prefilled.
        question: what follows it; decoded.
        answer_prefix: how the answer begins; decoded, too, and with no trailing space: the first tokens of an answer
            bring theirs.
        references: what a right answer contains, one string each.
        match: "all": the score is the share of references found; "any": 1 if one of them is found; "number": 1 if the
            first number of the answer is one of them.
        n_predict: tokens to generate.
        tags: what varies in a task, as ``{"length": 4096, "depth": 0.5, "seed": 3}``, for tables and plots.
    """

    context: str
    question: str
    answer_prefix: str
    references: tuple[str, ...]
    match: str = "all"
    n_predict: int = 32
    tags: Mapping[str, int | float | str] = field(default_factory=dict)

    def score(self, answer: str) -> float:
        """Scores 0 to 1, by substrings of any case (RULER's string_match_all and string_match_part), or by a number."""
        if self.match == "number":
            number = re.search(r"\d+", answer)
            return float(number is not None and number[0] in self.references)
        found = [reference.lower() in answer.lower() for reference in self.references]
        return float(any(found)) if self.match == "any" else sum(found) / len(found)
