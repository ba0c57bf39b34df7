"""Which questions about a long text are still answered: dense attention reads the text, all that follows is decoded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fasa_edge.errors import FasaError
from fasa_edge.eval.methods import DENSE, Method
from fasa_edge.eval.prompt import Prompt
from fasa_edge.eval.results import Results, hash_tokens
from fasa_edge.eval.runner import Runner
from fasa_edge.runtime.library import llama_cpp

_FIELDS = ("score", "answer", "kept")  # of a value in the results


@dataclass(frozen=True)
class Item:
    """A prompt as tokens.

    Attributes:
        task: its name.
        prompt: the prompt.
        context: its context, the same whatever follows.
        question: question and beginning of the answer.
        answer: the only reference, as it goes on; empty if there are several.
    """

    task: str
    prompt: Prompt
    context: tuple[int, ...]
    question: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def n_tokens(self) -> int:
        """Tokens that it takes of a context at most."""
        return len(self.context) + len(self.question) + max(self.prompt.n_predict, len(self.answer))


@dataclass(frozen=True)
class AnswerCell:
    """What one method answered.

    Attributes:
        item: the prompt.
        method: how it was decoded.
        score: 0 to 1.
        answer: the text generated; None if the right answer was given token by token.
        kept: cells attended to, mean over sparse layers, heads and tokens; None if no layer ran sparse.
    """

    item: Item
    method: Method
    score: float
    answer: str | None
    kept: float | None


@dataclass(frozen=True)
class AnswerRow:
    """One method on the prompts of one task, of one length, and of one depth.

    Attributes:
        task: name of the task.
        length: tokens of the prompts; None: of any.
        depth: where the needles lie; None: anywhere.
        method: of :data:`fasa_edge.eval.methods.METHODS`.
        budget: cells that it may attend to; None for all.
        n_tip: chunks scored; None for the model's own, or none.
        settings: further settings.
        n_prompts: prompts.
        kept: cells really attended to, mean over the prompts; None if no layer ran sparse.
        score: mean, 0 to 1; None if those that dense fails were left out.
        n_answered: prompts of which dense finds at least a part.
        of_dense: on these, the score over dense's; None if there are none.
    """

    task: str
    length: int | None
    depth: float | None
    method: str
    budget: int | None
    n_tip: int | None
    settings: dict[str, Any]
    n_prompts: int
    kept: float | None
    score: float | None
    n_answered: int
    of_dense: float | None

    def as_dict(self) -> dict[str, Any]:
        """Return the row for JSON."""
        return asdict(self)


def encode(task: str, prompt: Prompt, llm: llama_cpp.Llama) -> Item:
    """Turn a prompt into tokens: the context apart from what follows, so that all questions share its tokens.

    Args:
        task: name of the task.
        prompt: the prompt.
        llm: the model, its vocabulary at least.

    Raises:
        FasaError: the prompt is empty.
    """

    def tokenize(text: str) -> tuple[int, ...]:
        """Tokenize a text as it goes on after the context: SentencePiece puts a space before what begins a text."""
        head, whole = (llm.tokenize(part.encode(), add_bos=False) for part in ("\n", "\n" + text))
        if prompt.context and whole[: len(head)] == head:
            return tuple(whole[len(head) :])
        return tuple(llm.tokenize(text.encode(), add_bos=False))

    before = prompt.question + prompt.answer_prefix
    context, question = llm.tokenize(prompt.context.encode()), tokenize(before)
    adds_eos = llama_cpp.llama_vocab_get_add_eos(llama_cpp.llama_model_get_vocab(llm.model))
    if adds_eos and context[-1:] == [llm.token_eos()]:
        context = context[:-1]  # the text does not end there
    if not question:  # something has to be decoded
        context, question = context[:-1], tuple(context[-1:])
    if not question:
        raise FasaError(f"a prompt of the task {task} is empty: give it a context or a question")
    answer: tuple[int, ...] = ()
    if len(prompt.references) == 1:
        spaced = " " + prompt.references[0].lstrip()
        both = tokenize(before + spaced)
        answer = both[len(question) :] if both[: len(question)] == question else tokenize(spaced)
    return Item(task, prompt, tuple(context), question, answer)


def run(
    runner: Runner,
    items: Sequence[Item],
    methods: Sequence[Method],
    *,
    teacher_forced: bool = False,
    only_if_dense: bool = False,
    results: Results | None = None,
    key: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[AnswerCell]:
    """Answer all prompts by all methods; what the results hold already is not run again.

    The prompts run in an order in which each shares as much of its context as possible with the one before.

    Args:
        runner: the model.
        items: from :func:`encode`.
        methods: the first is dense.
        teacher_forced: an answer counts if each of its tokens, but for mere spaces, is the likeliest after the right
            ones before it, and none is generated; for prompts with one reference.
        only_if_dense: leave prompts that dense fails to dense.
        results: from former runs, and for later ones.
        key: what they depend on besides (:func:`fasa_edge.eval.results.identity`).
        progress: called with the cells done and those to do.

    Yields:
        A cell for each prompt and method, as they are measured: by prompts, in the order of the methods.

    Raises:
        FasaError: the context is too small, or llama.cpp failed.
    """
    results = results or Results()
    # as in a tree: neighbours share the most
    for n_done, item in enumerate(sorted(items, key=lambda item: item.context)):
        forced = teacher_forced and bool(item.answer)
        common = {**(key or {}), "task": item.task, "teacher_forced": forced, "prompt": _hash(item)}
        dense_score = 0.0
        for n_method, method in enumerate(methods):
            if only_if_dense and n_method and not dense_score:
                break
            key_ = common | method.as_dict()
            value = results.get(key_, _FIELDS)
            if value is None:
                observe = any(
                    other.observes and results.get(common | other.as_dict(), _FIELDS) is None for other in methods
                )
                runner.prefill(item.context, observe=observe)
                value = results.put(key_, _answer(runner, item, method, forced))
            if not n_method:
                dense_score = value["score"]
            progress(n_done * len(methods) + n_method + 1, len(items) * len(methods))
            yield AnswerCell(item, method, *(value[name] for name in _FIELDS))
        progress((n_done + 1) * len(methods), len(items) * len(methods))


def _hash(item: Item) -> str:
    prompt = item.prompt
    texts = "\0".join([prompt.match, str(prompt.n_predict), *prompt.references]).encode()
    return hash_tokens([*item.context, -1, *item.question, -1, *item.answer, -1, *texts])


def _answer(runner: Runner, item: Item, method: Method, forced: bool) -> dict[str, Any]:
    if forced:
        steps = runner.decode([*item.question, *item.answer[:-1]], method)
        found = steps.logits[len(item.question) - 1 :].argmax(axis=-1)
        # a space by itself is how an answer is written, not what it says
        said = [bool(runner.llm.detokenize([token]).strip()) for token in item.answer]
        return {"score": float((found == item.answer)[said].all()), "answer": None, "kept": steps.kept}
    prompt = item.prompt

    def text(tokens: list[int]) -> str:
        return runner.llm.detokenize(tokens).decode(errors="replace")

    def is_found(tokens: list[int]) -> bool:
        # what is contained stays so, whatever follows
        return prompt.match in ("all", "any") and prompt.score(text(tokens)) == 1

    generated = runner.generate(item.question, method, prompt.n_predict, stop=is_found)
    answer = text(generated.tokens)
    return {"score": prompt.score(answer), "answer": answer, "kept": generated.kept}


def summarize(cells: Sequence[AnswerCell], by_depth: bool = False) -> list[AnswerRow]:
    """Make a row for each task, length and method, in the order of the cells; with ``by_depth`` for each depth, too."""
    dense = {id(cell.item): cell.score for cell in cells if cell.method == DENSE}
    groups: dict[tuple, list[AnswerCell]] = {}
    for cell in cells:
        tags = cell.item.prompt.tags
        depth = tags.get("depth") if by_depth else None
        groups.setdefault((cell.item.task, tags.get("length"), depth, cell.method), []).append(cell)
    return [
        _row(task, length, depth, method, group, groups[task, length, depth, DENSE], dense)
        for (task, length, depth, method), group in groups.items()
    ]


def _row(
    task: str,
    length: int | None,
    depth: float | None,
    method: Method,
    cells: list[AnswerCell],
    dense_cells: list[AnswerCell],
    dense: dict[int, float],
) -> AnswerRow:
    kept = [cell.kept for cell in cells if cell.kept is not None]
    answered = [cell for cell in cells if dense[id(cell.item)] > 0]
    wanted = sum(dense[id(cell.item)] for cell in answered)
    return AnswerRow(
        task=task,
        length=length,
        depth=depth,
        method=method.name,
        budget=method.budget,
        n_tip=method.n_tip,
        settings=dict(method.settings),
        n_prompts=len(cells),
        kept=sum(kept) / len(kept) if kept else None,
        score=sum(cell.score for cell in cells) / len(cells) if len(cells) == len(dense_cells) else None,
        n_answered=len(answered),
        of_dense=sum(cell.score for cell in answered) / wanted if wanted else None,
    )
