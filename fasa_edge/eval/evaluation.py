"""``evaluate``: what ``fasa-edge eval`` prints."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fasa_edge.config import SETTINGS
from fasa_edge.errors import FasaError, ModelError
from fasa_edge.eval import answers, text
from fasa_edge.eval import tasks as registry
from fasa_edge.eval.answers import AnswerRow, Item
from fasa_edge.eval.jsonl import read_jsonl
from fasa_edge.eval.methods import Value, expand
from fasa_edge.eval.results import Results, identity
from fasa_edge.eval.runner import Runner
from fasa_edge.eval.text import Block, TextRow
from fasa_edge.io.output import refuse_inputs
from fasa_edge.io.split import model_files
from fasa_edge.io.text import read_text
from fasa_edge.runtime.library import llama_cpp
from fasa_edge.runtime.log import quiet_log
from fasa_edge.runtime.sequence import READING
from fasa_edge.runtime.store import DocumentStore

TASKS = ("ppl", "kld")
METHODS = ("fasa",)
BUDGETS = (128, 256, 512)
PROMPT_MASSES = (999, 990, 950)
PREFIXES = (2048,)
N_BLOCKS = 4
N_TOKENS = 128
LENGTHS = (1024, 2048, 4096)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)

_MAX_BATCH = 16

_AT_LOAD = [name for name, setting in SETTINGS.items() if setting.is_fixed]


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` found.

    Attributes:
        model: name of the file.
        profile: name of the profile that replaced its own, if one did.
        texts: names of the texts.
        settings: of the model, but for what a method changes; empty without a profile.
        batch: tokens of a window decoded at once.
        n_threads: threads that decoded single tokens.
        n_threads_batch: threads that decoded more.
        n_read: tokens of prefixes that were read.
        n_restored: tokens of prefixes that came from ``cache`` instead.
        text: a row for each prefix and method, over all texts.
        by_text: the same for each text.
        answers: a row for each task of prompts, length and method.
        by_depth: the same for each depth.
    """

    model: str
    profile: str | None
    texts: list[str]
    settings: dict[str, Any]
    batch: int
    n_threads: int
    n_threads_batch: int
    n_read: int
    n_restored: int
    text: list[TextRow]
    by_text: list[TextRow]
    answers: list[AnswerRow]
    by_depth: list[AnswerRow]

    def as_dict(self) -> dict[str, Any]:
        """Return the same as plain values for JSON."""
        rows = {name: [row.as_dict() for row in getattr(self, name)] for name in _ROWS}
        return {name: value for name, value in vars(self).items() if name not in _ROWS} | rows


_ROWS = ("text", "by_text", "answers", "by_depth")


