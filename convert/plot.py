"""Heatmap of a profile: what each frequency chunk of each KV head is worth, and which of them are dominant."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fasa_edge.errors import ConvertError
from fasa_edge.io.figure import new_figure, to_png
from fasa_edge.io.output import check_outputs, write_bytes
from fasa_edge.io.split import model_files
from fasa_edge.schema import Profile

import numpy as np

from .report import FileReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Heatmap:
    """What is drawn: one row a KV head, layer after layer, and one column a chunk, by falling frequency.

    Attributes:
        values: float32 ``[n_row, n_chunk]``, what the objective gave each chunk; NaN where a head has fewer chunks.
        dominant: bool ``[n_row, n_chunk]``, the ``n_tip`` chunks scored at run time.
        labels: of the rows, ``layer.head``.
    """

    values: np.ndarray
    dominant: np.ndarray
    labels: list[str]


def heatmap(profile: Profile) -> Heatmap:
    """Puts the values of a profile from the order of its rankings back into that of the chunks."""
    labels = [f"{il}.{ih}" for il, chunks in enumerate(profile.chunks) for ih in range(len(chunks))]
    values = np.full((len(labels), max(chunks.shape[1] for chunks in profile.chunks)), np.nan, np.float32)
    dominant = np.zeros(values.shape, bool)
    row = 0
    for chunks, agreement in zip(profile.chunks, profile.agreement, strict=True):
        rows = slice(row, row := row + len(chunks))
        np.put_along_axis(values[rows], chunks, agreement, axis=1)
        np.put_along_axis(dominant[rows], chunks[:, : profile.n_tip], True, axis=1)
    return Heatmap(values, dominant, labels)


def write_plot(report: FileReport, path: str | Path, *, force: bool = False) -> None:
    """Draws the heatmap of a profile into a PNG; needs matplotlib and no display.

    Args:
        report: of an annotated model or a profile, see :func:`fasa_edge.convert.inspect`.
        path: file to be written.
        force: replace an existing one.

    Raises:
        ConvertError: the file holds no profile, or the PNG cannot be written.
        FasaError: matplotlib is missing.
    """
    if report.profile is None:
        raise ConvertError(f"{report.path} has no FASA profile to plot: make one with `fasa-edge convert`")
    path, inputs = Path(path), model_files(report.path)
    check_outputs([path], inputs, force=force)
    objective = report.profile.calibration.objective
    title = f"{report.name or report.path.stem}\n{objective}, n_tip = {report.profile.n_tip}"
    write_bytes(path, inputs, to_png(draw(heatmap(report.profile), title)), force=force)


def draw(data: Heatmap, title: str) -> Figure:
    """Draws a heatmap under a title.

    Raises:
        FasaError: matplotlib is missing.
    """
    n_row, n_chunk = data.values.shape
    figure = new_figure(3 + 0.1 * n_chunk, 2 + 0.1 * n_row)  # 0.1 for a chunk
    axes = figure.subplots()
    image = axes.imshow(data.values, cmap="Blues", vmin=min(0, np.nanmin(data.values)))
    rows, columns = np.nonzero(data.dominant)
    axes.scatter(columns, rows, s=2, c="tab:orange", linewidths=0, label="dominant")
    axes.set_facecolor("lightgrey")  # shows where a head has fewer chunks
    axes.set(xlabel="chunk, by falling frequency", ylabel="layer.head")
    axes.set_title(title, fontsize=8, wrap=True, parse_math=False)
    first = [row for row, label in enumerate(data.labels) if label.endswith(".0")]
    axes.set_yticks(first, [data.labels[row] for row in first], fontsize=6)
    figure.legend(loc="outside lower right", fontsize=6, frameon=False)
    figure.colorbar(image, label="value of the objective", aspect=40)
    return figure
