"""The three ops against the numpy reference and against twins composed of existing ggml ops."""

from __future__ import annotations

from dataclasses import replace

from fasa_edge.runtime import ggml

import numpy as np
import pytest
import reference
from ggml_graph import BF16, CACHE_TYPES, F16, F32, Graph
from op_cases import NMSE_REFERENCE, Case, Shape, make_case, unpack

NMSE_STOCK = 5e-4  # what test-backend-ops allows FLASH_ATTN_EXT

CPU_TYPES = {"q5_1"}  # of K and V, which the GPU kernels do not read

pytestmark = pytest.mark.usefixtures("device")

ggml.declare({"ggml_set_output": (None, ggml.ptr)})

SHAPES = [
    Shape(),
    Shape(n_embd_head=128, n_head=8, n_head_kv=2, n_dim=32, n_kv=1024),
    Shape(n_embd_head=80, n_head=4, n_head_kv=4, n_dim=26, n_tokens=3),
    Shape(n_embd_head=96, n_head=16, n_head_kv=1, n_dim=28, n_hidden=100),
    Shape(n_embd_head=256, n_head=2, n_head_kv=1, n_dim=48, n_kv=32),
    Shape(n_kv=768, n_tokens=8, n_hidden=300),
    Shape(n_dim=64),
]

HEAD_SIZES = (64, 80, 96, 128, 256)


def run_store(
    g: Graph, case: Case, k: np.ndarray, type_k: int = F16, cells: np.ndarray | None = None
) -> tuple[int, list[int], int]:
    """(tips, [dims, ranges], stored): the tip cache, what is in it, and the result of storing ``k`` into ``cells``."""
    n_kv, n_head_kv, _ = case.k.shape
    tips = g.ggml_fasa_new_tips(n_kv, case.dims.shape[1], n_head_kv, 1)
    g.clear(tips)
    kept = [g.tensor(case.dims), g.tensor(case.ranges)]
    cells = np.arange(n_kv, dtype=np.int64) if cells is None else cells
    return tips, kept, g.ggml_fasa_store(tips, g.tensor(k), *kept, g.tensor(cells), type_k)


def run_select(
    case: Case, n_fac: int, forced: np.ndarray | None = None, n_threads: int = 2, by_head: bool = False
) -> np.ndarray:
    n_head_sel = case.q.shape[1] if by_head else case.k.shape[1]
    with Graph() as g:
        tips, kept, stored = run_store(g, case, case.k)
        idx = g.ggml_fasa_select(
            g.tensor(case.q),
            tips,
            *kept,
            g.tensor(case.mask),
            None if forced is None else g.tensor(forced),
            n_head_sel,
            n_fac,
            case.scale,
        )
        g.run(stored, idx, n_threads=n_threads)
        return g.read(idx, np.int32, (case.q.shape[0], n_head_sel, n_fac))


def scores_of(case: Case, k_type: type | None = np.float16, *, by_head: bool = False) -> np.ndarray:
    """The reference's."""
    tips = reference.store(case.k, case.dims, case.ranges, k_type)
    return reference.score(case.q, tips, case.dims, case.ranges, case.mask, case.scale, by_head)


def run_attend(
    case: Case,
    idx: np.ndarray | None,
    k: np.ndarray,
    softcap: float = 0.0,
    sinks: np.ndarray | None = None,
    n_threads: int = 2,
) -> np.ndarray:
    """To the listed cells, or without a list to all that the mask shows."""
    with Graph() as g:
        cells = (g.tensor(idx), None) if idx is not None else (None, g.tensor(case.mask))
        out = g.ggml_fasa_attend(
            g.tensor(case.q), g.tensor(k), g.tensor(case.v), *cells,
            None if sinks is None else g.tensor(sinks), case.scale, softcap,
        )  # fmt: skip
        g.run(out, n_threads=n_threads)
        return g.read(out, np.float32, (*case.q.shape[:2], case.v.shape[2]))


def nmse(value: np.ndarray, truth: np.ndarray) -> float:
    return float(((value - truth) ** 2).sum() / (truth**2).sum())


