"""The heatmap of a profile: what is drawn is what the profile says, and the PNG is whole."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from fasa_edge.convert import write_plot
from fasa_edge.convert.plot import draw, heatmap
from fasa_edge.errors import ConvertError, FasaError

import matplotlib.image
import numpy as np
import pytest
from test_schema import SHAPES, make_profile

pytestmark = pytest.mark.check

N_ROW, N_CHUNK = sum(n_head for n_head, _ in SHAPES), max(n_chunk for _, n_chunk in SHAPES)


@pytest.fixture
def report(tmp_path: Path):
    """Of a file of which only the name and the permissions are looked at."""
    file = tmp_path / "model.gguf"
    file.write_bytes(b"")
    return type("Report", (), {"path": file, "name": "A $model$", "profile": make_profile()})()


def test_values_stand_in_the_order_of_the_chunks() -> None:
    """Layers of different geometry, one of them without heads."""
    profile = make_profile()
    data = heatmap(profile)
    assert data.labels == ["0.0", "0.1", "2.0"]
    assert data.values.shape == data.dominant.shape == (N_ROW, N_CHUNK)
    for label, values, dominant in zip(data.labels, data.values, data.dominant, strict=True):
        il, ih = map(int, label.split("."))
        ranking, agreement = profile.chunks[il][ih], profile.agreement[il][ih]
        expected = dict(zip(ranking.tolist(), agreement.tolist(), strict=True))
        assert values[: len(ranking)].tolist() == [expected[chunk] for chunk in range(len(ranking))]
        assert np.isnan(values[len(ranking) :]).all()
        assert np.flatnonzero(dominant).tolist() == sorted(ranking[: profile.n_tip].tolist())


def test_the_figure_shows_the_data() -> None:
    data = heatmap(make_profile())
    axes = draw(data, "title").axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array().filled(np.nan), data.values)
    columns, rows = axes.collections[0].get_offsets().T.astype(int)
    assert list(zip(rows, columns, strict=True)) == list(zip(*np.nonzero(data.dominant), strict=True))
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0.0", "2.0"]
    assert axes.get_title() == "title"


def test_png(report, tmp_path: Path) -> None:
    png = tmp_path / "heat.png"
    write_plot(report, png)
    image = matplotlib.image.imread(png)
    assert image.ndim == 3 and image.shape[0] > 300 and image[..., :3].std() > 0.05
    with pytest.raises(ConvertError, match=r"heat\.png exists"):
        write_plot(report, png)
    before = png.read_bytes()
    write_plot(report, png, force=True)
    assert png.read_bytes() == before
    with pytest.raises(ConvertError, match="is the input .* itself"):
        write_plot(report, report.path, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heat.png", "model.gguf"]


def test_many_heads_still_make_a_png(report, tmp_path: Path) -> None:
    n_head = 6000  # 600 inches
    chunks = np.tile(np.arange(4, dtype=np.int32), (n_head, 1))
    report.profile = replace(make_profile(), n_tip=2, chunks=[chunks], agreement=[chunks.astype(np.float32)])
    write_plot(report, tmp_path / "heat.png")
    assert 20_000 < matplotlib.image.imread(tmp_path / "heat.png").shape[0] <= 30_000


def test_what_is_missing_is_named(report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(FasaError, match=r"pip install '\.\[plot\]' in the clone"):
        write_plot(report, tmp_path / "heat.png")
    report.profile = None
    with pytest.raises(ConvertError, match="no FASA profile to plot"):
        write_plot(report, tmp_path / "heat.png")
    assert not (tmp_path / "heat.png").exists()
