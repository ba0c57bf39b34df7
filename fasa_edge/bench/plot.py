"""Draws what a bench measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fasa_edge.bench.models import BenchRow
from fasa_edge.bench.ops import OpRow
from fasa_edge.bench.prompt_ops import PromptOpRow
from fasa_edge.io.figure import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_Lines = dict[str, list[tuple[float, ...]]]  # by label: x, median, least, greatest
_FLOOR = ", floor"


def draw_models(rows: Sequence[BenchRow]) -> Figure:
    """Draw tokens per second over depth: a panel for each model and number of tokens, a line for each method.

    Points are medians, with their range.

    Raises:
        FasaError: matplotlib is missing.
    """
    panels: dict[str, _Lines] = {}
    for row in rows:
        lines = panels.setdefault(f"{row.model_filename}, {row.n_threads} threads, {row.work}", {})
        point = (row.n_depth, row.median_ts, min(row.samples_ts), max(row.samples_ts))
        lines.setdefault(row.label, []).append(point)
    figure = _draw(panels, "tokens in the cache", "tokens/s")
    for axes in figure.axes:
        axes.set_ylim(bottom=0)
    return figure


def draw_ops(rows: Sequence[OpRow] | Sequence[PromptOpRow]) -> Figure:
    """Draw time over cells: a panel for each geometry, a line for each attention, medians with range; dotted the floor.

    Raises:
        FasaError: matplotlib is missing.
    """
    panels: dict[str, _Lines] = {}
    for row in rows:
        if row.op in ("fasa_select", "fasa_attend"):  # the parts of another
            continue
        lines = panels.setdefault(f"{row.heads}, K {row.type_k}, V {row.type_v}, {row.n_threads} threads", {})
        times = (1e-6 * ns for ns in (row.median_ns, min(row.samples_ns), max(row.samples_ns)))
        lines.setdefault(row.label, []).append((row.n_depth, *times))
        lines.setdefault(row.label + _FLOOR, []).append((row.n_depth, *3 * [1e-6 * row.floor_ns]))
    figure = _draw(panels, "cells", f"ms a layer; dotted: {rows[0].floor}")
    for axes in figure.axes:
        depths = sorted({row.n_depth for row in rows})
        axes.set(xscale="log", yscale="log")
        axes.set_xticks(depths, [f"{depth:,}" for depth in depths])
        axes.set_xticks([], minor=True)
    return figure


def _draw(panels: dict[str, _Lines], xlabel: str, ylabel: str) -> Figure:
    figure = new_figure(6.5 * len(panels), 4.5)
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        colors: dict[str, str] = {}
        for label, points in lines.items():
            x, median, low, high = zip(*sorted(points), strict=True)
            if label.endswith(_FLOOR):
                axes.plot(x, median, ":", color=colors[label.removesuffix(_FLOOR)])
                continue
            ends = ([abs(a - b) for a, b in zip(median, end, strict=True)] for end in (low, high))
            bars = axes.errorbar(x, median, list(ends), marker="o", ms=4, capsize=3, label=label)
            colors[label] = bars[0].get_color()
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.set_title(title, fontsize=9)
        axes.legend(fontsize=7, frameon=False)
    return figure
