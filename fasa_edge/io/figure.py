"""Figures of matplotlib, made without pyplot: they need no display and leave no global state."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from fasa_edge.errors import FasaError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI = 150
_MAX_PIXELS = 30_000  # in height; matplotlib refuses 65,536


def new_figure(width: float, height: float) -> Figure:
    """Makes an empty figure, its size in inches.

    Raises:
        FasaError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FasaError("plotting needs matplotlib: run pip install '.[plot]' in the clone of fasa-edge") from error
    return Figure(figsize=(width, height), layout="constrained")


def to_png(figure: Figure) -> bytes:
    """Draws a figure as the bytes of a PNG file."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=min(_DPI, _MAX_PIXELS / figure.get_figheight()))
    return png.getvalue()
