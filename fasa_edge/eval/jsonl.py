"""A user's own prompts: a file with a JSON object a line, as LongBench and RULER write them, AIME, or our own."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from fasa_edge.errors import EvalError
from fasa_edge.eval.prompt import MATCHES, Prompt

AIME_QUESTIONS = ("problem", "question", "prompt")

FORMATS = """context, question, answer_prefix, references, match, n_predict (all but references may be left out)
context, input, answers (LongBench)
input, outputs, answer_prefix (RULER; the last may be left out)
problem or question or prompt, answer (AIME)"""
"""The keys of a line, for ``--help`` and messages."""


def read_jsonl(path: str | os.PathLike[str]) -> list[Prompt]:
    """Reads prompts.

    Other keys than those of :data:`FORMATS` are ignored; ``match`` and ``n_predict`` are taken in every format.

    - LongBench: the answers are alternatives. Its files lack its instructions, so ``input`` is asked as it stands.
    - RULER: the last line of ``input`` is the question; all ``outputs`` are wanted.
    - AIME: the problem is the context, for the answer is many tokens away; it is wanted in ``\\boxed{}``.

    Returns:
        One prompt a line that is not blank, tagged with the number of its line.

    Raises:
        EvalError: the file cannot be read or holds no prompt, or a line is not UTF-8, is no JSON object, lacks a key or
            has a wrong value; the message names line, key and remedy.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise EvalError(f"prompts {path} cannot be read: {error.strerror}") from error
    prompts = [_Line(f"{path}, line {i}", line).prompt(i) for i, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise EvalError(f"{path} holds no prompt: give it a JSON object a line, with the keys\n{FORMATS}")
    return prompts


class _Line:
    """One object, with errors that say where it stands."""

    def __init__(self, where: str, line: bytes) -> None:
        self.where = where
        try:
            self.values = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise self.error(
                f"byte {line[error.start]:#04x} at offset {error.start} is not UTF-8: save the file as UTF-8"
            ) from error
        except (ValueError, RecursionError) as error:
            raise self.error(f"no JSON ({error}): give one object a line") from error
        if not isinstance(self.values, dict):
            raise self.error(f"a JSON {type(self.values).__name__}: give one object a line")

    def error(self, message: str) -> EvalError:
        return EvalError(f"{self.where}: {message}")

    def prompt(self, number: int) -> Prompt:
        formats: dict[str, Callable[[], dict]] = {
            "references": self._own,
            "outputs": self._ruler,
            "answers": self._longbench,
            "answer": self._aime,
        }
        key = next((key for key in formats if key in self.values), None)
        if key is None:
            raise self.error(f"none of the keys {', '.join(formats)} is there: a line has the keys\n{FORMATS}")
        fields = {"match": "all", "n_predict": 32, **formats[key]()}
        match = self.text("match", fields["match"])
        if match not in MATCHES:
            raise self.error(f"match = {match!r}: choose from {', '.join(MATCHES)}")
        n_predict = self.values.get("n_predict", fields["n_predict"])
        if not isinstance(n_predict, int) or isinstance(n_predict, bool) or n_predict < 1:
            raise self.error(f"n_predict = {n_predict!r}: give a whole number of tokens from 1 on")
        return Prompt(**{**fields, "match": match, "n_predict": n_predict, "tags": {"line": number}})

    def _own(self) -> dict:
        return {
            "context": self.text("context", ""),
            "question": self.text("question", ""),
            "answer_prefix": self.text("answer_prefix", "").rstrip(),
            "references": self.texts("references"),
        }

    def _longbench(self) -> dict:
        question = self.text("input")
        return {
            "context": self.text("context"),
            "question": f"\n\n{question}" if question else "",
            "answer_prefix": "\nAnswer:",
            "references": self.texts("answers"),
            "match": "any",
            "n_predict": 64,
        }

    def _ruler(self) -> dict:
        context, newline, question = self.text("input").rstrip().rpartition("\n")
        if not context:
            raise self.error("input is a single line: put the question on the last line, after the text")
        return {
            "context": context,
            "question": newline + question,
            "answer_prefix": self.text("answer_prefix", "").rstrip(),
            "references": self.texts("outputs"),
            "n_predict": 128,
        }

    def _aime(self) -> dict:
        if "context" in self.values:
            raise self.error("answer beside context: for a question about a text, name them references, a list")
        key = next((key for key in AIME_QUESTIONS if key in self.values), None)
        if key is None:
            raise self.error(f"answer without a question: add one of the keys {', '.join(AIME_QUESTIONS)}")
        answer = self.values["answer"]
        is_number = isinstance(answer, int) and not isinstance(answer, bool)
        answer = str(answer) if is_number else self.text("answer").strip()
        if not answer:
            raise self.error("answer is empty: give the right one")
        forms = dict.fromkeys([answer, answer.lstrip("0") or "0"])  # AIME writes three digits
        return {
            "context": self.text(key),
            "question": "\nPlease reason step by step, and put your final answer within \\boxed{}.\n",
            "answer_prefix": "",
            "references": tuple(f"\\boxed{{{form}}}" for form in forms),
            "match": "any",
            "n_predict": 2048,
        }

    def text(self, key: str, default: str | None = None) -> str:
        value = self.values.get(key, default)
        if value is None:
            raise self.error(f"key {key} is missing: a line has the keys\n{FORMATS}")
        return self._checked(key, value)

    def texts(self, key: str) -> tuple[str, ...]:
        values = self.values[key]
        if not isinstance(values, list) or not values:
            raise self.error(f"{key} = {values!r:.60}: give a list of at least one string")
        if not all(self._checked(key, value).strip() for value in values):
            raise self.error(f"{key} holds an empty string, which every answer contains: remove it")
        return tuple(values)

    def _checked(self, key: str, value: object) -> str:
        if not isinstance(value, str):
            raise self.error(f"{key} holds {value!r:.60}, a {type(value).__name__}: give a string")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise self.error(f"{key} holds half of a surrogate pair at character {error.start}: remove it") from error
        return value
