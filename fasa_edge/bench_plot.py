"""Draws what a bench measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fasa_edge._figure import new_figure
from fasa_edge.bench import BenchRow
from fasa_edge.bench_op import OpRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_models(rows: Sequence[BenchRow]) -> Figure:
    """Tokens per second over depth: a panel for each model, a line for each method, medians with their range.

    Raises:
        FasaError: matplotlib is missing.
    """
    panels: dict[str, dict[str, list[tuple[float, ...]]]] = {}
    for row in rows:
        lines = panels.setdefault(f"{row.model_filename}, {row.n_threads} threads", {})
        point = (row.n_depth, row.median_ts, min(row.samples_ts), max(row.samples_ts))
        lines.setdefault(row.label, []).append(point)
    return _draw(panels, "tokens in the cache", "tokens/s", log=False)


def draw_ops(rows: Sequence[OpRow]) -> Figure:
    """Time over cells: a panel for each geometry, a line for each op, medians with their range, and the memory floors.

    Raises:
        FasaError: matplotlib is missing.
    """
    panels: dict[str, dict[str, list[tuple[float, ...]]]] = {}
    for row in rows:
        lines = panels.setdefault(f"{row.heads}, K {row.type_k}, V {row.type_v}, {row.n_threads} threads", {})
        times = [row.median_ns, min(row.samples_ns), max(row.samples_ns)]
        lines.setdefault(row.label, []).append((row.n_depth, *(1e-6 * time for time in times)))
        lines.setdefault(f"{row.label}, memory floor", []).append((row.n_depth, *3 * [1e-6 * row.floor_ns]))
    return _draw(panels, "cells", "ms a layer", log=True)


def _draw(panels: dict[str, dict[str, list[tuple[float, ...]]]], xlabel: str, ylabel: str, *, log: bool) -> Figure:
    """Points are (x, median, least, greatest)."""
    figure = new_figure(6.5 * len(panels), 4.5)
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        colors: dict[str, str] = {}
        for label, points in lines.items():
            x, median, low, high = zip(*sorted(points), strict=True)
            below, above = ([abs(a - b) for a, b in zip(median, ends, strict=True)] for ends in (low, high))
            name, *floor = label.split(", memory floor")
            style = {"ls": ":", "color": colors[name]} if floor else {"marker": "o", "ms": 4, "capsize": 3}
            container = axes.errorbar(x, median, (below, above), label=None if floor else label, **style)
            colors.setdefault(name, container[0].get_color())
        axes.set(xlabel=xlabel, ylabel=ylabel)
        if log:
            axes.set(xscale="log", yscale="log")
        else:
            axes.set_ylim(bottom=0)
        axes.set_title(title, fontsize=9)
        axes.legend(fontsize=7, frameon=False)
    return figure
