"""The methods that are measured: what a name, a budget and a number of chunks mean as settings of FASA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fasa_edge.config import SETTINGS
from fasa_edge.errors import FasaError

REFERENCES = ("dense", "noise")
"""Methods that attend to all cells with stock's flash attention. "noise" adds in another order, which shows what the
engine makes of that: token by token where "dense" runs in batches, and where it runs token by token, too, with another
number of threads."""

PROMPT = "prompt"
"""The method that differs in how the prefix is read, by blocks, and decodes as "dense" does."""

OBSERVERS = ("snapkv", "h2o")
"""Methods that choose by the attention of the prefix, and so never see a prompt's question, which comes after it."""

_CHUNKED = ("fasa", "fasa_sum", "random", "all")  # those that ``n_tip`` changes

METHODS = {
    "dense": "all cells, stock's flash attention: the reference, always there",
    "noise": "dense again, token by token; for texts always there",
    PROMPT: "dense after a prefix that was read by blocks, with each prompt_mass",
    "all": "FASA's kernels over all cells, not all methods",
    "fasa": "the best cells by the dominant chunks",
    "fasa_sum": "the same, with a group's score the sum of its heads' softmax",
    "oracle": "the best cells by all chunks",
    "random": "the best cells by as many chunks drawn at random",
    "streaming": "the first and the last cells (StreamingLLM)",
    "quest": "pages of 16 cells by bounds of their keys (Quest)",
    "unique": "pages of 16 cells by mean and deviation of their keys (UNIQUE)",
    "snapkv": "cells of the prefix by its last tokens' attention, and beyond the budget all that is decoded (SnapKV)",
    "h2o": "the cells with most attention so far, and recent ones; the others are lost (H2O)",
}
"""Names, and what each attends to; from "fasa" on they are values of the setting ``policy``, and those after it take a
library that packages do not have (``llama-fasa-eval.h``)."""

Value = bool | int | str


@dataclass(frozen=True)
class Method:
    """One way to attend.

    Attributes:
        name: of :data:`METHODS`.
        budget: cells attended to; None for the methods that attend to all.
        n_tip: chunks scored per KV head; None: the model's own, or none are.
        settings: further settings of FASA, (name, value).
    """

    name: str
    budget: int | None = None
    n_tip: int | None = None
    settings: tuple[tuple[str, Value], ...] = ()

    @property
    def sparse(self) -> bool:
        """Whether decoding runs the FASA ops."""
        return self.name not in (*REFERENCES, PROMPT)

    @property
    def prompt_mass(self) -> int | None:
        """With which mass the prefix is read; None: by dense attention."""
        return int(dict(self.settings)["prompt_mass"]) if self.name == PROMPT else None

    @property
    def observes(self) -> bool:
        """Whether it has to see the prompt's attention."""
        return self.name in OBSERVERS

    @property
    def label(self) -> str:
        """The method without its budget, for people."""
        n_tip = [("n_tip", self.n_tip)] if self.n_tip else []
        return ", ".join([self.name, *(f"{name} {value}" for name, value in (*n_tip, *self.settings))])

    def run_time_settings(self, n_ctx: int) -> dict[str, Value]:
        """Return what it changes of a context's settings; not ``n_tip``, which a context has from its making.

        Every step is sparse, however few cells there are, and its budget does not grow with them.
        """
        if not self.sparse:
            return {"enabled": False, "exact": False, "policy": "fasa"}
        own: dict[str, Value] = {
            "enabled": True,
            "min_ctx": 1,
            "budget": self.budget or n_ctx,
            "budget_ctx": 0,
            "policy": "fasa" if self.name == "all" else self.name,
        }
        return own | dict(self.settings)

    def as_dict(self) -> dict[str, object]:
        """Return the method for JSON."""
        return {"method": self.name, "budget": self.budget, "n_tip": self.n_tip, "settings": dict(self.settings)}


DENSE = Method("dense")
"""The reference."""


def expand(
    names: Sequence[str],
    budgets: Sequence[int],
    n_tips: Sequence[int] = (),
    settings: Mapping[str, Value] | None = None,
    prompt_masses: Sequence[int] = (),
) -> list[Method]:
    """List the methods of a table, dense first.

    Args:
        names: of :data:`METHODS`.
        budgets: of each method that has one.
        n_tips: of each method that scores chunks; none for the model's own.
        settings: of all sparse methods.
        prompt_masses: of the method "prompt".

    Raises:
        FasaError: a name is unknown, or a number is out of range.
    """
    for name in names:
        if name not in METHODS:
            raise FasaError(f"method {name!r} is unknown: choose from {', '.join(METHODS)}")
    for what, numbers in (("budget", budgets), ("n_tip", n_tips)):
        if any(number < 1 for number in numbers):
            raise FasaError(f"{what} {min(numbers)}: choose 1 or more")
    for mass in prompt_masses:
        SETTINGS["prompt_mass"].check(mass)
    more = tuple(sorted((settings or {}).items()))
    methods = [DENSE]
    for name in names:
        if name in REFERENCES:
            methods.append(Method(name))
            continue
        if name == PROMPT:
            methods += [Method(name, settings=(("prompt_mass", mass),)) for mass in prompt_masses]
            continue
        tips = tuple(n_tips) if name in _CHUNKED and n_tips else (None,)
        amounts = (None,) if name == "all" else tuple(budgets)
        methods += [Method(name, budget, n_tip, more) for n_tip in tips for budget in amounts]
    return list(dict.fromkeys(methods))