def evaluate(
    model: str | os.PathLike[str],
    *,
    tasks: Sequence[str] = TASKS,
    methods: Sequence[str] = METHODS,
    budgets: Sequence[int] = BUDGETS,
    n_tips: Sequence[int] = (),
    settings: Mapping[str, Value] | None = None,
    prompt_masses: Sequence[int] = PROMPT_MASSES,
    texts: Sequence[str | os.PathLike[str]] = (),
    prefixes: Sequence[int] = PREFIXES,
    n_blocks: int = N_BLOCKS,
    n_tokens: int = N_TOKENS,
    batch: int | None = None,
    prompts: str | os.PathLike[str] | None = None,
    lengths: Sequence[int] = LENGTHS,
    depths: Sequence[float] = DEPTHS,
    seeds: Sequence[int] = (1,),
    teacher_forced: bool = False,
    only_if_dense: bool = False,
    resume: str | os.PathLike[str] | None = None,
    n_ctx: int = 0,
    cache: str | os.PathLike[str] | DocumentStore | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    **options: Any,
) -> Evaluation:
    """Measure how good sparse decoding with a model is, against dense attention and other methods.

    A prefix is read by dense attention, then the text goes on, or the question comes, decoded by each method.

    Args:
        model: a GGUF, annotated or with ``fasa_profile``; without a profile only the methods dense and noise run.
        tasks: ``ppl``, ``kld``, ``mass`` of texts; of prompts ``jsonl`` and :data:`fasa_edge.eval.tasks.TASKS`.
        methods: names in :data:`fasa_edge.eval.methods.METHODS`; dense and its noise are always measured.
        budgets: cells attended to, of each method that has a budget.
        n_tips: chunks scored per KV head, of each method that scores some; none for the model's own.
        settings: others of all sparse methods, by name.
        prompt_masses: with which the method "prompt" reads prefixes.
        texts: UTF-8 files, the first also the filler of prompts; none for the second half of Python's documentation.
        prefixes: tokens read before those that are decoded.
        n_blocks: windows of each text.
        n_tokens: tokens decoded in each window.
        batch: of these, decoded at once; None for 16, or the model's ``max_batch`` if that is smaller.
        prompts: file of the task ``jsonl``, see :data:`fasa_edge.eval.jsonl.FORMATS`.
        lengths: tokens of a prompt.
        depths: of the needle in it, 0 to 1.
        seeds: one for each prompt of a length and depth.
        teacher_forced: rate the tokens of the right answer where there is one, and generate none.
        only_if_dense: spare the other methods the prompts that dense attention fails.
        resume: file that keeps all that is measured; what is there is not measured again.
        n_ctx: cells of a context; 0: as many as are needed.
        cache: folder, or a store with settings, that keeps the prefixes that are read: those that begin alike have the
            rest read only, also in a later run with other methods, budgets or settings. What is measured is the same to
            the bit, with sliding windows up to rounding; only with methods that observe the prompt it is read anyway.
        progress: called with a stage, what is done and what there is to do; within the others, stage ``"reading"`` is
            a prefix being read, in tokens.
        options: other arguments of :class:`fasa_edge.Llama`.

    Raises:
        FasaError: a name is unknown; a text or the context too short; the model has no profile; or memory is short.
        ConvertError: a text cannot be read, or ``resume`` is one of the inputs.
    """
    of_texts, of_prompts = split_tasks(tasks, prompts)
    if of_texts and not prefixes:
        raise FasaError(f"nothing to measure for {', '.join(of_texts)}: give at least one of prefixes")
    if not of_texts and not of_prompts:
        raise FasaError("nothing to measure: give at least one of tasks")
    settings = settings or {}
    at_load = {f"fasa_{name}": value for name, value in settings.items() if name in _AT_LOAD}
    settings = {name: value for name, value in settings.items() if name not in _AT_LOAD}
    chosen = expand(methods, budgets, n_tips, settings, prompt_masses)
    with_noise = expand(["noise", *methods], budgets, n_tips, settings, prompt_masses)
    profile = options.get("fasa_profile")
    weights = [*model_files(Path(model)), *([Path(profile)] if profile else [])]
    if resume is not None:
        refuse_inputs(Path(resume), [*weights, *map(Path, texts), *([Path(prompts)] if prompts else [])])
    vocabulary = _vocabulary(os.fspath(model))
    named = _texts(texts)
    blocks: list[Block] = []
    if of_texts and prefixes:
        bos = vocabulary.token_bos() if llama_cpp.llama_vocab_get_add_bos(vocabulary._model.vocab) else None
        for name, content in named:
            tokens = vocabulary.tokenize(content.encode(), add_bos=False)
            blocks += text.blocks_of(name, tokens, prefixes, n_blocks, n_tokens, bos)
    items = _items(of_prompts, prompts, vocabulary, named[0][1], lengths, depths, seeds)
    if of_prompts and not items:
        raise FasaError(
            f"nothing to measure for {', '.join(of_prompts)}: give at least one of lengths, depths and seeds"
        )
    # the last token of a block is only a target
    needed = max([len(block.tokens) - 1 for block in blocks] + [item.n_tokens for item in items])
    n_ctx = _context(vocabulary, n_ctx, needed, max(budgets, default=0))
    results = Results(None if resume is None else Path(resume))
    vocabulary.close()

    read_progress = partial(progress, READING)
    store = DocumentStore(cache) if isinstance(cache, str | os.PathLike) else cache
    with Runner(os.fspath(model), n_ctx, read_progress=read_progress, store=store, **options, **at_load) as runner:
        try:
            batch = batch or min(_MAX_BATCH, runner.max_batch)
            runner.check(chosen, batch if blocks else 1)
            key = identity(runner, weights) if resume is not None else {}
            mass = "mass" in of_texts
            report = partial(progress, "texts")
            windows = list(
                text.run(runner, blocks, with_noise, batch, mass=mass, results=results, key=key, progress=report)
            )
            unordered = answers.run(
                runner,
                items,
                chosen,
                teacher_forced=teacher_forced,
                only_if_dense=only_if_dense,
                results=results,
                key=key,
                progress=partial(progress, "prompts"),
            )
        finally:
            for problem in runner.problems:
                warnings.warn(problem, stacklevel=2)
        order = {id(item): i for i, item in enumerate(items)}
        answered = sorted(unordered, key=lambda cell: order[id(cell.item)])
        return Evaluation(
            model=Path(model).name,
            profile=profile and Path(profile).name,
            texts=[name for name, _ in named],
            settings=runner.settings,
            batch=batch,
            n_threads=runner.llm.n_threads,
            n_threads_batch=runner.llm.n_threads_batch,
            n_read=runner.n_read,
            n_restored=runner.n_restored,
            text=text.summarize(windows),
            by_text=text.summarize(windows, by_text=True),
            answers=answers.summarize(answered),
            by_depth=answers.summarize(answered, by_depth=True),
        )


