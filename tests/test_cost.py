"""From which depth on FASA pays on a GPU: the model of ``ggml_kernels/fasa-cost.cpp`` against what GPUs showed."""

from __future__ import annotations

import json
from pathlib import Path

from fasa_edge.runtime.ggml import base

import pytest

pytestmark = pytest.mark.check

TOOLS = Path(__file__).resolve().parent.parent / "ggml_kernels/tools"
FIGURES = json.loads((TOOLS / "gpu_figures.json").read_text())["layers"]

ERROR = 0.3
"""How far an estimate may be from a figure: one model for all GPUs, fitted to a few."""

CLEARLY = 1.05
"""A ratio that is no longer noise: here the model has to take the right side."""


def us_dense(figure: dict) -> float:
    return base.ggml_fasa_us_dense(figure["bandwidth"], figure["row_bytes"], figure["cells"])


def us_sparse(figure: dict) -> float:
    size = figure["row_bytes"], figure["tip_bytes"]
    return base.ggml_fasa_us_sparse(figure["bandwidth"], *size, figure["cells"], figure["budget"])


def name(figure: dict) -> str:
    return f"{figure['device']} {figure['heads']} {figure['cells']} cells".replace(" ", "-")


@pytest.mark.parametrize("figure", FIGURES, ids=name)
def test_estimates_are_near_what_was_measured(figure: dict) -> None:
    assert us_dense(figure) == pytest.approx(figure["us_dense"], rel=ERROR)
    if figure["us_sparse"]:  # where the library was this one
        assert us_sparse(figure) == pytest.approx(figure["us_sparse"], rel=ERROR)


@pytest.mark.parametrize("figure", [figure for figure in FIGURES if figure["us_sparse"]], ids=name)
def test_sparse_where_it_is_faster(figure: dict) -> None:
    size = figure["row_bytes"], figure["tip_bytes"]
    is_sparse = figure["cells"] >= base.ggml_fasa_min_cells(figure["bandwidth"], *size, figure["budget"])
    if figure["us_dense"] > CLEARLY * figure["us_sparse"]:
        assert is_sparse
    elif figure["us_sparse"] > CLEARLY * figure["us_dense"]:
        assert not is_sparse


@pytest.mark.parametrize("bandwidth", [100, 448, 1008, 3352, 4815])
@pytest.mark.parametrize("row_bytes", [1024, 4096, 16384])
@pytest.mark.parametrize("budget", [256, 1024, 4096])
def test_min_cells_is_where_the_estimates_meet(bandwidth: float, row_bytes: int, budget: int) -> None:
    tip_bytes = row_bytes // 16
    n = base.ggml_fasa_min_cells(bandwidth, row_bytes, tip_bytes, budget)
    dense = [base.ggml_fasa_us_dense(bandwidth, row_bytes, cells) for cells in (n - 100, n + 100)]
    sparse = [base.ggml_fasa_us_sparse(bandwidth, row_bytes, tip_bytes, cells, budget) for cells in (n - 100, n + 100)]
    assert dense[0] <= sparse[0] and dense[1] >= sparse[1]


def test_faster_memory_pays_later() -> None:
    cells = [base.ggml_fasa_min_cells(bandwidth, 4096, 256, 1024) for bandwidth in (250, 500, 1000, 2000, 4000)]
    assert cells == sorted(cells) and len(set(cells)) == 5


def test_an_unknown_bandwidth_says_nothing() -> None:
    assert base.ggml_fasa_min_cells(0, 4096, 256, 1024) == 0


def test_tips_that_cost_as_much_as_rows_never_pay() -> None:
    assert base.ggml_fasa_min_cells(1000, 4096, 4096, 1024) >= 2**31 - 1