def assert_same_cells(idx: np.ndarray, expected: np.ndarray, scores: np.ndarray, tolerance: float = 1e-4) -> None:
    """Equal as sets, but for cells whose scores tie with the last one taken."""
    for index in np.ndindex(idx.shape[:-1]):
        got, want = set(idx[index].tolist()), set(expected[index].tolist())
        taken = scores[index][sorted(want - {-1})]
        for cell in got ^ want:
            assert cell != -1, f"{index}: {len(got)} cells listed, expected {len(want)}"
            assert abs(scores[index][cell] - taken.min()) < tolerance, f"{index}: cell {cell} is not at the threshold"


@pytest.mark.check
@pytest.mark.parametrize("shape", SHAPES)
def test_store_then_select_matches_reference(shape: Shape) -> None:
    case = make_case(shape)
    for n_fac in {1, shape.n_kv // 4, shape.n_kv}:
        idx = run_select(case, n_fac)
        scores = scores_of(case)
        assert_same_cells(idx, reference.select(scores, n_fac), scores)


@pytest.mark.parametrize("shape", SHAPES)
def test_select_lists_ascending_visible_cells_once(shape: Shape) -> None:
    case = make_case(shape)
    n_fac = shape.n_kv - 1
    for it, per_head in enumerate(run_select(case, n_fac)):
        n_visible = int(np.isfinite(case.mask[it]).sum())
        for cells in per_head:
            listed = cells[: min(n_fac, n_visible)]
            assert (np.diff(listed) > 0).all()
            assert np.isfinite(case.mask[it, listed]).all()
            assert (cells[len(listed) :] == -1).all()


# The second has fewer heads and tokens than threads, so what is shared out is cells.
@pytest.mark.parametrize("shape", [Shape(n_tokens=4), Shape(n_head=7, n_head_kv=1, n_kv=6016)])
def test_ops_are_the_same_for_any_number_of_threads(shape: Shape) -> None:
    case = make_case(shape)
    k = case.k.astype(np.float16)
    n_fac = shape.n_kv // 4
    idx = run_select(case, n_fac, n_threads=1)
    listed, exact = (run_attend(case, cells, k, n_threads=1) for cells in (idx, None))
    for n_threads in (2, 3, 5, 16):
        assert (run_select(case, n_fac, n_threads=n_threads) == idx).all()
        assert (run_attend(case, idx, k, n_threads=n_threads) == listed).all()
        assert (run_attend(case, None, k, n_threads=n_threads) == exact).all()


@pytest.mark.check
def test_select_gives_equal_scores_to_the_lower_id() -> None:
    case = make_case(Shape())
    case.k[:] = case.k[0]
    visible = np.flatnonzero(np.isfinite(case.mask[0]))
    assert (run_select(case, 40)[0] == visible[:40]).all()


@pytest.mark.check
def test_select_takes_forced_cells_if_they_are_visible() -> None:
    case = make_case(Shape(n_hidden=50))
    scores = scores_of(case)
    worst = np.argsort(np.where(np.isfinite(scores[0, 0]), scores[0, 0], np.inf))[:3]
    forced = np.array([[*worst, 255, 3, -1]], np.int32)  # 255 is hidden, 3 the hole
    idx = run_select(case, 16, forced)
    assert set(worst) <= set(idx[0, 0].tolist())
    assert not {255, 3} & set(idx.ravel().tolist())
    assert_same_cells(idx, reference.select(scores, 16, forced), scores)


@pytest.mark.parametrize("n_head_kv", [9, 3])
def test_select_minds_no_masked_cell_whatever_it_holds(n_head_kv: int) -> None:
    case = make_case(Shape(n_head_kv=n_head_kv))
    wanted = run_select(case, 16)
    case.k[3] = 1e6  # beyond f16, so its tips are infinite
    assert (run_select(case, 16) == wanted).all() and (wanted >= 0).all()


# Twice the greatest query element of float32 would be infinite; heads of a group are as far apart as their queries.
@pytest.mark.parametrize("exponents", [(126, 126, 126), (126, 100, 3), (80, 0, 90)])
@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("scale", [0.125, -0.125, 1e30])
def test_select_lists_n_fac_cells_of_the_greatest_queries(scale: float, by_head: bool, exponents: tuple[int]) -> None:
    case = make_case(Shape(n_kv=1056, n_hidden=100))
    case.scale = scale
    case.q = np.ldexp(np.clip(case.q, -3.9, 3.9), np.tile(exponents, 3)[:, None] - 1)
    for n_fac in (1, 400, 1000):
        idx = run_select(case, n_fac, by_head=by_head)
        assert ((idx >= 0).sum(axis=2) == min(n_fac, np.isfinite(case.mask).sum())).all()
        scores = scores_of(case, by_head=by_head)
        assert np.isfinite(scores[case.mask[:, None].repeat(scores.shape[1], 1) == 0]).all()
        tolerance = 1e-5 * np.abs(scores[scores > -np.inf]).max()
        assert_same_cells(idx, reference.select(scores, n_fac), scores, tolerance)


def test_select_orders_the_cells_of_one_head_the_same_at_any_size() -> None:
    case = make_case(Shape(n_kv=1056))
    wanted = run_select(case, 200, by_head=True)
    for exponent in (-60, 60, 120):
        assert (run_select(replace(case, q=np.ldexp(case.q, exponent)), 200, by_head=True) == wanted).all()


def test_select_without_a_visible_cell_lists_none() -> None:
    case = make_case(Shape())
    case.mask[:] = -np.inf
    idx = run_select(case, 8)
    assert (idx == -1).all()
    assert all((run_attend(case, cells, case.k.astype(np.float16)) == 0).all() for cells in (idx, None))


def test_store_writes_only_the_cells_it_is_given() -> None:
    case = make_case(Shape())
    cells = np.array([200, 7, 31], np.int64)
    with Graph() as g:
        tips, _, stored = run_store(g, case, case.k[cells], cells=cells)
        g.run(stored)
        some = g.read(tips, np.int8)
        tips, _, stored = run_store(g, case, case.k)
        g.run(stored)
        everything = g.read(tips, np.int8)
    assert (some == everything)[some != 0].all()
    assert 0 < np.count_nonzero(some) <= 3 * 3 * 12


def test_store_is_equal_to_the_bit_from_the_f16_cache() -> None:
    case = make_case(Shape())
    with Graph() as g:
        fresh, _, stored_fresh = run_store(g, case, case.k)
        rebuilt, _, stored_rebuilt = run_store(g, case, case.k.astype(np.float16))
        g.run(stored_fresh, stored_rebuilt)
        assert (g.read(fresh, np.int8) == g.read(rebuilt, np.int8)).all()


@pytest.mark.check
@pytest.mark.parametrize("type_k", ["f32", "f16", "bf16"])
def test_store_reads_keys_where_the_cache_holds_them(type_k: str) -> None:
    """Of some cells of two streams, behind the op that writes their keys, to the bit."""
    case = make_case(Shape())
    n_kv, n_head_kv, n_embd_head = case.k.shape
    cells = np.random.default_rng(1).permutation(2 * n_kv)[:n_kv].astype(np.int64)
    with Graph() as g:
        k, kept, idxs = g.tensor(case.k), [g.tensor(case.dims), g.tensor(case.ranges)], g.tensor(cells)
        fresh, cached = (g.ggml_fasa_new_tips(n_kv, case.dims.shape[1], n_head_kv, 2) for _ in range(2))
        for tips in (fresh, cached):
            g.write(tips, np.full(g.n_bytes(tips), 77, np.int8))
        cache = g.new(CACHE_TYPES[type_k], 2 * n_kv, n_head_kv * n_embd_head)
        g.write(cache, np.full(g.n_bytes(cache), 0xFF, np.uint8))  # NaN, should another row be read
        g.run(
            g.ggml_fasa_store(fresh, k, *kept, idxs, CACHE_TYPES[type_k]),
            g.ggml_set_rows(cache, g.ggml_reshape_3d(k, n_head_kv * n_embd_head, n_kv, 1), idxs),
            g.ggml_fasa_store_cached(cached, g.ggml_reshape_3d(cache, n_embd_head, n_head_kv, 2 * n_kv), *kept, idxs),
        )
        fresh, cached = (g.read(tips, np.int8) for tips in (fresh, cached))
    assert (fresh == cached).all() and (fresh != 77).any()


def test_store_without_rounding_matches_reference() -> None:
    case = make_case(Shape(n_head=3))
    with Graph() as g:
        tips, kept, stored = run_store(g, case, case.k, type_k=F32)
        idx = g.ggml_fasa_select(g.tensor(case.q), tips, *kept, g.tensor(case.mask), None, 3, 32, case.scale)
        g.run(stored, idx)
        idx = g.read(idx, np.int32, (1, 3, 32))
    scores = scores_of(case, k_type=None)
    assert_same_cells(idx, reference.select(scores, 32), scores)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Rounded to the nearest bfloat16, ties to even, as float32."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32)


def test_store_rounds_as_a_bf16_cache_does() -> None:
    case = make_case(Shape())
    with Graph() as g:
        fresh, _, stored_fresh = run_store(g, case, case.k, BF16)
        rebuilt, _, stored_rebuilt = run_store(g, case, to_bf16(case.k), F32)
        unrounded, _, stored_unrounded = run_store(g, case, case.k, F32)
        g.run(stored_fresh, stored_rebuilt, stored_unrounded)
        assert (g.read(fresh, np.int8) == g.read(rebuilt, np.int8)).all()
        assert (g.read(fresh, np.int8) != g.read(unrounded, np.int8)).any()


@pytest.mark.check
def test_streams_do_not_touch_each_other() -> None:
    """Stored into a tip cache of two streams, selected and attended in the first cells of both, to the bit."""
    shape = Shape(n_tokens=2)
    cases = [make_case(shape, seed) for seed in (0, 1)]
    n_cells, n_head_kv, n_dim, n_fac = 2 * shape.n_kv, shape.n_head_kv, shape.n_dim, 40
    forced = [np.array([[5, 9], [7, -1]], np.int32), np.array([[200, 1], [-1, 2]], np.int32)]
    dims = cases[0].dims
    cells = [np.arange(shape.n_kv, dtype=np.int64) + stream * n_cells for stream in (0, 1)]
    with Graph() as g:
        stack = lambda *arrays: g.tensor(np.stack(arrays))  # noqa: E731
        tips = g.ggml_fasa_new_tips(n_cells, n_dim, n_head_kv, 2)
        g.clear(tips)
        kept = [g.tensor(dims), g.tensor(cases[0].ranges)]
        k_both = g.tensor(np.concatenate([case.k for case in cases]))
        stored = g.ggml_fasa_store(tips, k_both, *kept, g.tensor(np.concatenate(cells)), F16)
        size = 32 * n_dim // 2
        strides = (size, size * n_cells // 32, size * n_cells // 32 * n_head_kv)
        view = g.ggml_view_4d(tips, size, shape.n_kv // 32, n_head_kv, 2, *strides, 0)
        q = stack(*(case.q for case in cases))
        mask = stack(*(case.mask[None] for case in cases))
        idx = g.ggml_fasa_select(q, view, *kept, mask, stack(*forced), n_head_kv, n_fac, cases[0].scale)
        ggml.base.ggml_set_output(idx)
        k = stack(*(case.k.astype(np.float16) for case in cases))
        out = g.ggml_fasa_attend(q, k, stack(*(case.v for case in cases)), idx, None, None, cases[0].scale, 0.0)
        g.run(stored, out)
        idx = g.read(idx, np.int32, (2, 2, n_head_kv, n_fac))
        out = g.read(out, np.float32, (2, *cases[0].q.shape))
    for stream, case in enumerate(cases):
        case.dims, case.ranges = dims, cases[0].ranges
        alone = run_select(case, n_fac, forced[stream])
        assert (idx[stream] == alone).all()
        assert (out[stream] == run_attend(case, alone, case.k.astype(np.float16))).all()


# Each group and each head size with each way to choose; test-backend-ops has them with one another, at random.
@pytest.mark.check
@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("n_group", range(1, 17))
def test_every_group_and_head_size(n_group: int, by_head: bool) -> None:
    n_embd_head = HEAD_SIZES[(n_group + 3) % 5]  # the largest group of the largest heads among them
    case = make_case(Shape(n_embd_head, 2 * n_group, 2, n_kv=96, n_dim=16 + n_embd_head // 8, n_tokens=2))
    k = case.k.astype(np.float16)
    idx = run_select(case, 30, by_head=by_head)
    scores = scores_of(case, by_head=by_head)
    assert_same_cells(idx, reference.select(scores, 30), scores)
    assert nmse(run_attend(case, idx, k), reference.attend(case.q, k, case.v, idx, case.scale)) <= NMSE_REFERENCE


@pytest.mark.parametrize("n_embd_head", [64, 96])
@pytest.mark.parametrize("type_v", CACHE_TYPES)
@pytest.mark.parametrize("type_k", CACHE_TYPES)
def test_attend_reads_every_cache_type(type_k: str, type_v: str, n_embd_head: int, device: str) -> None:
    case = make_case(Shape(n_embd_head, 6, 2, n_kv=96, n_tokens=2))
    sinks = np.linspace(-2, 3, 6, dtype=np.float32)
    idx = run_select(case, 40)
    with Graph() as g:
        k = g.ggml_cast(g.tensor(case.k), CACHE_TYPES[type_k])
        v = g.ggml_cast(g.tensor(case.v.astype(np.float32)), CACHE_TYPES[type_v])
        k_f32, v_f32 = g.ggml_cast(k, F32), g.ggml_cast(v, F32)
        out = g.ggml_fasa_attend(g.tensor(case.q), k, v, g.tensor(idx), None, g.tensor(sinks), case.scale, 5.0)
        assert g.supports(out) == (device == "CPU" or not {type_k, type_v} & CPU_TYPES)
        if not g.supports(out):
            return
        g.run(k_f32, v_f32, out)
        k, v = (g.read(x, np.float32, case.k.shape) for x in (k_f32, v_f32))
        out = g.read(out, np.float32, case.q.shape)
    assert nmse(out, reference.attend(case.q, k, v, idx, case.scale, 5.0, sinks)) <= NMSE_REFERENCE


@pytest.mark.check
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_attend_matches_reference(shape: Shape, softcap: float, with_sinks: bool) -> None:
    case = make_case(shape)
    k = case.k.astype(np.float16)
    sinks = np.linspace(-2, 3, shape.n_head, dtype=np.float32) if with_sinks else None
    idx = run_select(case, shape.n_kv // 2)
    truth = reference.attend(case.q, k, case.v, idx, case.scale, softcap, sinks)
    assert nmse(run_attend(case, idx, k, softcap, sinks), truth) <= NMSE_REFERENCE


@pytest.mark.parametrize("shape", [*SHAPES, Shape(n_kv=5), Shape(96, 7, 1, n_kv=5003, n_tokens=2)])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_attend_without_a_list_matches_reference(shape: Shape, softcap: float, with_sinks: bool) -> None:
    case = make_case(shape)
    k = case.k.astype(np.float16)
    sinks = np.linspace(-2, 3, shape.n_head, dtype=np.float32) if with_sinks else None
    visible = np.where(np.isfinite(case.mask), np.arange(shape.n_kv, dtype=np.int32), -1)
    idx = visible[:, None].repeat(shape.n_head_kv, axis=1)
    truth = reference.attend(case.q, k, case.v, idx, case.scale, softcap, sinks)
    assert nmse(run_attend(case, None, k, softcap, sinks), truth) <= NMSE_REFERENCE


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_sinks", [False, True])
def test_attend_over_all_cells_matches_flash_attention(shape: Shape, with_sinks: bool) -> None:
    case = make_case(shape)
    k = case.k.astype(np.float16)
    sinks = np.linspace(-2, 3, shape.n_head, dtype=np.float32) if with_sinks else None
    with Graph() as g:
        heads_outside = lambda x: g.tensor(np.ascontiguousarray(x.transpose(1, 0, 2)))  # noqa: E731
        flash = g.ggml_flash_attn_ext(
            heads_outside(case.q), heads_outside(k), heads_outside(case.v), g.tensor(case.mask), case.scale, 0.0, 0.0
        )
        if sinks is not None:
            g.add_sinks(flash, g.tensor(sinks))
        g.run(flash)
        stock = g.read(flash, np.float32, (*case.q.shape[:2], case.v.shape[2]))
    for idx in (run_select(case, shape.n_kv), None):
        assert nmse(run_attend(case, idx, k, sinks=sinks), stock) <= NMSE_STOCK


@pytest.mark.check
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape.n_tokens == 1])
def test_select_matches_its_composed_twin(shape: Shape) -> None:
    """The same choice from get_rows, mul_mat, soft_max, log, pool_1d and top_k, on queries that 8 bits hold exactly."""
    case = make_case(shape)
    n_group = shape.n_head // shape.n_head_kv
    case.q = np.clip(np.rint(32 * case.q), -127, 127) / np.float32(32)
    case.ranges[:, 1, :-1] = 0.25
    for ih in range(shape.n_head):
        case.q[:, ih, case.dims[ih // n_group][0]] = 127 / 32
    n_fac = shape.n_kv // 4
    tips = reference.store(case.k, case.dims, case.ranges)
    with Graph() as g:
        per_head = []
        for ih in range(shape.n_head_kv):
            # rows of the transposed queries are dims: [n_embd_head, n_group] -> [n_dim, n_group]
            q_dims = g.tensor(np.ascontiguousarray(case.q[0, ih * n_group : (ih + 1) * n_group].T))
            q_dom = g.ggml_cont(g.ggml_permute(g.ggml_get_rows(q_dims, g.tensor(case.dims[ih])), 1, 0, 2, 3))
            scores = g.ggml_mul_mat(g.tensor(tips[:, ih] * case.ranges[ih, 1]), q_dom)
            mask = np.repeat(case.mask.astype(np.float32), n_group, axis=0)
            scores = g.ggml_log(g.ggml_soft_max_ext(scores, g.tensor(mask), case.scale, 0.0))
            by_cell = g.ggml_cont(g.ggml_permute(scores, 1, 0, 2, 3))
            best = g.ggml_pool_1d(by_cell, 0, n_group, n_group, 0)
            per_head.append(g.ggml_top_k(g.ggml_reshape_3d(best, shape.n_kv, 1, 1), n_fac))
        g.run(*per_head)
        twin = np.stack([np.sort(g.read(top, np.int32)) for top in per_head])[None]
    scores = reference.score(case.q, tips, case.dims, case.ranges, case.mask, case.scale)
    assert_same_cells(run_select(case, n_fac), twin, scores)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape.n_tokens == 1])
def test_attend_matches_its_composed_twin(shape: Shape) -> None:
    """The same attention from get_rows of the listed cells and stock flash attention."""
    case = make_case(shape)
    k = case.k.astype(np.float16)
    n_group = shape.n_head // shape.n_head_kv
    n_fac = shape.n_kv // 4
    idx = run_select(case, n_fac)
    with Graph() as g:
        per_head = []
        for ih in range(shape.n_head_kv):
            cells = g.tensor(idx[0, ih])
            # get_rows gives f32, which flash attention takes for K and V as well
            k_rows = g.ggml_get_rows(g.tensor(np.ascontiguousarray(k[:, ih])), cells)
            v_rows = g.ggml_get_rows(g.tensor(np.ascontiguousarray(case.v[:, ih])), cells)
            q = g.tensor(np.ascontiguousarray(case.q[0, ih * n_group : (ih + 1) * n_group])[:, None, :])
            per_head.append(g.ggml_flash_attn_ext(q, k_rows, v_rows, None, case.scale, 0.0, 0.0))
        g.run(*per_head)
        twin = np.concatenate([g.read(out, np.float32, (n_group, shape.n_embd_head)) for out in per_head])[None]
    assert nmse(run_attend(case, idx, k), twin) <= NMSE_STOCK


@pytest.mark.parametrize("n_kv", [64, 4992])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("where", ["q", "all k", "some k"])
def test_attend_does_not_hide_what_is_not_a_number(n_kv: int, softcap: float, where: str) -> None:
    case = make_case(Shape(n_kv=n_kv))
    k = case.k.astype(np.float16)
    (case.q if where == "q" else k if where == "all k" else k[:40])[:] = np.nan
    listed = np.tile(np.arange(50, dtype=np.int32), (1, 3, 1))
    assert all(np.isnan(run_attend(case, cells, k, softcap)).all() for cells in (None, listed))


@pytest.mark.parametrize("n_kv", [64, 1500])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("sink", [None, 1.0, -np.inf])
@pytest.mark.parametrize("infinite", ["first", "last", "first but one", "all", "greatest"])
def test_attend_to_logits_that_are_infinite(n_kv: int, softcap: float, sink: float | None, infinite: str) -> None:
    """Cells of logit -inf have no weight, though a thread has no others; one of inf is not hidden."""
    case = make_case(Shape(n_kv=n_kv, n_head=14, n_head_kv=2))
    case.q[..., 0] = 1
    k = case.k.astype(np.float16)
    half = n_kv // 2
    where = {"first": slice(half), "last": slice(half, None), "first but one": slice(1, None), "all": slice(None)}
    k[where.get(infinite, slice(0)), :, 0] = -np.inf
    if infinite == "greatest":
        k[half, :, 0] = np.inf
    sinks = None if sink is None else np.full(14, sink, np.float32)
    visible = np.where(np.isfinite(case.mask), np.arange(n_kv, dtype=np.int32), -1)[:, None].repeat(2, axis=1)
    truth = reference.attend(case.q, k, case.v, visible, case.scale, softcap, sinks)
    assert np.isfinite(truth).all() == (infinite != "greatest" or softcap > 0)
    assert truth.any() == (infinite != "all" or softcap > 0)
    for out in (run_attend(case, None, k, softcap, sinks), run_attend(case, visible, k, softcap, sinks)):
        assert (np.isnan(out) == np.isnan(truth)).all()
        assert np.nansum((out - truth) ** 2) <= NMSE_REFERENCE * np.nansum(truth**2)


def test_attend_gives_no_weight_to_logits_that_overflow() -> None:
    case = make_case(Shape(n_kv=600))
    case.q[:] = 1e20
    k = -1e20 * np.abs(case.k)
    k[500:, :, :] *= 1e-30
    visible = np.where(np.isfinite(case.mask), np.arange(600, dtype=np.int32), -1)[:, None].repeat(3, axis=1)
    truth = reference.attend(case.q, k, case.v, visible, case.scale)
    assert truth.any()
    for cells in (None, visible):
        assert nmse(run_attend(case, cells, k), truth) <= NMSE_REFERENCE
    k[500:] = k[0]
    assert all((run_attend(case, cells, k) == 0).all() for cells in (None, visible))


def test_attend_minds_no_row_whose_weight_is_too_small_for_f32() -> None:
    case = make_case(Shape())
    case.q[:] = 30
    case.k[:] = 1
    case.k[7] = -1
    case.v = case.v.astype(np.float32)
    case.v[7] = 1e38
    every = np.arange(256, dtype=np.int32)[None, None].repeat(3, axis=1)
    out = run_attend(case, every, case.k)
    assert nmse(out, reference.attend(case.q, case.k, case.v, every, case.scale)) <= NMSE_REFERENCE


@pytest.mark.check
@pytest.mark.parametrize("type_k", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_stored_levels_are_the_reference(shape: Shape, type_k: str) -> None:
    """Between the levels, on their edges and beyond them; not finite, where the step is 0, too."""
    case = make_case(shape)
    rng = np.random.default_rng(5)
    centre, step = case.ranges[:, 0], case.ranges[:, 1]
    edges = centre + rng.integers(-10, 11, (shape.n_kv // 4, *centre.shape)) * step
    for ih, dims in enumerate(case.dims):
        case.k[: len(edges), ih, dims] = edges[:, ih]
    for i, value in enumerate((np.nan, np.inf, -np.inf, 3e38, -3e38, 7e4)):
        case.k[8 + i] = value
    with np.errstate(over="ignore"):
        rounded = to_bf16(case.k) if type_k == "bf16" else case.k
        wanted = reference.store(rounded, case.dims, case.ranges, np.float16 if type_k == "f16" else None)
    with Graph() as g:
        tips, _, stored = run_store(g, case, case.k, CACHE_TYPES[type_k])
        g.run(stored)
        found = unpack(g.read(tips, np.uint8), shape.n_head_kv, shape.n_dim)
    assert (found == wanted).all()
    moves = step > 0
    assert (wanted[8][moves] == 0).all() and (wanted[9][moves] == 15).all() and (wanted[10][moves] == 0).all()


@pytest.mark.parametrize("device", ["CPU"], indirect=True)
@pytest.mark.parametrize("n_threads", [1, 2, 16])
@pytest.mark.parametrize("n_head_kv", [1, 3])
@pytest.mark.parametrize("n_lanes", [4, 8, 16])
def test_select_where_the_sample_misleads(n_lanes: int, n_head_kv: int, n_threads: int) -> None:
    """The best cells are the sampled ones (fasa_guess_end), so in vectors of so many cells the guess is too narrow."""
    case = make_case(Shape(n_head=2 * n_head_kv, n_head_kv=n_head_kv, n_kv=40960))
    case.q[:] = 1
    case.k *= 0.01
    for i in range(48 // n_lanes + 1):
        first = (16 * i + 7 * i % 16) * n_lanes
        case.k[first : first + n_lanes] += 1
    scores = scores_of(case)
    assert_same_cells(run_select(case, 100, n_threads=n_threads), reference.select(scores, 100), scores)


def test_tips_take_at_most_7_percent_of_a_cache() -> None:
    with Graph() as g:
        tips = g.ggml_fasa_new_tips(4096, 2 * 16, 8, 1)
        assert g.n_bytes(tips) <= 0.07 * 4096 * 8 * 2 * 128 * 2
