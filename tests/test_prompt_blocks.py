"""FASA_ATTEND for the tokens of a prompt with tips: to the blocks of cells that matter to them."""

from __future__ import annotations

from dataclasses import replace

from fasa_edge.runtime import ggml

import numpy as np
import pytest
import reference
from ggml_graph import F16, Graph
from op_cases import NMSE_REFERENCE, Case, Shape, make_case

SHAPES = [
    Shape(n_kv=608, n_tokens=100, n_dim=48),
    Shape(128, 8, 2, n_kv=1024, n_tokens=64, n_dim=64),
    Shape(64, 14, 2, n_kv=992, n_tokens=30, n_dim=48),
    Shape(80, 4, 4, n_kv=256, n_tokens=3, n_dim=26),
]

ggml.declare({"ggml_fasa_attend_set_tips": (None, *[ggml.ptr] * 5, ggml.f32)})


def make_prompt(shape: Shape) -> Case:
    """Queries that find few keys in the cache; what is hidden at its end are cells that nobody has used."""
    case = make_case(replace(shape, n_hidden=shape.n_kv // 5))
    n_group = shape.n_head // shape.n_head_kv
    rng = np.random.default_rng(1)
    for it in range(shape.n_tokens):
        cells = rng.integers(0, shape.n_kv // 2, 3) // 50 * 50 + 3
        case.q[it] = 6 * case.k[cells].mean(axis=0).repeat(n_group, axis=0) + 0.3 * case.q[it]
    return case


def run(case: Case, mass: float | None, n_threads: int = 2, q: np.ndarray | None = None) -> np.ndarray:
    """mass None: without tips."""
    n_kv, n_head_kv, _ = case.k.shape
    with Graph() as g:
        k = g.tensor(case.k.astype(np.float16))
        tips = g.ggml_fasa_new_tips(n_kv, case.dims.shape[1], n_head_kv, 1)
        g.clear(tips)
        kept = [g.tensor(case.dims), g.tensor(case.ranges)]
        stored = g.ggml_fasa_store(tips, g.tensor(case.k), *kept, g.tensor(np.arange(n_kv, dtype=np.int64)), F16)
        asked = g.tensor(case.q if q is None else q)
        out = g.ggml_fasa_attend(
            g.tensor(case.q), k, g.tensor(case.v), None, g.tensor(case.mask), None, case.scale, 0.0
        )
        if mass is not None:
            ggml.base.ggml_fasa_attend_set_tips(out, asked, tips, *kept, mass)
        g.run(stored, out, n_threads=n_threads)
        return g.read(out, np.float32, case.q.shape)


def blocks_of(case: Case, mass: float, q: np.ndarray | None = None) -> np.ndarray:
    tips = reference.store(case.k, case.dims, case.ranges)
    return reference.prompt_blocks(
        case.q if q is None else q, tips, case.dims, case.ranges, case.mask, case.scale, mass
    )


@pytest.mark.check
@pytest.mark.parametrize("mass", [0.001, 0.3, 0.7, 0.95])
@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_match_the_reference(shape: Shape, mass: float) -> None:
    case = make_prompt(shape)
    idx = blocks_of(case, mass)
    n_kept, n_visible = (idx >= 0).sum(), np.isfinite(case.mask).sum() * shape.n_head_kv
    assert 0 < n_kept < n_visible or (shape.n_kv < 600 and n_kept == n_visible)
    truth = reference.attend(case.q, case.k.astype(np.float16), case.v, idx, case.scale)
    out = run(case, mass)
    assert ((out - truth) ** 2).sum() <= NMSE_REFERENCE * (truth**2).sum()


@pytest.mark.parametrize("shape", [*SHAPES, Shape(n_head=96, n_head_kv=8, n_kv=320, n_tokens=90, n_dim=48)])
def test_all_blocks_are_the_exact_attention(shape: Shape) -> None:
    """To the bit where there are tiles enough for all threads; where not, cells are shared out, too, without tips."""
    case = make_prompt(shape)
    exact, everything = run(case, None), run(case, 1.0)
    assert (everything == exact).all() or shape.n_head < 96
    assert ((everything - exact) ** 2).sum() <= NMSE_REFERENCE * (exact**2).sum()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_choice_that_leaves_out_none_is_the_exact_attention(shape: Shape) -> None:
    """To the bit, though blocks were chosen: random queries give some of their attention to all of them."""
    case = make_case(shape)
    mass = 0.99999
    assert (blocks_of(case, mass) >= 0).sum() == np.isfinite(case.mask).sum() * shape.n_head_kv
    assert (run(case, mass) == run(case, 1.0)).all()


def test_blocks_are_the_same_for_any_number_of_threads() -> None:
    case = make_prompt(SHAPES[0])
    alone = run(case, 0.7, n_threads=1)
    assert all((run(case, 0.7, n_threads=n) == alone).all() for n in (2, 3, 16))


def test_less_mass_takes_fewer_blocks() -> None:
    case = make_prompt(SHAPES[1])
    n_cells = [int((blocks_of(case, mass) >= 0).sum()) for mass in (0.001, 0.3, 0.7, 0.95)]
    assert n_cells == sorted(set(n_cells))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("tokens", [slice(None), slice(None, None, 7), slice(23, 24)])
def test_a_query_that_is_not_finite_has_no_say(tokens: slice, value: float) -> None:
    """It chooses, and no more: what attends is finite."""
    case = make_prompt(SHAPES[0])
    q = case.q.copy()
    q[tokens, 2:5] = value
    truth = reference.attend(case.q, case.k.astype(np.float16), case.v, blocks_of(case, 0.7, q), case.scale)
    assert ((run(case, 0.7, q=q) - truth) ** 2).sum() <= NMSE_REFERENCE * (truth**2).sum()
