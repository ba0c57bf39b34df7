"""The command ``fasa-edge eval``: how good sparse decoding is, against dense attention and other methods."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fasa_edge.cli.common import (
    List,
    echo,
    json_option,
    load_arguments,
    load_options,
    model_file,
    print_json,
    progress_bars,
    setting_option,
)
from fasa_edge.config import SETTINGS
from fasa_edge.errors import FasaError, ModelError
from fasa_edge.eval import answers, tasks, text
from fasa_edge.eval.answers import AnswerRow, Item
from fasa_edge.eval.jsonl import FORMATS, read_jsonl
from fasa_edge.eval.methods import METHODS, Method, Value, expand
from fasa_edge.eval.plot import draw
from fasa_edge.eval.results import Results, identity
from fasa_edge.eval.runner import Runner
from fasa_edge.eval.text import Block, TextRow
from fasa_edge.io.figure import new_figure, to_png
from fasa_edge.io.output import check_outputs, refuse_inputs, write_bytes
from fasa_edge.io.split import model_files
from fasa_edge.io.text import read_text
from fasa_edge.runtime.library import llama_cpp
from fasa_edge.runtime.log import quiet_log

import click
from tabulate import tabulate

_NOT_SET = ("enabled", "budget", "min_ctx", "max_batch", "n_tip")
"""Settings that a method has by itself or an option of its own, and one that changes what a prompt is."""


class _Setting(click.ParamType):
    """``NAME=VALUE`` of FASA."""

    name = "name=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Value]:
        """The pair."""
        if isinstance(value, tuple):
            return value
        name, equals, item = value.partition("=")
        allowed = [name for name in SETTINGS if name not in _NOT_SET]
        if not equals or name not in allowed:
            self.fail(f"{value!r}: expected NAME=VALUE with a name of {', '.join(allowed)}", param, ctx)
        kind = SETTINGS[name].type
        if kind is str:
            return name, item
        if kind is bool:
            if item not in ("true", "false"):
                self.fail(f"{value!r}: expected true or false", param, ctx)
            return name, item == "true"
        if not re.fullmatch("-?[0-9]+", item):
            self.fail(f"{value!r}: expected a whole number", param, ctx)
        return name, int(item)


_methods = "\n\n".join(f"{name}: {about}." for name, about in METHODS.items())
_about = "\n\n".join(f"{name}: {task.about}." for name, task in tasks.TASKS.items())


@click.command(
    name="eval",
    epilog=f"Methods:\n\n{_methods}\n\nTasks of prompts, each with --lengths, most with --depths:\n\n{_about}\n\n"
    f"Groups of them: {', '.join(tasks.GROUPS)}.\n\nA line of --file is a JSON object with keys\n\n"
    + FORMATS.replace("\n", "\n\n"),
)
@click.argument("model", type=model_file)
@click.option(
    "--task",
    "names",
    type=List(str),
    multiple=True,
    metavar="NAME,...",
    help=f"{', '.join(text.TASKS)}, jsonl, or of those below.  [default: ppl,kld]",
)
@click.option(
    "--methods",
    "method_names",
    type=List(str),
    metavar="NAME,...",
    default="fasa",
    help="Of those below.",
)
@click.option(
    "--budgets", type=List(int), metavar="N,...", default="128,256,512", help=SETTINGS["budget"].help
)
@setting_option("n_tip", "--n-tip", "n_tips", type=List(int), metavar="N,...", default="the model's own")
@click.option("--set", "settings", type=_Setting(), multiple=True, help="Another setting of all sparse methods.")
@click.option("--prefix", "prefixes", type=List(int), metavar="N,...", default="2048", help="Tokens read before.")
@click.option("--blocks", "n_blocks", type=click.IntRange(1), default=4, help="Windows of each text.")
@click.option("--n-tokens", type=click.IntRange(1), default=128, help="Tokens decoded in each window.")
@click.option(
    "--batch",
    type=click.IntRange(1),
    help="Tokens of a window decoded at once.  [default: 16, or the model's max_batch if that is smaller]",
)
@click.option("--lengths", type=List(int), metavar="N,...", default="1024,2048,4096", help="Tokens of a prompt.")
@click.option("--depths", type=List(float), metavar="X,...", default="0,0.25,0.5,0.75,1", help="Of the needle, 0 to 1.")
@click.option("--seed", type=int, default=1, help="Of the first prompt.")
@click.option("--seeds", "n_seeds", type=click.IntRange(1), default=1, help="Prompts of each length and depth.")
@click.option(
    "--teacher-forced", is_flag=True, help="Rate the right answer's tokens, where there is one; none generated."
)
@click.option("--only-if-dense", is_flag=True, help="Spare the other methods the prompts that dense fails.")
@click.option(
    "--text",
    "paths",
    type=click.Path(exists=True, dir_okay=False),
    multiple=True,
    help="UTF-8 text; the first one is the filler of prompts, too.  [default: second half of pydoc_data.topics]",
)
@click.option("--file", "prompts", type=click.Path(exists=True, dir_okay=False), help="Prompts of the task jsonl.")
@click.option(
    "--resume",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Keep all that is measured here, and do not measure again what is there.",
)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="PNG",
    help="Draw quality over budget, and heatmaps of depth and length.",
)
@click.option("-f", "--force", is_flag=True, help="Replace an existing PNG.")
@load_options
@json_option
def command(
    model: str,
    names: tuple[list[str], ...],
    method_names: list[str],
    budgets: list[int],
    n_tips: list[int] | None,
    settings: tuple[tuple[str, Value], ...],
    prefixes: list[int],
    n_blocks: int,
    n_tokens: int,
    batch: int | None,
    lengths: list[int],
    depths: list[float],
    seed: int,
    n_seeds: int,
    teacher_forced: bool,
    only_if_dense: bool,
    paths: tuple[str, ...],
    prompts: str | None,
    resume: Path | None,
    plot: Path | None,
    force: bool,
    as_json: bool,
    n_ctx: int,
    **loading: Any,
) -> None:
    """Measure how good sparse decoding with MODEL is.

    Of texts: perplexity (ppl), KL divergence and agreement to dense attention (kld), recall of attention mass (mass).
    A prefix is read by dense attention, then the text goes on, decoded by each method; "noise" is dense attention
    token by token or, with --batch 1, with another number of threads. Of prompts: how many are answered; the question
    is in the part that is decoded, so that snapkv and h2o, which choose by the attention of the prefix, never see it.

    "kept" counts the cells that a method really attends to, "to dense" is the change of perplexity, "KL 99 %" the 99th
    percentile over the tokens, "top-1" how often both find the same token likeliest; with several blocks, KL has its
    standard error. Nothing is put between the parts of a prompt, and no chat template around them. Without -c the
    context has as many cells as are needed.
    """
    tasks_text, tasks_prompts = _split([name for group in names for name in group] or ["ppl", "kld"], prompts)
    load_time, settings = ({k: v for k, v in settings if (k == "n_dense_layers") is wanted} for wanted in (True, False))
    methods = expand(method_names, budgets, n_tips or (), settings)
    with_noise = expand(["noise", *method_names], budgets, n_tips or (), settings)
    weights = [*model_files(Path(model)), *([Path(loading["profile"])] if loading["profile"] else [])]
    inputs = [*weights, *map(Path, paths), *([Path(prompts)] if prompts else [])]
    if resume is not None:
        refuse_inputs(resume, [*inputs, *([plot] if plot else [])])
    if plot is not None:
        check_outputs([plot], inputs, force=force)
        new_figure(1, 1)  # that needs matplotlib, which had better be missed before hours of measurement
    vocabulary = _vocabulary(model)
    texts = _texts(paths)
    blocks: list[Block] = []
    if tasks_text:
        bos = vocabulary.token_bos() if llama_cpp.llama_vocab_get_add_bos(vocabulary._model.vocab) else None
        for name, content in texts:
            tokens = vocabulary.tokenize(content.encode(), add_bos=False)
            blocks += text.blocks_of(name, tokens, prefixes, n_blocks, n_tokens, bos)
    items = _items(tasks_prompts, prompts, vocabulary, texts[0][1], lengths, depths, range(seed, seed + n_seeds))
    # the last token of a block is only a target
    needed = max([len(block.tokens) - 1 for block in blocks] + [item.n_tokens for item in items])
    n_ctx = _context(vocabulary, n_ctx, needed, max(budgets))
    results = Results(resume)
    vocabulary.close()

    runner = Runner(model, n_ctx, **load_arguments(**loading, **{f"fasa_{k}": v for k, v in load_time.items()}))
    with runner, progress_bars() as progress:
        batch = batch or min(16, runner.max_batch)
        runner.check(methods, batch if blocks else 1)
        llm = runner.llm
        about = {
            "model": Path(model).name,
            "profile": loading["profile"] and Path(loading["profile"]).name,
            "texts": [name for name, _ in texts],
            "settings": runner.settings,
            "batch": batch,
            "n_threads": llm.n_threads,
            "n_threads_batch": llm.n_threads_batch,
        }
        key = identity(runner, weights) if resume else {}
        report = lambda stage: lambda done, total: progress(stage, done, total)  # noqa: E731
        mass = "mass" in tasks_text
        cells = text.run(
            runner, blocks, with_noise, batch, mass=mass, results=results, key=key, progress=report("texts")
        )
        text_cells = list(cells)
        found = answers.run(
            runner,
            items,
            methods,
            teacher_forced=teacher_forced,
            only_if_dense=only_if_dense,
            results=results,
            key=key,
            progress=report("prompts"),
        )
        order = {id(item): i for i, item in enumerate(items)}
        answer_cells = sorted(found, key=lambda cell: order[id(cell.item)])
    text_rows, answer_rows = text.summarize(text_cells), answers.summarize(answer_cells)
    by_depth = answers.summarize(answer_cells, by_depth=True)
    if as_json:
        by_text = text.summarize(text_cells, by_text=True)
        rows = {"text": text_rows, "by_text": by_text, "answers": answer_rows, "by_depth": by_depth}
        print_json(about | {name: [row.as_dict() for row in of] for name, of in rows.items()})
    else:
        tables = [
            [_text_table(row, tasks_text, load_time) for row in text_rows],
            [_answer_table(row, load_time) for row in answer_rows],
        ]
        tables = [tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True) for rows in tables if rows]
        echo("\n\n".join(tables))
    if plot is not None:  # last, so that nothing measured is lost if it cannot be written
        measure = next((field for task, field in _MEASURES.items() if task in tasks_text), "kl")
        write_bytes(plot, [], to_png(draw(text_rows, by_depth, measure)), force=force)
        echo(f"drawn: {plot}", err=True)


_MEASURES = {"kld": "kl", "ppl": "ppl", "mass": "mass"}


def _split(names: Sequence[str], prompts: str | None) -> tuple[list[str], list[str]]:
    """The tasks of texts, and those of prompts."""
    of_text = [name for name in text.TASKS if name in names]
    known = (*text.TASKS, "jsonl", *tasks.TASKS, *tasks.GROUPS)
    if unknown := [name for name in names if name not in known]:
        raise FasaError(f"task {unknown[0]!r} is unknown: choose from {', '.join(known)}")
    if ("jsonl" in names) != (prompts is not None):
        raise click.UsageError("--task jsonl and --file go together")
    of_prompts = tasks.expand([name for name in names if name not in (*text.TASKS, "jsonl")])
    return of_text, [*of_prompts, *(["jsonl"] if prompts else [])]


def _vocabulary(model: str) -> llama_cpp.Llama:
    """The model without its weights, to count tokens before anything takes time."""
    try:
        with quiet_log():
            return llama_cpp.Llama(model, vocab_only=True, kv_overrides={"fasa.version": 0}, verbose=False)
    except ValueError as error:
        raise ModelError(f"{error}: is it a GGUF model?") from error


def _texts(paths: Sequence[str]) -> list[tuple[str, str]]:
    """Name and content of each; calibration takes the beginning of the documentation, so here is what remains."""
    if paths:
        return [read_text(path) for path in paths]
    name, content = read_text()
    return [(name, content[len(content) // 2 :])]


def _items(
    names: Sequence[str],
    prompts: str | None,
    vocabulary: llama_cpp.Llama,
    content: str,
    lengths: Sequence[int],
    depths: Sequence[float],
    seeds: Sequence[int],
) -> list[Item]:
    count: Callable[[str], int] = lambda string: len(vocabulary.tokenize(string.encode(), add_bos=False))  # noqa: E731
    items = []
    for name in names:
        if name == "jsonl":
            items += [answers.encode(name, prompt, vocabulary) for prompt in read_jsonl(prompts)]
            continue
        task = tasks.TASKS[name]
        for length in lengths:
            for depth in depths if task.has_depth else (None,):
                for seed in seeds:
                    prompt = task.make(length, depth, seed, text=content, count_tokens=count)
                    items.append(answers.encode(name, prompt, vocabulary))
    return items


def _context(vocabulary: llama_cpp.Llama, n_ctx: int, needed: int, budget: int) -> int:
    """Cells of the contexts: as many as are needed, and as a budget names, where the user wants no other number."""
    remedy = "lower --prefix or --lengths, or shorten the prompts of --file"
    if n_ctx:
        if needed > n_ctx:
            raise FasaError(f"{needed} tokens exceed the context of {n_ctx}: raise -c, or {remedy}")
        return n_ctx
    n_ctx_train = vocabulary.metadata.get(f"{vocabulary.metadata['general.architecture']}.context_length")
    if n_ctx_train and needed > int(n_ctx_train):
        raise FasaError(
            f"{needed} tokens exceed the {n_ctx_train} that the model was trained for: {remedy}, or give -c {needed}"
        )
    return max(needed, min(budget, int(n_ctx_train or needed)))


def _method(row: TextRow | AnswerRow, load_time: dict[str, Value]) -> dict[str, object]:
    method = Method(row.method, n_tip=row.n_tip)
    if method.sparse:
        method = replace(method, settings=(*load_time.items(), *row.settings.items()))
    kept = "" if row.kept is None else f"{row.kept:.1f}"
    return {"method": method.label, "budget": row.budget or "", "kept": kept}


def _text_table(row: TextRow, names: Sequence[str], load_time: dict[str, Value]) -> dict[str, object]:
    columns = {"prefix": row.n_prefix, **_method(row, load_time)}
    if "ppl" in names:
        columns |= {"ppl": f"{row.ppl:.3f}", "to dense": f"{row.ppl_ratio - 1:+.2%}"}
    if "kld" in names:
        error = "" if row.kl_stderr is None else f" ± {row.kl_stderr:.4f}"
        columns |= {"KL": f"{row.kl:.4f}{error}", "KL 99 %": f"{row.kl_p99:.4f}", "top-1": f"{row.top1:.1%}"}
    if "mass" in names:
        is_known = row.mass is not None
        columns["mass"] = f"{row.mass:.3f}" if is_known else ""
        columns["worst layer"] = f"{row.mass_worst:.3f} (layer {row.mass_worst_layer})" if is_known else ""
    return columns


def _answer_table(row: AnswerRow, load_time: dict[str, Value]) -> dict[str, object]:
    return {
        "task": row.task,
        "length": row.length or "",
        **_method(row, load_time),
        "prompts": row.n_prompts,
        "score": "" if row.score is None else f"{row.score:.1%}",
        "dense answers": row.n_answered,
        "of those that dense answers": "" if row.of_dense is None else f"{row.of_dense:.1%}",
    }
