"""Draws what an evaluation found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from fasa_edge.eval.answers import AnswerRow
from fasa_edge.eval.methods import Method
from fasa_edge.eval.text import TextRow
from fasa_edge.io.figure import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_N_COLUMNS = 4


def draw(texts: Sequence[TextRow], answers: Sequence[AnswerRow], measure: str = "kl") -> Figure:
    """Draw a panel for each length of the prefix, quality over cells attended to; a heatmap for each task and method.

    Args:
        texts: over all texts.
        answers: by depth.
        measure: of texts, a field of :class:`fasa_edge.eval.text.TextRow`: "kl", "ppl" or "mass".

    Raises:
        FasaError: matplotlib is missing.
    """
    panels: list[tuple[Callable[..., None], list[Any], str | None]]
    panels = [(_draw_text, group, measure) for group in _grouped(texts, lambda row: row.n_prefix)]
    panels += [(_draw_map, group, None) for group in _grouped(answers, lambda row: (row.task, _name(row, True)))]
    n_columns = min(_N_COLUMNS, max(len(panels), 1))
    n_rows = -(-len(panels) // n_columns) or 1
    figure = new_figure(5.2 * n_columns + 1, 3.8 * n_rows)
    axes = figure.subplots(n_rows, n_columns, squeeze=False).flatten()
    for panel, (draw_panel, rows, argument) in zip(axes, panels, strict=False):
        draw_panel(panel, rows, argument)
    for panel in axes[len(panels) :]:
        panel.set_axis_off()
    return figure


def _grouped(rows: Iterable[Any], key: Callable[[Any], Any]) -> list[list[Any]]:
    groups: dict[Any, list[Any]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.values())


def _name(row: TextRow | AnswerRow, with_budget: bool = False) -> str:
    budget = f", budget {row.budget}" if with_budget and row.budget else ""
    return Method(row.method, n_tip=row.n_tip, settings=tuple(row.settings.items())).label + budget


_LABELS = {
    "kl": "KL(dense || method), nats",
    "ppl": "perplexity",
    "mass": "recall of attention mass",
}


def _draw_text(axes: Axes, rows: Sequence[TextRow], measure: str) -> None:
    budgets = sorted({row.budget for row in rows if row.budget})
    for lines in _grouped(rows, _name):
        values = [getattr(row, measure) for row in lines]
        if lines[0].budget:
            axes.plot([row.kept or row.budget for row in lines], values, "o-", ms=4, label=_name(lines[0]))
        elif values[0]:  # dense has no distance to itself
            axes.axhline(values[0], ls={"dense": "-", "noise": ":"}.get(lines[0].method, "--"), c="black", lw=1,
                         label=_name(lines[0]))  # fmt: skip
    axes.set(xlabel="cells attended to", ylabel=_LABELS[measure], title=f"after {rows[0].n_prefix:,} tokens")
    if budgets:
        axes.set_xscale("log")
        axes.set_xticks(budgets, [str(budget) for budget in budgets])
        axes.set_xticks([], minor=True)
    if measure == "kl" and any(row.kl for row in rows):
        axes.set_yscale("log")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))  # beside the lines, wherever they run


def _draw_map(axes: Axes, rows: Sequence[AnswerRow], _: None) -> None:
    """Draw the score by depth and length; grey where nothing was asked."""
    lengths = sorted({row.length for row in rows}, key=lambda length: length or 0)
    depths = sorted({row.depth for row in rows}, key=lambda depth: depth or 0)
    scores = [[float("nan")] * len(lengths) for _ in depths]
    for row in rows:
        score = row.of_dense if row.score is None else row.score
        if score is not None:
            scores[depths.index(row.depth)][lengths.index(row.length)] = score
    axes.set_facecolor("lightgray")
    axes.imshow(scores, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for y, line in enumerate(scores):
        for x, score in enumerate(line):
            if score == score:
                axes.text(
                    x,
                    y,
                    f"{100 * score:.0f}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if score > 0.5 else "black",
                )
    axes.set_xticks(range(len(lengths)), ["any" if length is None else f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), ["any" if depth is None else f"{depth:.2f}" for depth in depths])
    of_dense = ", of what dense answers" if any(row.score is None for row in rows) else ""
    axes.set(xlabel="tokens", ylabel="depth")
    axes.set_title(f"{rows[0].task}, {_name(rows[0], True)}: score, %{of_dense}", fontsize=9)
