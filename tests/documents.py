"""What the tests of the document store share: prompts, models that read them, and the files that come of that."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import fasa_edge
from fasa_edge import DocumentStore
from fasa_edge.runtime.library import llama_cpp

import numpy as np
import pytest
from runtime import TEXTS, last_logits

N_DOCUMENT = 700
N_TAIL = 640
DOCUMENT = TEXTS[0][:N_DOCUMENT]
QUESTION, OTHER = TEXTS[1][:20], TEXTS[2][:30]


def load(model: Path, cache: Any = None, **arguments: Any) -> fasa_edge.Llama:
    return fasa_edge.Llama(str(model), **({"n_ctx": 2048, "verbose": False, "cache": cache} | arguments))


def answer(llm: fasa_edge.Llama, prompt: list[int], n: int = 8) -> list[int]:
    return list(itertools.islice(llm.generate(prompt, temp=0.0), n))


def first_logits(llm: fasa_edge.Llama, prompt: list[int]) -> np.ndarray:
    answer(llm, prompt, 1)
    return last_logits(llm)


def files(folder: Path, *kinds: str) -> list[Path]:
    return sorted(path for kind in kinds or ("rows", "tail") for path in folder.glob(f"*/*-*.{kind}"))


def fill(model: Path, folder: Path, prompt: list[int] = DOCUMENT, **arguments: Any) -> None:
    """Store a prompt."""
    llm = load(model, folder, **arguments)
    answer(llm, prompt, 1)
    assert not llm.documents.report.problems
    llm.close()


def refused(model: Path, folder: Path, n: int, *reasons: str, **arguments: Any) -> None:
    """The store gives ``n`` tokens of a document and says why no more; the answer is right, and it is whole again."""
    documents = DocumentStore(folder, min_tokens=100)
    wanted = answer(load(model, **arguments), DOCUMENT)
    llm = load(model, documents, **arguments)
    assert answer(llm, DOCUMENT) == wanted
    report = llm.documents.report
    assert report.n_restored == n
    assert len(report.problems) == len(reasons)
    for reason, problem in zip(reasons, report.problems, strict=True):
        assert reason in problem
    llm.close()
    llm = load(model, documents, **arguments)
    answer(llm, DOCUMENT)
    assert (llm.documents.report.n_restored, llm.documents.report.problems) == (N_DOCUMENT - 1, [])


def interrupt(monkeypatch: pytest.MonkeyPatch, no: int, error: type[BaseException] = KeyboardInterrupt) -> None:
    """While llama_decode runs for the ``no``-th time from now on: Python notices when it returns."""
    decode, numbers = llama_cpp.llama_decode, itertools.count(1)

    def interrupted(*arguments: Any) -> int:
        status = decode(*arguments)
        if next(numbers) == no:
            raise error
        return status

    for module in ("llama_cpp", "llama_cpp.llama_cpp"):  # of ours, and of the bindings
        monkeypatch.setattr(f"{module}.llama_decode", interrupted)


def in_order(folder: Path) -> list[Path]:
    """The files of a prompt."""
    by_parent = {path.name.split("-")[0]: path for path in files(folder, "rows")}
    res, (parent,) = [], by_parent.keys() - {path.stem.split("-")[1] for path in by_parent.values()}
    while parent in by_parent:
        res.append(by_parent[parent])
        parent = res[-1].stem.split("-")[1]
    return res