def split_tasks(names: Sequence[str], prompts: str | os.PathLike[str] | None) -> tuple[list[str], list[str]]:
    """The tasks of texts, and those of prompts.

    Raises:
        FasaError: one is unknown, or ``jsonl`` comes without a file or the other way round.
    """
    of_texts = [name for name in text.TASKS if name in names]
    known = (*text.TASKS, "jsonl", *registry.TASKS, *registry.GROUPS)
    if unknown := [name for name in names if name not in known]:
        raise FasaError(f"task {unknown[0]!r} is unknown: choose from {', '.join(known)}")
    if ("jsonl" in names) != (prompts is not None):
        raise FasaError("the task jsonl and a file of prompts (--file) go together: give both or none")
    of_prompts = registry.expand([name for name in names if name not in (*text.TASKS, "jsonl")])
    return of_texts, [*of_prompts, *(["jsonl"] if prompts is not None else [])]


def _vocabulary(model: str) -> llama_cpp.Llama:
    """The model without its weights, to count tokens before anything takes time."""
    try:
        with quiet_log():
            return llama_cpp.Llama(model, vocab_only=True, kv_overrides={"fasa.version": 0}, verbose=False)
    except ValueError as error:
        raise ModelError(f"{error}: is it a GGUF model?") from error


def _texts(paths: Sequence[str | os.PathLike[str]]) -> list[tuple[str, str]]:
    """Name and content of each; calibration takes the beginning of the documentation, so here is what remains."""
    if paths:
        return [read_text(Path(path)) for path in paths]
    name, content = read_text()
    return [(name, content[len(content) // 2 :])]


def _items(
    names: Sequence[str],
    prompts: str | os.PathLike[str] | None,
    vocabulary: llama_cpp.Llama,
    content: str,
    lengths: Sequence[int],
    depths: Sequence[float],
    seeds: Sequence[int],
) -> list[Item]:
    count: Callable[[str], int] = lambda string: len(vocabulary.tokenize(string.encode(), add_bos=False))  # noqa: E731
    items = []
    for name in names:
        if name == "jsonl" and prompts is not None:
            items += [answers.encode(name, prompt, vocabulary) for prompt in read_jsonl(Path(prompts))]
            continue
        task = registry.TASKS[name]
        for length in lengths:
            for depth in depths if task.has_depth else (None,):
                for seed in seeds:
                    prompt = task.make(length, depth, seed, text=content, count_tokens=count)
                    items.append(answers.encode(name, prompt, vocabulary))
    return items


def _context(vocabulary: llama_cpp.Llama, n_ctx: int, needed: int, budget: int) -> int:
    """Cells of the contexts: as many as are needed, and as a budget names, where the user wants no other number."""
    remedy = "lower --prefix or --lengths, or shorten the prompts of --file"
    n_ctx_train = vocabulary.metadata.get(f"{vocabulary.metadata['general.architecture']}.context_length")
    if n_ctx:
        if needed > n_ctx:
            fits = needed <= int(n_ctx_train or needed)
            larger = f"give -c {needed}, or " if fits else f"the model was trained for {n_ctx_train}: "
            raise FasaError(f"{needed} tokens exceed the context of {n_ctx}: {larger}{remedy}")
        return n_ctx
    if n_ctx_train and needed > int(n_ctx_train):
        raise FasaError(
            f"{needed} tokens exceed the {n_ctx_train} that the model was trained for: {remedy}, or give -c {needed}"
        )
    return max(needed, min(budget, int(n_ctx_train or needed)))
