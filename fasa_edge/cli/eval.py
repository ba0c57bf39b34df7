"""The command ``fasa-edge eval``: how good sparse decoding is, against dense attention and other methods."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fasa_edge.cli.common import (
    List,
    cache_options,
    check_results,
    document_store,
    echo,
    force_option,
    json_option,
    load_arguments,
    load_options,
    model_file,
    output_option,
    plot_option,
    print_result,
    progress_bars,
    refuse_ignored,
    setting_option,
    write_plot,
)
from fasa_edge.config import SETTINGS
from fasa_edge.eval import AnswerRow, Evaluation, TextRow, evaluate, evaluation, tasks, text
from fasa_edge.eval.jsonl import FORMATS
from fasa_edge.eval.methods import METHODS, PROMPT, Method, Value
from fasa_edge.eval.plot import draw
from fasa_edge.io.split import model_files

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


_OF_TEXTS = ("prefixes", "n_blocks", "n_tokens", "batch")
_OF_PROMPTS = ("lengths", "depths", "seed", "n_seeds", "teacher_forced", "only_if_dense")
_OF_MADE_PROMPTS = ("lengths", "depths", "seed", "n_seeds")
_OF_SPARSE = ("budgets", "n_tips", "settings")
"""Options that only one kind of task, or of method, heeds."""

_OWN = ("methods", "budgets", "prompt_masses", "prefixes", "n_blocks", "n_tokens", "batch", "lengths", "depths",
        "teacher_forced", "only_if_dense", "n_ctx")  # fmt: skip
"""Options that :func:`fasa_edge.eval.evaluate` takes as they are."""


def _list(name: str, kind: type, default: Sequence, help: str, *more: str) -> Callable:
    metavar = {str: "NAME,...", int: "N,...", float: "X,..."}[kind]
    default = ",".join(f"{item:g}" if kind is float else str(item) for item in default)
    return click.option(name, *more, type=List(kind), metavar=metavar, default=default, help=help)


_methods = "\n\n".join(f"{name}: {about}." for name, about in METHODS.items())
_about = "\n\n".join(f"{name}: {task.about}." for name, task in tasks.TASKS.items())


@click.command(
    name="eval",
    epilog=f"Methods (those after fasa take a build with FASA_EVAL, as of `make install`):\n\n{_methods}\n\n"
    f"Tasks of prompts, each with --lengths, most with --depths:\n\n{_about}\n\n"
    f"Groups of them: {', '.join(tasks.GROUPS)}.\n\nA line of --file is a JSON object with keys\n\n"
    + FORMATS.replace("\n", "\n\n"),
)
@click.argument("model", type=model_file)
@click.option(
    "--task",
    "groups",
    type=List(str),
    multiple=True,
    metavar="NAME,...",
    help=f"{', '.join(text.TASKS)}, jsonl, or of those below.  [default: {','.join(evaluation.TASKS)}]",
)
@_list("--methods", str, evaluation.METHODS, "Of those below.")
@_list("--budgets", int, evaluation.BUDGETS, f"{SETTINGS['budget'].help} Here it does not grow.")
@setting_option("n_tip", "--n-tip", "n_tips", type=List(int), metavar="N,...", default="the model's own")
@_list("--prompt-mass", int, evaluation.PROMPT_MASSES, "Of the method prompt, in thousandths.", "prompt_masses")
@click.option("--set", "settings", type=_Setting(), multiple=True, help="Another setting of all sparse methods.")
@_list("--prefix", int, evaluation.PREFIXES, "Tokens read before.", "prefixes")
@click.option("--blocks", "n_blocks", type=click.IntRange(1), default=evaluation.N_BLOCKS, help="Windows of each text.")
@click.option("--n-tokens", type=click.IntRange(1), default=evaluation.N_TOKENS, help="Tokens decoded in each window.")
@click.option(
    "--batch",
    type=click.IntRange(1),
    help="Tokens of a window decoded at once.  [default: 16, or the model's max_batch if that is smaller]",
)
@_list("--lengths", int, evaluation.LENGTHS, "Tokens of a prompt.")
@_list("--depths", float, evaluation.DEPTHS, "Of the needle, 0 to 1.")
@click.option("--seed", type=int, default=1, help="Of the first prompt.")
@click.option("--seeds", "n_seeds", type=click.IntRange(1), default=1, help="Prompts of each length and depth.")
@click.option(
    "--teacher-forced", is_flag=True, help="Rate the right answer's tokens, where there is one; none generated."
)
@click.option("--only-if-dense", is_flag=True, help="Spare the other methods the prompts that dense fails.")
@click.option(
    "--text",
    "texts",
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
@cache_options
@output_option
@plot_option("Draw quality over budget, and heatmaps of depth and length.")
@force_option
@load_options
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    model: str,
    groups: tuple[list[str], ...],
    n_tips: list[int] | None,
    settings: tuple[tuple[str, Value], ...],
    texts: tuple[str, ...],
    prompts: str | None,
    seed: int,
    n_seeds: int,
    resume: Path | None,
    cache: Path | None,
    cache_size: float,
    output: Path | None,
    plot: Path | None,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure how good sparse decoding with MODEL is.

    Of texts: perplexity (ppl), KL divergence and agreement to dense attention (kld), recall of attention mass (mass).
    A prefix is read by dense attention ("prompt": by blocks), then the text goes on, decoded by each method; "noise"
    is dense attention token by token or, with --batch 1, with another number of threads. Of prompts: how many are
    answered; the question is in the part that is decoded, so that snapkv and h2o, which choose by the attention of the
    prefix, never see it.

    "kept" counts the cells that a method really attends to, "to dense" is the change of perplexity, "KL 99 %" the 99th
    percentile over the tokens, "top-1" how often both find the same token likeliest; with several blocks, KL has its
    standard error. Nothing is put between the parts of a prompt, and no chat template around them. Without -c the
    context has as many cells as are needed.
    """
    names = [name for group in groups for name in group] or list(evaluation.TASKS)
    if ("jsonl" in names) != (prompts is not None):
        raise click.UsageError("--task jsonl and --file go together")
    of_texts, of_prompts = evaluation.split_tasks(names, prompts)
    if not of_texts:
        refuse_ignored(ctx, _OF_TEXTS, f"--task {','.join(names)}, which reads prompts")
    if not of_prompts:
        refuse_ignored(ctx, _OF_PROMPTS, f"--task {','.join(names)}, which reads texts")
    if of_prompts == ["jsonl"]:
        ignored = (*_OF_MADE_PROMPTS, *(() if of_texts else ("texts",)))
        refuse_ignored(ctx, ignored, "--task jsonl, whose prompts are in a file")
    elif of_prompts and not any(tasks.TASKS[name].has_depth for name in of_prompts if name != "jsonl"):
        refuse_ignored(ctx, ("depths",), f"--task {','.join(names)}, which has no needle")
    if PROMPT not in options["methods"]:
        refuse_ignored(
            ctx, ("prompt_masses",), f"--methods {','.join(options['methods'])}, of which none reads by blocks"
        )
    if not any(Method(name).sparse for name in options["methods"]):
        refuse_ignored(ctx, _OF_SPARSE, f"--methods {','.join(options['methods'])}, which attend to all cells")
    profile = options["profile"]
    inputs = [*model_files(Path(model)), *(Path(path) for path in (profile, prompts, *texts, resume) if path)]
    check_results([output], inputs, plot, force=force)
    store = document_store(ctx, cache, cache_size)
    own = {name: options.pop(name) for name in _OWN}
    with progress_bars() as progress:
        if store is not None:
            store.progress = progress
        found = evaluate(
            model,
            cache=store,
            tasks=names,
            n_tips=n_tips or (),
            settings=dict(settings),
            texts=texts,
            prompts=prompts,
            seeds=range(seed, seed + n_seeds),
            resume=resume,
            progress=progress,
            **own,
            **load_arguments(**options),
        )
    if store is not None:
        n_prefixes = found.n_read + found.n_restored
        echo(f"{found.n_restored} of {n_prefixes} tokens of prefixes from the cache", err=True)
    print_result(found.as_dict(), _tables(found, of_texts, settings), as_json=as_json, output=output, force=force)
    measure = next((field for task, field in _MEASURES.items() if task in of_texts), "kl")
    write_plot(plot, lambda: draw(found.text, found.by_depth, measure), force=force)


_MEASURES = {"kld": "kl", "ppl": "ppl", "mass": "mass"}


def _tables(found: Evaluation, of_texts: Sequence[str], settings: Sequence[tuple[str, Value]]) -> str:
    """What was found, for people: a table of texts, and one of prompts."""
    at_load = {name: value for name, value in settings if SETTINGS[name].is_fixed}
    tables = [
        [_text_table(row, of_texts, at_load) for row in found.text],
        [_answer_table(row, at_load) for row in found.answers],
    ]
    texts = [tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True) for rows in tables if rows]
    return "\n\n".join(texts)


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
