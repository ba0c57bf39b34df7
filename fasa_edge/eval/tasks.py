"""The tasks made of prompts that ``fasa-edge eval --task`` knows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fasa_edge.errors import EvalError
from fasa_edge.eval import longbench, ruler
from fasa_edge.eval.prompt import Prompt


@dataclass(frozen=True)
class Task:
    """How prompts of a task are made.

    Attributes:
        make: ``make(length, depth, seed, text=..., count_tokens=...)``; :mod:`fasa_edge.eval.ruler` says what they are.
        has_depth: whether what is asked for lies at one place; otherwise ``depth`` must be None.
        about: one line for ``--help``.
    """

    make: Callable[..., Prompt]
    has_depth: bool
    about: str


TASKS = {
    "passkey": Task(ruler.passkey, True, "a 5-digit pass key in noise"),
    "niah_single": Task(ruler.niah_single, True, "a 7-digit number, under a key, in running text"),
    "niah_multikey": Task(ruler.niah_multikey, True, "the same among 3 numbers of other keys"),
    "niah_multivalue": Task(ruler.niah_multivalue, False, "all 4 numbers of a key"),
    "niah_multiquery": Task(ruler.niah_multiquery, False, "the numbers of 4 keys"),
    "vt": Task(ruler.vt, False, "all 5 variables of a chain of assignments"),
    "cwe": Task(ruler.cwe, False, "the 10 most common words of a list"),
    "fwe": Task(ruler.fwe, False, "the 3 most frequent words of a coded text"),
    "passage_count": Task(longbench.passage_count, False, "how many different paragraphs there are"),
    "passage_retrieval": Task(longbench.passage_retrieval, True, "which paragraph an excerpt is from"),
}

GROUPS = {
    "ruler": tuple(name for name, task in TASKS.items() if task.make.__module__ == ruler.__name__),
    "longbench-synthetic": tuple(name for name, task in TASKS.items() if task.make.__module__ == longbench.__name__),
}


def expand(names: Sequence[str]) -> list[str]:
    """Lists the tasks that names of tasks and groups stand for, each once, in the order given.

    Raises:
        EvalError: a name that is neither.
    """
    found: dict[str, None] = {}
    for name in names:
        if name not in TASKS and name not in GROUPS:
            raise EvalError(f"{name} is no task: choose from {', '.join([*TASKS, *GROUPS])}")
        found |= dict.fromkeys(GROUPS.get(name, (name,)))
    return list(found)
